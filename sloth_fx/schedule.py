"""When to act: schedules turn a moment of sampling into a ratio in 0..1. Also the checks that every spec shares."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from sloth_fx.errors import SlothError

Clock: TypeAlias = Literal["progress", "sigma"] | None


class Accepts(NamedTuple):
    """What a parameter accepts: in words, for the error message, and as a predicate."""

    words: str
    holds: Callable[[Any], bool]


Limits: TypeAlias = Mapping[str, Accepts]
"""Metadata of a dataclass field, ``{"accepts": Accepts}``."""


def accepting(words: str, holds: Callable[[Any], bool]) -> Limits:
    """Field metadata for a value that `holds` is true of."""
    return {"accepts": Accepts(words, holds)}


def between(low: float, high: float, *, whole: bool = False) -> Limits:
    """Field metadata for a number in low..high, both ends included; `whole` asks for an int. A bool is not a number."""
    types = int if whole else (int, float)
    return accepting(
        f"{'a whole number' if whole else 'a number'} from {low:g} to {high:g}",
        lambda value: isinstance(value, types) and not isinstance(value, bool) and low <= value <= high,
    )


def one_of(*choices: str) -> Limits:
    """Field metadata for one of a few strings."""
    return accepting("one of " + ", ".join(choices), lambda value: isinstance(value, str) and value in choices)


def or_none(limits: Limits) -> Limits:
    """The same limits, and None."""
    accepts = limits["accepts"]
    return accepting(f"{accepts.words}, or None", lambda value: value is None or accepts.holds(value))


FLAG: Limits = accepting("True or False", lambda value: isinstance(value, bool))


def require(name: str, value: Any, limits: Limits) -> None:
    """Raise a SlothError that names the parameter, its value and what it takes, unless the value is accepted."""
    accepts = limits["accepts"]
    if not accepts.holds(value):
        raise SlothError(f"{name}={value!r:.80} is refused: {name} takes {accepts.words}")


def check_fields(spec: Any) -> None:
    """Check every field of a dataclass that carries limits; the SlothError begins with the name of the class."""
    for each in fields(spec):
        if "accepts" in each.metadata:
            try:
                require(each.name, getattr(spec, each.name), each.metadata)
            except SlothError as error:
                raise SlothError(f"{type(spec).__name__}: {error}") from None


def unknown(name: object, known: Iterable[str]) -> str:
    """'rte' is unknown, nearest: rate (known: rate, mode): the words of an error about a name that is not known."""
    names = list(known)
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    hint = f", nearest: {', '.join(near)}" if near else ""
    return f"{name!r:.80} is unknown{hint} (known: {', '.join(names)})"


class Moment(NamedTuple):
    """A point of the sampling run.

    progress: 0 at the start of sampling, 1 at its end. sigma: the noise level, noise over signal, or None if
    nobody knows it.
    """

    progress: float
    sigma: float | None = None

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
