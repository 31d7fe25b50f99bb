"""Where a sampling run of ComfyUI is: its sigmas, in the terms of a moment."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

from sloth_fx.errors import SlothError
from sloth_fx.prediction import ENDLESS, Kind, Prediction
from sloth_fx.schedule import Moment

_PREDICTIONS: dict[str, Kind | None] = {
    "IMG_TO_IMG": None,
    "IMG_TO_IMG_FLOW": None,
    "COSMOS_RFLOW": None,
    "CONST": "flow",
    "EDM": "edm",
    "V_PREDICTION": "v_prediction",
    "X0": "sample",
    "EPS": "epsilon",
}
"""By the classes of ComfyUI that models' samplings are made of, of which the later are bases of the earlier. The first
ones predict what no kind here stands for, or take another input."""


class Run:
    """The sigmas of a run, which are read once: reading them waits for the device."""

    def __init__(self) -> None:
        self._read: tuple[Any, list[float]] = (None, [])

    def sigmas(self, options: Any) -> list[float] | None:
        """Those of the run that ``options`` of a call belong to; ``None`` where they do not say."""
        sigmas = options.get("sample_sigmas")
        if sigmas is None:
            return None
        if sigmas is not self._read[0]:
            self._read = sigmas, sigmas.tolist()
        return self._read[1]


def sigma_of(options: Any) -> float:
    """The sigma of a call whose ``transformer_options`` are ``options``. Raises :class:`SlothError` without one."""
    sigmas = options.get("sigmas")
    if sigmas is None or len(sigmas) == 0:
        raise SlothError('this call of the model has no "sigmas" in its transformer_options: nothing tells the moment')
    return float(sigmas.flatten()[0])


def moment_of(sigma: float, run: Sequence[float] | None, model_sampling: Any) -> Moment:
    """The moment at ``sigma`` in a ``run`` of ``model_sampling``.

    Progress is a place in the full range of noise, as it is everywhere here, and not a count of steps: 1 - t / N of
    the timestep t, of N that the model was trained with, for those of Stable Diffusion; 1 - s for flows; how far
    ln sigma has come for EDM. Sigma is noise over signal: s / (1 - s) for flows. A step goes on until the next sigma of
    the run.
    """
    progress = _progress(sigma, model_sampling)
    return Moment(progress, _noise_over_signal(sigma, model_sampling), _step(progress, sigma, run, model_sampling))


def prediction_of(model_sampling: Any) -> Prediction | None:
    """What a model predicts; ``None`` if it is of no kind known here, as where its data have a deviation other than 1
    (but for EDM, whose equations have it)."""
    names = [base.__name__ for base in type(model_sampling).__mro__]
    kind = next((_PREDICTIONS[name] for name in names if name in _PREDICTIONS), None)
    if kind == "edm":
        data = getattr(model_sampling, "sigma_data", None)
        return Prediction(kind, float(data)) if isinstance(data, numbers.Real) else None
    if kind is None or (kind != "flow" and getattr(model_sampling, "sigma_data", 1.0) != 1.0):
        return None
    return Prediction(kind)


def _progress(sigma: float, sampling: Any) -> float:
    def timestep(level: float) -> float:
        like = sampling.sigma_max.new_tensor([level])
        return float(sampling.timestep(like).flatten()[0])

    if sigma <= 0:
        return 1.0
    if _is_flow(sampling):
        return _clamped(1 - sigma)
    first, last = timestep(float(sampling.sigma_max)), timestep(float(sampling.sigma_min))
    now = timestep(sigma)
    if first > 1 and last >= 0:  # counted, from N - 1 to 0
        return _clamped(1 - now / getattr(sampling, "num_timesteps", 1000))
    if last >= 0:  # a share
        return _clamped(1 - now)
    return _clamped((first - now) / (first - last)) if first > last else 0.0  # of ln sigma


def _step(progress: float, sigma: float, run: Sequence[float] | None, sampling: Any) -> tuple[float, float] | None:
    """The part of the run until the next sigma; ``None`` where the run is not known."""
    if run is None:
        return None
    later = [each for each in run if each < sigma * (1 - 1e-6)]
    end = _progress(later[0], sampling) if later else 1.0
    whole = len(run) > 0 and math.isclose(run[0], sigma, rel_tol=1e-6)
    return (0.0 if whole and 2 * progress <= end else progress, max(end, progress))


def _noise_over_signal(sigma: float, sampling: Any) -> float:
    if not _is_flow(sampling):
        return sigma
    return sigma / (1 - sigma) if sigma < 1 else ENDLESS


def _is_flow(sampling: Any) -> bool:
    """Whether sigma is the share of noise: then what is denoised is sigma * noise + (1 - sigma) * image."""
    return any(base.__name__ in ("CONST", "IMG_TO_IMG_FLOW") for base in type(sampling).__mro__)


def _clamped(progress: float) -> float:
    return min(max(progress, 0.0), 1.0)
