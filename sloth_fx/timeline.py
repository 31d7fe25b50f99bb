"""Where in a sampling run a model is, and how noisy its latent is there."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch

from sloth_fx.errors import SlothError
from sloth_fx.model_adapters import ModelAdapter
from sloth_fx.prediction import Prediction, sigma_of_flow
from sloth_fx.schedule import Moment, NoiseSchedule

_STEPS = 1000  # how finely a run is looked through, where nobody says


class Timeline:
    """The ``moment`` of a run: ``driven`` there by the caller, or by the timestep of each call.

    ``steps`` counts those of the run and ``sigma_given`` tells that the caller named the noise level, both where they
    said so. ``prediction`` is what the model predicts: the timestep of a flow is a noise level.
    """

    def __init__(self, adapter: ModelAdapter) -> None:
        self.adapter = adapter
        self._own_noise = self._noise = adapter.noise
        self.driven = False
        self.steps: int | None = None
        self.sigma_given = False
        self.prediction: Prediction | None = None
        self.moment = self.moment_at(0.0)

    def step(self, i: Any, n: Any) -> Moment:
        """The moment of step ``i`` (0 to n - 1) of ``n``. Raises :class:`SlothError` otherwise."""
        index, steps = whole(i), whole(n)
        if index is None or steps is None or not 0 <= index < steps:
            raise SlothError(f"step(i={i!r}, n={n!r}): n counts the steps of the run, and i goes from 0 to n - 1")
        return self._of_step(index, steps)

    def at(self, progress: Any, sigma: Any, step: Any) -> Moment:
        """The moment that a caller names. Raises :class:`SlothError` for what is none."""
        place, level = number(progress), None if sigma is None else number(sigma)
        if not 0 <= place <= 1:
            raise SlothError(f"progress={progress!r}: it goes from 0 (start of sampling) to 1 (its end)")
        if level is not None and not 0 <= level < math.inf:
            raise SlothError(f"sigma={sigma!r}: a noise level is a number from 0")
        if step is not None and not 0 <= number(step[0]) <= number(step[1]) <= 1:
            raise SlothError(f"step={step!r}: from and to, progress in 0..1 both")
        return self.moment_at(place, level)._replace(step=step)

    def drive(self, moment: Moment, *, steps: int | None = None, sigma_given: bool = False) -> None:
        """Go to ``moment``, and stay there whatever timestep a call has."""
        self.driven, self.moment = True, moment
        self.steps, self.sigma_given = steps, sigma_given

    def auto(self, noise: NoiseSchedule | None) -> None:
        """Follow timesteps again, by ``noise`` or the model's own schedule. Raises :class:`SlothError` for others."""
        if noise is not None and not isinstance(noise, NoiseSchedule):
            raise SlothError(f"auto({noise!r:.80}): give a NoiseSchedule, or nothing for the model's own")
        self._noise = noise if noise is not None else self._own_noise
        self.driven = False
        self.steps = None

    def follow(self, timestep: float) -> None:
        """Go to the moment of a call with this ``timestep``."""
        self.moment = self.moment_at(self._progress(timestep), timestep=timestep)

    def read_sigma(self, timestep: float) -> None:
        """Take the noise level alone from a call with this ``timestep``."""
        sigma = self.moment_at(self.adapter.progress(timestep), timestep=timestep).sigma
        self.moment = self.moment._replace(sigma=sigma)

    def moment_at(self, progress: float, sigma: float | None = None, timestep: float | None = None) -> Moment:
        """The moment at ``progress``, with the noise level there where it is known."""
        if sigma is None and self._noise is not None:
            sigma = self._noise.sigma((1 - progress) * self._noise.steps if timestep is None else timestep)
        flow = self.prediction is not None and self.prediction.kind in ("flow", "reversed_flow")
        if sigma is None and flow and timestep is not None:
            sigma = sigma_of_flow(self.adapter.progress(timestep))
        return Moment(progress, sigma)

    def run(self, steps: Any) -> list[Moment]:
        """The moments of a run of ``steps`` steps. Raises :class:`SlothError` for what is no number of steps."""
        count = _STEPS if steps is None else whole(steps)
        if count is None or count < 1:
            raise SlothError(f"steps={steps!r}: the number of steps of a run, 1 or more")
        return [self._of_step(i, count) for i in range(count)]

    def _of_step(self, i: int, n: int) -> Moment:
        return self.moment_at(i / n)._replace(step=(i / n, (i + 1) / n))

    def _progress(self, timestep: float) -> float:
        if self._noise is not None and self._noise is not self._own_noise:
            return min(max(1 - timestep / self._noise.steps, 0.0), 1.0)
        return self.adapter.progress(timestep)


def whole(value: Any) -> int | None:
    """``value`` as an int, ``None`` for what is no whole number."""
    return int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else None


def number(value: Any) -> float:
    """``value`` as a float, NaN for what is no number; schedulers give tensors of one element."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
