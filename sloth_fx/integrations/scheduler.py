"""Where a sampling run is, read off its scheduler, which is looked at and never changed."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from sloth_fx.model_adapters import ModelAdapter
from sloth_fx.prediction import ENDLESS, Prediction
from sloth_fx.schedule import Moment

_NEAR = 0.005  # of the run: as far as a timestep in half precision can be from the scheduler's


class SchedulerReader:
    """Finds the moment of a call among the timesteps of a scheduler as diffusers has them.

    ``set_timesteps`` makes new timesteps; the first call that meets them copies them (and what gives their noise
    levels) to the host. From then on an index is all that is needed, and no step waits for the device.
    """

    def __init__(self, adapter: ModelAdapter) -> None:
        self._adapter = adapter
        self._timesteps: Tensor | None = None
        self._moments: list[Moment] | None = None
        self.runs = 0
        """How many sets of timesteps were seen."""

    def moment(self, scheduler: Any, timestep: Any) -> Moment | None:
        """The moment of a call that is given ``timestep``; ``None`` where the scheduler does not tell.

        In this order: an element of the scheduler's own timesteps tells its index by where it lies; the scheduler's
        count of steps (or where it was told to begin) is the index; of a timestep in the model's own units, which has
        to be read from the device, the nearest of the scheduler's is taken.
        """
        timesteps = getattr(scheduler, "timesteps", None)
        if not isinstance(timesteps, Tensor) or timesteps.ndim != 1 or timesteps.device.type == "meta":
            return None
        if timesteps is not self._timesteps:
            self._timesteps, self._moments = timesteps, moments_of(scheduler)
            self.runs += 1
        if not self._moments:
            return None
        index = _place_in(timesteps, timestep)
        if index is None:
            index = _step_of(scheduler)
        if index is not None and index < len(self._moments):
            return self._moments[index]
        return self._nearest(timestep, self._moments)

    def _nearest(self, timestep: Any, moments: Sequence[Moment]) -> Moment | None:
        value = _value(timestep)
        if value is None:
            return None
        progress = self._adapter.progress(value)
        nearest = min(moments, key=lambda moment: abs(moment.progress - progress))
        return nearest if abs(nearest.progress - progress) <= _NEAR else None


def moments_of(scheduler: Any) -> list[Moment] | None:
    """The moment of each of a scheduler's timesteps t, of N that the model was trained with, and the part of the run
    that it covers; ``None`` where it is of no kind known here. Reads the tensors of the scheduler, wherever they lie.

    - Variance preserving (it has ``alphas_cumprod``): progress = 1 - t / N, sigma = sqrt((1 - abar_t) / abar_t), and
      between whole timesteps ln sigma is linear, as in :class:`sloth_fx.NoiseSchedule`.
    - Flow matching (its timesteps are its sigmas times N): progress = 1 - s, sigma = s / (1 - s), with s = t / N; or
      1 - t / N, where the scheduler inverts them.
    - EDM (its timesteps are ln sigma / 4): progress is how far ln sigma has come from the largest to the smallest.

    A step goes on until the next one begins. The first, or only one goes back to the start of the run, unless it begins
    later than its own length tells: a scheduler that counts back from the end of the run begins that much after it.
    """
    moments = _moments(scheduler)
    if not moments:
        return moments
    begins = [moment.progress for moment in moments]
    ends = [next((later for later in begins[i + 1 :] if later > begin), 1.0) for i, begin in enumerate(begins)]
    whole = ends[0] == 1.0 or 2 * begins[0] <= ends[0] + _NEAR
    return [
        moment._replace(step=(0.0 if whole and moment.progress == begins[0] else moment.progress, end))
        for moment, end in zip(moments, ends, strict=True)
    ]


def _moments(scheduler: Any) -> list[Moment] | None:
    times = np.asarray(scheduler.timesteps.tolist(), dtype=np.float64)
    steps = _config(scheduler, "num_train_timesteps")
    if not isinstance(steps, int | float) or steps <= 0 or not np.isfinite(times).all():
        return None
    count = float(steps)
    sigmas = _numbers(getattr(scheduler, "sigmas", None))[: len(times)]
    if len(sigmas) == len(times):
        if (sigmas > 0).all() and np.allclose(times, np.log(np.maximum(sigmas, 1e-30)) / 4, rtol=0, atol=1e-3):
            return _edm(scheduler, sigmas)
        if ((sigmas >= 0) & (sigmas <= 1)).all() and np.allclose(times, sigmas * count, rtol=0, atol=1.0):
            level = times / count
            return _flow(1 - level if _config(scheduler, "invert_sigmas") else level)
    abar = _numbers(getattr(scheduler, "alphas_cumprod", None))
    if len(abar) > 1 and ((times >= 0) & (times <= count)).all():
        return _variance_preserving(times, count, abar)
    return None


def _variance_preserving(times: Any, count: float, abar: Any) -> list[Moment]:
    with np.errstate(divide="ignore"):
        log_sigmas = 0.5 * (np.log(1 - abar) - np.log(abar))
    log_sigmas = np.clip(log_sigmas, -math.log(ENDLESS), math.log(ENDLESS))
    found = np.interp(times, np.arange(len(abar)), log_sigmas)
    return [Moment(_clamped((count - t) / count), math.exp(log)) for t, log in zip(times, found, strict=True)]


def _flow(levels: Any) -> list[Moment]:
    return [Moment(_clamped(1 - s), float(s / (1 - s)) if s < 1 else ENDLESS) for s in levels]


def _edm(scheduler: Any, sigmas: Any) -> list[Moment]:
    known = [_config(scheduler, name) for name in ("sigma_max", "sigma_min")]
    abar = _numbers(getattr(scheduler, "alphas_cumprod", None))
    if len(abar) > 1 and None in known:
        known = [math.sqrt((1 - each) / each) for each in (abar[-1], abar[0])]
    first, last = (math.log(each or edge) for each, edge in zip(known, (sigmas.max(), sigmas.min()), strict=True))
    span = first - last
    return [Moment(_clamped((first - math.log(s)) / span) if span > 0 else 0.0, float(s)) for s in sigmas]


def _clamped(progress: float) -> float:
    return min(max(float(progress), 0.0), 1.0)


def prediction_of(scheduler: Any) -> Prediction | None:
    """What the model of a scheduler predicts; ``None`` where it is of no kind known here."""
    kind = _config(scheduler, "prediction_type")
    if hasattr(scheduler, "precondition_inputs"):
        data = _config(scheduler, "sigma_data")
        return Prediction("edm", float(data)) if kind == "epsilon" and isinstance(data, int | float) else None
    if kind in ("epsilon", "v_prediction", "sample"):
        return Prediction(kind)
    if kind == "flow_prediction" or (kind is None and "FlowMatch" in type(scheduler).__name__):
        return Prediction("flow")
    return None


def _config(scheduler: Any, name: str) -> Any:
    return getattr(getattr(scheduler, "config", None), name, None)


def _numbers(values: Any) -> Any:
    return np.asarray(values.tolist() if isinstance(values, Tensor | np.ndarray) else (), dtype=np.float64)


def _place_in(timesteps: Tensor, timestep: Any) -> int | None:
    """The index of an element of ``timesteps`` that ``timestep`` is a view of, perhaps expanded to a batch."""
    if not isinstance(timestep, Tensor) or timestep.dtype != timesteps.dtype or timestep.device != timesteps.device:
        return None
    if timestep.numel() == 0 or any(
        size > 1 and step for size, step in zip(timestep.shape, timestep.stride(), strict=True)
    ):
        return None
    if timestep.untyped_storage().data_ptr() != timesteps.untyped_storage().data_ptr():
        return None
    index, rest = divmod(int(timestep.storage_offset() - timesteps.storage_offset()), max(timesteps.stride(0), 1))
    return index if rest == 0 and 0 <= index < len(timesteps) else None


def _step_of(scheduler: Any) -> int | None:
    """The index that the scheduler's next step will have, if it knows."""
    for name in ("step_index", "begin_index"):
        index = getattr(scheduler, name, None)
        if isinstance(index, int) and index >= 0:
            return index
    return None


def _value(timestep: Any) -> float | None:
    if isinstance(timestep, Tensor) and timestep.device.type != "meta":
        values = set(timestep.flatten().tolist())
        timestep = values.pop() if len(values) == 1 else None
    return float(timestep) if isinstance(timestep, numbers.Real) and math.isfinite(timestep) else None
