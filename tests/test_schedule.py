"""Schedules and noise levels against their formulas, derived a second time."""

import math
from dataclasses import FrozenInstanceError, dataclass

import numpy as np
import pytest

from sloth_fx.errors import SlothError
from sloth_fx.schedule import Constant, Moment, NoiseSchedule, PeakDecay, Schedule, StepDecay, ratio_at


@dataclass(frozen=True)
class Ramp:
    """A schedule as a user would write it."""

    clock = "progress"
    scale: float = 1.0

    def ratio(self, moment: Moment) -> float:
        return self.scale * moment.progress


@pytest.mark.parametrize(("timestep", "progress"), [(1000, 0), (999, 0.001), (250, 0.75), (0, 1), (1200, 0), (-5, 1)])
def test_moment_of_a_timestep(timestep: float, progress: float) -> None:
    assert Moment.at(timestep, 2.5)[:2] == pytest.approx((progress, 2.5))


@pytest.mark.parametrize("progress", [0.0, 0.13, 0.4, 0.77, 1.0])
@pytest.mark.parametrize(("peak", "decay"), [(0.4, 2.0), (0.0, 4.0), (1.0, 0.5)])
def test_peak_decay_is_a_gaussian_around_its_peak(progress: float, peak: float, decay: float) -> None:
    width = 1 / decay
    expected = float(np.exp(-np.square(np.float64(progress) - peak) / width**2))
    assert PeakDecay(peak_time=peak, time_decay=decay).ratio(Moment(progress)) == pytest.approx(expected, rel=1e-12)


def test_peak_decay_without_decay_is_one_everywhere() -> None:
    assert [PeakDecay(time_decay=0).ratio(Moment(p)) for p in (0.0, 0.4, 1.0)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("log_sigma", "time"), [(2.8, 1), (5.0, 1), (0.3, 0.5), (-0.7, 0.3), (-2.2, 0), (-9, 0), (math.inf, 1)]
)
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0, 4.0])
def test_step_decay_counts_log_sigma_from_minus_2_2_to_2_8(log_sigma: float, time: float, decay: float) -> None:
    moment = Moment(0.5, math.exp(log_sigma))
    assert StepDecay(time_decay=decay).ratio(moment) == pytest.approx(time**decay, abs=1e-9 if decay >= 1 else 1e-7)


@pytest.mark.parametrize("sigma", [0.0, -1.0])
def test_step_decay_takes_no_noise_for_the_end(sigma: float) -> None:
    assert StepDecay(time_decay=1).ratio(Moment(1, sigma)) == 0
    assert StepDecay(time_decay=0).ratio(Moment(1, sigma)) == 1


@pytest.mark.parametrize("sigma", [None, math.nan])
def test_step_decay_without_sigma_says_what_would_work(sigma: float | None) -> None:
    with pytest.raises(SlothError, match=r"sigma is .*NoiseSchedule.*PeakDecay"):
        StepDecay().ratio(Moment(0.5, sigma))


def test_constant_and_clocks() -> None:
    assert Constant().ratio(Moment(0.3)) == 1
    assert (PeakDecay().clock, StepDecay().clock, Constant().clock) == ("progress", "sigma", None)
    assert all(isinstance(each, Schedule) for each in (PeakDecay(), StepDecay(), Constant(), Ramp()))


@pytest.mark.parametrize("bad", [-0.1, 4.1, math.nan, math.inf, True, "2", None, 10**400])
@pytest.mark.parametrize("kind", [PeakDecay, StepDecay])
def test_time_decay_is_refused(kind: type, bad: object) -> None:
    with pytest.raises(SlothError, match=rf"{kind.__name__}: time_decay=.* takes a number from 0 to 4"):
        kind(time_decay=bad)


@pytest.mark.parametrize("bad", [-0.1, 1.1, math.nan, False, "0.4"])
def test_peak_time_is_refused(bad: object) -> None:
    with pytest.raises(SlothError, match="peak_time"):
        PeakDecay(peak_time=bad)  # type: ignore[arg-type]


def test_schedules_are_frozen_and_keyword_only() -> None:
    with pytest.raises(FrozenInstanceError):
        PeakDecay().peak_time = 0.5  # type: ignore[misc]
    with pytest.raises(TypeError):
        PeakDecay(0.4)  # type: ignore[misc]


def test_ratio_at_accepts_any_real_number_in_range() -> None:
    assert ratio_at(Ramp(), Moment(0.25)) == 0.25
    assert type(ratio_at(Ramp(np.float32(1)), Moment(0.5))) is float  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [1.5, -0.1, math.nan, "x"])
def test_ratio_at_names_a_schedule_that_leaves_the_range(bad: object) -> None:
    class Odd(Ramp):
        def ratio(self, moment: Moment) -> float:
            return bad  # type: ignore[return-value]

    with pytest.raises(SlothError, match=r"Odd\.ratio"):
        ratio_at(Odd(), Moment(1.0))


def by_hand(kind: str, start: float, end: float, steps: int) -> list[float]:
    """Sigma by the definition, one timestep after the other."""
    sigmas, abar = [], 1.0
    for step in range(steps):
        part = step / (steps - 1)
        beta = start + (end - start) * part
        if kind == "scaled_linear":
            beta = (math.sqrt(start) + (math.sqrt(end) - math.sqrt(start)) * part) ** 2
        abar *= 1 - beta
        sigmas.append(math.sqrt((1 - abar) / abar))
    return sigmas


@pytest.mark.parametrize(
    ("kind", "start", "end", "steps"), [("scaled_linear", 0.00085, 0.012, 1000), ("linear", 1e-4, 0.02, 50)]
)
def test_sigma_of_whole_timesteps(kind: str, start: float, end: float, steps: int) -> None:
    noise = NoiseSchedule(beta_start=start, beta_end=end, kind=kind, steps=steps)  # type: ignore[arg-type]
    assert [noise.sigma(t) for t in range(steps)] == pytest.approx(by_hand(kind, start, end, steps), rel=1e-9)


def test_sigma_of_stable_diffusion() -> None:
    """The ends that every sampler of Stable Diffusion shows: 0.0292 and 14.6146."""
    noise = NoiseSchedule()
    assert (noise.sigma(0), noise.sigma(999)) == pytest.approx((0.0292, 14.6146), abs=5e-5)


def test_sigma_between_timesteps_is_geometric_and_clamped() -> None:
    noise = NoiseSchedule()
    low, high = noise.sigma(499), noise.sigma(500)
    assert noise.sigma(499.25) == pytest.approx(low**0.75 * high**0.25, rel=1e-12)
    assert noise.sigma(-3) == noise.sigma(0)
    assert noise.sigma(5000) == noise.sigma(999)


@pytest.mark.parametrize(
    "bad",
    [
        {"beta_start": 0},
        {"beta_end": 1.0},
        {"kind": "cosine"},
        {"steps": 0},
        {"steps": 10.0},
        {"beta_start": 0.9, "beta_end": 0.9},
    ],
)
def test_noise_schedule_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(SlothError, match="NoiseSchedule"):
        NoiseSchedule(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [math.nan, "3", None, True])
def test_timestep_is_refused(bad: object) -> None:
    with pytest.raises(SlothError, match="timestep"):
        NoiseSchedule().sigma(bad)  # type: ignore[arg-type]
