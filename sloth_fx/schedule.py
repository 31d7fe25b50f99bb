"""When to act: schedules turn a moment of sampling into a ratio in 0..1."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from sloth_fx.checks import Limits, accepting, between, check_fields, one_of, require
from sloth_fx.errors import SlothError

Clock: TypeAlias = Literal["progress", "sigma"] | None


class Moment(NamedTuple):
    """A point of the sampling run.

    progress: 0 at the start of sampling, 1 at its end. sigma: the noise level, noise over signal, or None if
    nobody knows it. step: the part of the run that the sampling step at this point covers, as progress, from and to;
    None if nobody knows it.
    """

    progress: float
    sigma: float | None = None
    step: tuple[float, float] | None = None

    def within(self, start: float, stop: float) -> bool:
        """Whether what acts from `start` to `stop` acts at this point: after start, and before stop or to the end at 1.

        Where no step begins between the two, that one acts of which both are a part: no run is too short for it.
        """
        if start <= self.progress < stop or start <= self.progress == stop == 1:
            return True
        return self.step is not None and self.step[0] <= start < stop <= self.step[1]

    @classmethod
    def at(cls, timestep: float, sigma: float | None = None) -> Moment:
        """The moment of a timestep in 0..1000: progress = clamp(1 - timestep / 1000, 0, 1)."""
        return cls(min(max(1 - timestep / 1000, 0.0), 1.0), sigma)


@runtime_checkable
class Schedule(Protocol):
    """How strongly to act at a moment. Any object with these two members is a schedule.

    clock says what the ratio depends on: "progress", "sigma", or None for a ratio that never changes.
    """

    @property
    def clock(self) -> Clock: ...

    def ratio(self, moment: Moment) -> float:
        """The share of the full effect at this moment, 0..1."""


@dataclass(frozen=True, kw_only=True)
class PeakDecay:
    """ratio = exp(-(progress - peak_time)^2 * time_decay^2): full effect at one moment, less before and after it.

    peak_time: progress of the full effect, 0..1. time_decay: how fast the effect fades around it, 0..4; 0 is the full
    effect throughout. Source: Slothful Attention and Near-sighted Attention, release of 2023-12-16. Raises SlothError
    out of range.
    """

    clock: ClassVar[Clock] = "progress"

    peak_time: float = field(default=0.4, metadata=between(0, 1))
    time_decay: float = field(default=2.0, metadata=between(0, 4))

    def __post_init__(self) -> None:
        check_fields(self)

    def ratio(self, moment: Moment) -> float:
        """The ratio at the moment's progress."""
        return math.exp(-(((moment.progress - self.peak_time) * self.time_decay) ** 2))


@dataclass(frozen=True, kw_only=True)
class StepDecay:
    """ratio = clamp((ln sigma + 2.2) / 5, 0, 1) ^ time_decay: full effect at the start, none at the end.

    time_decay: exponent, 0..4; 0 is the full effect throughout. A sigma of 0 or less counts as the end. Source:
    Slothful Attention, release of 2023-12-11. Raises SlothError out of range, and at a moment without sigma.
    """

    clock: ClassVar[Clock] = "sigma"

    time_decay: float = field(default=1.0, metadata=between(0, 4))

    def __post_init__(self) -> None:
        check_fields(self)

    def ratio(self, moment: Moment) -> float:
        """The ratio at the moment's noise level."""
        sigma = moment.sigma
        if sigma is None or math.isnan(sigma):
            raise SlothError(
                f"StepDecay reads the noise level, and sigma is {sigma} at this moment: "
                "give the moment a sigma (NoiseSchedule().sigma(timestep)), or use PeakDecay, which reads progress"
            )
        time = min(max((math.log(sigma) + 2.2) / 5, 0.0), 1.0) if sigma > 0 else 0.0
        return math.pow(time, self.time_decay)


@dataclass(frozen=True, kw_only=True)
class Constant:
    """ratio = 1: the full effect throughout."""

    clock: ClassVar[Clock] = None

    def ratio(self, moment: Moment) -> float:
        """1, whatever the moment."""
        return 1.0


SCHEDULES: Mapping[str, type[PeakDecay | StepDecay | Constant]] = {
    each.__name__: each for each in (PeakDecay, StepDecay, Constant)
}


def _is_schedule(value: object) -> bool:
    if isinstance(value, type) or not isinstance(value, Schedule):
        return False
    return callable(value.ratio) and value.clock in ("progress", "sigma", None)


SCHEDULE: Limits = accepting(
    f"a schedule: {', '.join(f'{name}()' for name in SCHEDULES)}, or an object of yours with ratio(moment) "
    'and clock ("progress", "sigma" or None)',
    _is_schedule,
)


def ratio_at(schedule: Schedule, moment: Moment) -> float:
    """schedule.ratio(moment) as a float; SlothError naming the schedule if that is not a number in 0..1."""
    ratio: object = schedule.ratio(moment)
    if isinstance(ratio, numbers.Real) and not isinstance(ratio, bool) and 0 <= float(ratio) <= 1:
        return float(ratio)
    raise SlothError(f"{type(schedule).__name__}.ratio({moment}) is {ratio!r:.80}: a ratio is a number from 0 to 1")


BETA = between(1e-6, 0.999)
KIND = one_of("scaled_linear", "linear")


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """Noise level of a timestep, for a model trained on discrete steps; the defaults are Stable Diffusion's.

    sigma_t = sqrt((1 - abar_t) / abar_t), abar_t = prod over s <= t of (1 - beta_s), with beta from beta_start to
    beta_end linear in s ("linear"), or its square root linear in s ("scaled_linear"). beta in 1e-6..0.999, steps
    1..100000. Raises SlothError out of range, and where sigma would exceed what a float can hold.
    """

    beta_start: float = field(default=0.00085, metadata=BETA)
    beta_end: float = field(default=0.012, metadata=BETA)
    kind: Literal["scaled_linear", "linear"] = field(default="scaled_linear", metadata=KIND)
    steps: int = field(default=1000, metadata=between(1, 100_000, whole=True))

    def __post_init__(self) -> None:
        check_fields(self)
        if _log_sigmas(self)[-1] > math.log(np.finfo(np.float64).max):
            raise SlothError(f"{self}: sigma grows beyond what a float can hold; take smaller betas or fewer steps")

    def sigma(self, timestep: float) -> float:
        """Sigma at a timestep in 0..steps - 1, clamped to it; between whole timesteps ln sigma is linear."""
        require("timestep", timestep, between(-math.inf, math.inf))
        logs = _log_sigmas(self)
        return math.exp(np.interp(timestep, np.arange(self.steps), logs))


@lru_cache(maxsize=16)
def _log_sigmas(noise: NoiseSchedule) -> NDArray[np.float64]:
    power = 0.5 if noise.kind == "scaled_linear" else 1.0
    betas = np.linspace(noise.beta_start**power, noise.beta_end**power, noise.steps, dtype=np.float64) ** (1 / power)
    minus_log_abar = -np.cumsum(np.log1p(-betas))
    return np.asarray(0.5 * (minus_log_abar + np.log1p(-np.exp(-minus_log_abar))), dtype=np.float64)
