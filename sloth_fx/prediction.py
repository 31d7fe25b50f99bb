"""What a denoiser predicts, and what that means for the clean latent x0.

Whoever steers a prediction by x0 (self-attention guidance) has to know it: a pipeline's scheduler says it, which
`attach` reads, or the caller, with ``sloth_fx.context(model).prediction = "v_prediction"``. The noise level is that of
the moment.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from sloth_fx.checks import Limits, between, check_fields, one_of
from sloth_fx.errors import SlothError
from sloth_fx.model_adapters import ModelAdapter

Kind = Literal["epsilon", "v_prediction", "sample", "flow", "reversed_flow", "edm"]
KINDS = ("epsilon", "v_prediction", "sample", "flow", "reversed_flow", "edm")
DATA_SIGMA: Limits = between(1e-6, 1e6)
ENDLESS = 1e300
"""The sigma of pure noise, in a number that can be worked with."""

_FAINT = 1e-4  # share of the signal below which noise does not tell x0
_NEGATED = ("HiDreamImageTransformer2DModel", "NucleusMoEImageTransformer2DModel")
"""Models that predict x0 - noise though their timesteps are those of noise: their pipelines turn the sign."""


class Level(NamedTuple):
    """The prediction p of a model given x = signal * x0 + ... * noise: x0 = of_input * x + of_prediction * p."""

    signal: float
    of_input: float
    of_prediction: float

    @property
    def shift(self) -> float:
        """How p follows x0 where the noise stays: dp / dx0, with x = signal * x0 + ... * noise."""
        return (1 - self.of_input * self.signal) / self.of_prediction


@dataclass(frozen=True)
class Prediction:
    """What a model predicts, given x at noise level sigma (noise over signal).

    | kind | x | p |
    |---|---|---|
    | "epsilon" | a x0 + b n, a = 1 / sqrt(1 + sigma^2), b = sigma a | n |
    | "v_prediction" | the same | a n - b x0 |
    | "sample" | the same | x0 |
    | "flow" | (1 - s) x0 + s n, s = sigma / (1 + sigma) | n - x0 |
    | "reversed_flow" | the same | x0 - n |
    | "edm" | (x0 + sigma n) / r, r = sqrt(sigma^2 + data_sigma^2) | (r x0 - data_sigma^2 x) / (sigma data_sigma) |

    Of a model whose own timestep rises from noise to image a "flow" is taken for a reversed one.

    Raises SlothError for another kind, and for a data_sigma out of 1e-6..1e6. Source: diffusers' schedulers, and
    Elucidating the Design Space (arXiv 2206.00364), table 1, for the last.
    """

    kind: Kind
    data_sigma: float = field(default=0.5, metadata=DATA_SIGMA)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SlothError(f"prediction={self.kind!r:.80}: {one_of(*KINDS)['accepts'].words}")
        check_fields(self)

    def level(self, sigma: float) -> Level:
        """What is linear at ``sigma``, above 0. SlothError where a prediction of noise says nothing of x0."""
        if self.kind in ("flow", "reversed_flow"):
            share = sigma / (1 + sigma)
            return Level(1 / (1 + sigma), 1.0, -share if self.kind == "flow" else share)
        if self.kind == "edm":
            data, length = self.data_sigma, math.hypot(sigma, self.data_sigma)
            return Level(1 / length, data**2 / length, sigma * data / length)
        signal, noise = 1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma)
        if self.kind == "v_prediction":
            return Level(signal, signal, -noise)
        if self.kind == "sample":
            return Level(signal, 0.0, 1.0)
        if signal < _FAINT:
            raise SlothError(f"a model that predicts noise says nothing of the image at sigma={sigma:g}")
        return Level(signal, 1 / signal, -noise / signal)


def flow_of(model: str, adapter: ModelAdapter) -> Prediction:
    """How the flow of a model by the name of its class runs: with its own time, be that from noise or to it."""
    rises = adapter.final_timestep > adapter.timesteps
    return Prediction("reversed_flow" if rises or model in _NEGATED else "flow")


def sigma_of_flow(progress: float) -> float:
    """The noise level where the model's own timestep has come so far: its share of noise is what is left of it."""
    return (1 - progress) / progress if progress > 0 else ENDLESS
