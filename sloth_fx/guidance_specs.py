"""Specs of guidance in attention: what is wanted less of is said by a negative text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from sloth_fx.checks import Limits, accepting, between, check_fields, one_of, unknown
from sloth_fx.errors import SlothError
from sloth_fx.schedule import Moment
from sloth_fx.spec_base import BaseSpec
from sloth_fx.where import Where

LEVEL = between(0, 1e6)


@dataclass(frozen=True)
class Sigma:
    """A noise level, noise over signal, 0..1e6: another way to say when something ends.

    Raises SlothError out of range.
    """

    level: float = field(metadata=LEVEL)

    def __post_init__(self) -> None:
        check_fields(self)


def _is_moment(value: Any) -> bool:
    return isinstance(value, Sigma) or FRACTION["accepts"].holds(value)


FRACTION: Limits = between(0, 1)
END: Limits = accepting("a number from 0 to 1, or Sigma(level)", _is_moment, range=(0, 1))
TAU: Limits = accepting(
    "a number above 0 (math.inf for no limit)",
    lambda value: isinstance(value, int | float) and not isinstance(value, bool) and value > 0,
    range=(0, math.inf),
)


@dataclass(frozen=True, kw_only=True)
class NAG(BaseSpec):
    """Normalized attention guidance: each image token moves away from what it would read in a negative text.

    With Z+ and Z- what the attention to the text and to the negative text gives (all heads of a token together):

        Z~ = scale * Z+ - (scale - 1) * Z-        R = |Z~| / |Z+|, norms over the channels of a token
        Z^ = min(R, tau) / R * Z~                 Z = alpha * Z^ + (1 - alpha) * Z+

    It acts in cross-attention to text, and on the image tokens of joint attention. The negative text is given with
    `TimestepContext.set_negative`, and `TimestepContext.rows` says which rows of the batch are guided.

    The two that matter:

    scale: 1..100, phi of the paper is scale - 1; 1 changes nothing.
    alpha: how much of the guided result is taken, 0..1; 0 changes nothing.

    The rest:

    tau: how many times longer a token may become, above 0; math.inf for no limit.
    norm: "l1" or "l2".
    start, stop: the part of the run in which it acts, as progress in 0..1: from start on, and before stop (or to the
        end, at 1). stop may be a noise level: Sigma(4.0) acts while sigma is at least 4.
    where: which of the sites (`sloth_fx.where.Where`), None for all.

    Raises SlothError for a value of the wrong type or out of range, and for stop before start. Source: Normalized
    Attention Guidance (arXiv 2505.21179); scale as its authors' code counts it.
    """

    scale: float = field(default=5.0, metadata=between(1, 100))
    tau: float = field(default=2.5, metadata=TAU)
    alpha: float = field(default=0.25, metadata=between(0, 1))
    norm: Literal["l1", "l2"] = field(default="l1", metadata=one_of("l1", "l2"))
    start: float = field(default=0.0, metadata=FRACTION)
    stop: float | Sigma = field(default=1.0, metadata=END)
    where: Where = field(default=None, hash=False)

    def __post_init__(self) -> None:
        if isinstance(self.stop, Mapping):  # as JSON has it
            object.__setattr__(self, "stop", _sigma(self.stop))
        super().__post_init__()
        if not isinstance(self.stop, Sigma) and self.stop < self.start:
            raise SlothError(f"NAG: stop={self.stop} is before start={self.start}")

    @classmethod
    def preset(cls, name: str, *, where: Where = None) -> NAG:
        """The published values for a model, by name; SlothError for one that is not known.

        Source: the paper's table of defaults for "flux", "sd3.5", "sana", "pixart-sigma", "wan2.1", "sdxl",
        "playground" and "sd1.5"; the authors' ComfyUI workflows for the others.
        """
        if name not in PRESETS:
            raise SlothError(f"preset {unknown(name, PRESETS)}")
        return cls(**PRESETS[name], where=where)

    def acts(self, moment: Moment) -> bool:
        """Whether it does anything at a moment. SlothError where it ends by sigma, and the moment has none."""
        if self.scale == 1 or self.alpha == 0 or moment.progress < self.start:
            return False
        if not isinstance(self.stop, Sigma):
            return moment.progress < self.stop or self.stop == 1
        if moment.sigma is None or math.isnan(moment.sigma):
            raise SlothError(f"NAG ends at {self.stop}, and sigma is {moment.sigma} at this moment: give stop=0..1")
        return moment.sigma >= self.stop.level

    @property
    def clocks(self) -> frozenset[str]:
        """What it depends on: "progress", "sigma", both or nothing."""
        by_progress = self.start > 0 or (not isinstance(self.stop, Sigma) and self.stop < 1)
        found = {"progress": by_progress, "sigma": isinstance(self.stop, Sigma)}
        return frozenset(name for name, there in found.items() if there)


def _sigma(data: Mapping[str, Any]) -> Sigma:
    if set(data) != {"level"}:
        raise SlothError(f'NAG: stop={dict(data)!r:.80} is refused: as JSON, a noise level is {{"level": 4.0}}')
    return Sigma(data["level"])


def _preset(phi: float, tau: float, alpha: float) -> Mapping[str, Any]:
    return MappingProxyType({"scale": phi + 1, "tau": tau, "alpha": alpha})


def _workflow(scale: float, tau: float, alpha: float, sigma_end: float) -> Mapping[str, Any]:
    """``sigma_end`` is noise over signal: of flows the workflows say the share of noise, 0.75 for 3, and 0.9 for 9."""
    stop = {"stop": Sigma(sigma_end)} if sigma_end > 0 else {}
    return MappingProxyType({"scale": scale, "tau": tau, "alpha": alpha, **stop})


PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "flux": _preset(4, 2.5, 0.25),
        "sd3.5": _preset(4, 2.5, 0.125),
        "sana": _preset(4, 2.5, 0.375),
        "pixart-sigma": _preset(4, 2.5, 0.375),
        "wan2.1": _preset(4, 2.5, 0.25),
        "sdxl": _preset(2, 2.5, 0.5),
        "playground": _preset(2, 2.5, 0.5),
        "sd1.5": _preset(2, 2.5, 0.375),
        "chroma": _workflow(5, 2.5, 0.25, 3),
        "flux-kontext": _workflow(3, 2.5, 0.25, 3),
        "sd3.5-turbo": _workflow(5, 2.5, 0.25, 3),
        "sdxl-dmd2": _workflow(3, 2.5, 0.5, 4),
        "hunyuan-video": _workflow(9, 2.5, 0.12, 9),
        "wan-4-steps": _workflow(11, 3.5, 0.5, 3),
    }
)
