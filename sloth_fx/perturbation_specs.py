"""Specs of guidance by perturbed attention: what a denoiser finds with its attention spoilt is steered away from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from sloth_fx.checks import Limits, accepting, between
from sloth_fx.errors import SlothError
from sloth_fx.schedule import Moment
from sloth_fx.spec_base import BaseSpec
from sloth_fx.where import Where

if TYPE_CHECKING:
    from torch import Tensor

SCALE: Limits = between(0, 100)
FRACTION: Limits = between(0, 1)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


SIGMA: Limits = accepting(
    "a number from 0 (math.inf for the mean of all)", lambda value: _is_number(value) and value >= 0
)


def _is_layer(value: Any) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return whole or (isinstance(value, str) and bool(value))


LAYERS: Limits = accepting(
    "one or more blocks, each a number from 0 or a path such as 'transformer_blocks.7'",
    lambda value: isinstance(value, tuple) and bool(value) and all(map(_is_layer, value)),
)


@dataclass(frozen=True, kw_only=True)
class PerturbationSpec(BaseSpec):
    """What all of them have in common; with s = :meth:`scale_at` a moment, p what the model predicts, p' what it
    predicts with its attention perturbed:

        guided = p + s * (p - p')                 of the rows of the batch that are "cond"
        result = guided * (rescale * std(p) / std(guided) + 1 - rescale)        std over all but the batch

    What that adds, d = result - p, is added to the other rows of the batch as well (docs/perturbation.md).

    scale: 0..100; 0 changes nothing, and costs nothing.
    start, stop: the part of the run in which it acts, as progress in 0..1 (:meth:`sloth_fx.Moment.within`).
    rescale: 0..1, how far the result is brought back to the deviation of p.
    where: which of the sites (`sloth_fx.where.Where`), None for all.

    Raises SlothError for a value of the wrong type or out of range, and for stop before start.
    """

    scale: float = field(default=3.0, metadata=SCALE)
    start: float = field(default=0.0, metadata=FRACTION)
    stop: float = field(default=1.0, metadata=FRACTION)
    rescale: float = field(default=0.0, metadata=FRACTION)
    where: Where = field(default="middle", hash=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stop < self.start:
            raise SlothError(f"{type(self).__name__}: stop={self.stop} is before start={self.start}")

    def scale_at(self, moment: Moment) -> float:
        """s at a moment, 0 where it does not act."""
        return self.scale if moment.within(self.start, self.stop) else 0.0

    def acts(self, moment: Moment) -> bool:
        """Whether it does anything at a moment."""
        return self.scale_at(moment) > 0

    @property
    def clocks(self) -> frozenset[str]:
        """What it depends on: "progress", or nothing."""
        return frozenset({"progress"} if self.start > 0 or self.stop < 1 else ())


@dataclass(frozen=True, kw_only=True)
class PAG(PerturbationSpec):
    """Perturbed-attention guidance: at the sites, each image token reads itself alone, so attention gives its value.

    In joint attention it reads itself and the text; text reads everything.

    scale: 0..100, with or without classifier-free guidance; adaptive: how fast it falls, 0..1: at progress u it is
    max(0, scale - adaptive * 1000 * u). start, stop, rescale, where: as in :class:`PerturbationSpec`.

    Source: Perturbed-Attention Guidance (arXiv 2403.17377), and the adaptive law of diffusers' `pag_adaptive_scale`.
    """

    adaptive: float = field(default=0.0, metadata=FRACTION)

    def scale_at(self, moment: Moment) -> float:
        """s at a moment, 0 where it does not act."""
        return max(0.0, super().scale_at(moment) - self.adaptive * 1000 * moment.progress)

    @property
    def clocks(self) -> frozenset[str]:
        """What it depends on: "progress", or nothing."""
        return super().clocks | frozenset({"progress"} if self.adaptive > 0 else ())


@dataclass(frozen=True, kw_only=True)
class SEG(PerturbationSpec):
    """Smoothed-energy guidance: at the sites, queries are blurred over their grid, rows and columns.

    blur_sigma: standard deviation of the Gaussian in tokens of the site, from 0 (which changes nothing); math.inf gives
    each query the mean of all of its frame. scale, start, stop, rescale, where: as in :class:`PerturbationSpec`.

    Source: Smoothed Energy Guidance (arXiv 2408.00760); kernel of ceil(6 sigma) made odd, as its authors' code has it.
    """

    blur_sigma: float = field(default=math.inf, metadata=SIGMA)

    def scale_at(self, moment: Moment) -> float:
        """s at a moment, 0 where it does not act."""
        return super().scale_at(moment) if self.blur_sigma > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class TPG(PerturbationSpec):
    """Token perturbation guidance: at the sites, image tokens leave attention in another order.

    seed: of the permutations, whole; each site and moment has another one. scale, start, stop, rescale, where: as in
    :class:`PerturbationSpec`.

    Source: Token Perturbation Guidance (arXiv 2506.10036), whose authors shuffle what enters a block, residual and all.
    """

    seed: int = field(default=0, metadata=between(0, 2**31 - 1, whole=True))
    where: Where = field(default="in", hash=False)


@dataclass(frozen=True, kw_only=True)
class SLG(PerturbationSpec):
    """Skip-layer guidance: the perturbed prediction is that of the model without some of its blocks.

    layers: which blocks, by their numbers in the order in which they run, from 0, or by their paths. A block is the
    innermost module of a list that holds one of the sites that `where` selects; None is all sites. scale, start, stop,
    rescale: as in :class:`PerturbationSpec`.

    Source: Stable Diffusion 3.5's skip-layer guidance, with diffusers' values.
    """

    layers: tuple[int | str, ...] = field(metadata=LAYERS)
    scale: float = field(default=2.8, metadata=SCALE)
    start: float = field(default=0.01, metadata=FRACTION)
    stop: float = field(default=0.2, metadata=FRACTION)
    where: Where = field(default=None, hash=False)


Change: TypeAlias = "Callable[[Tensor, Tensor, Tensor], Tensor | tuple[Tensor, Tensor, Tensor]]"


@dataclass(frozen=True, kw_only=True)
class Perturb(PerturbationSpec):
    """Guidance by an attention of your own.

    fn: gets query, key and value (B, H, N, D) of a site, and returns the result of attention, shaped as it would be, or
    a changed (query, key, value) for the host's own attention. Where it is compiled, it has to be without side effects.
    scale, start, stop, rescale, where: as in :class:`PerturbationSpec`.
    """

    fn: Change = field(kw_only=False, metadata=accepting("a function of query, key and value", callable))

    def to_dict(self) -> dict[str, Any]:
        """Raises SlothError: a function has no JSON form."""
        raise SlothError(f"Perturb: fn={self.fn!r:.80} has no JSON form, being a function: PAG, SEG, TPG and SLG have")


@dataclass(frozen=True, kw_only=True)
class SAG(PerturbationSpec):
    """Self-attention guidance: what the image most attends to is blurred in x0, and the model asked again.

    A is the first site that `where` selects. With m = the columns of A's map (B, keys), each the mean over heads of the
    sum over queries, so 1 on average, brought to the size of the latent (nearest), M = m > threshold; x0 and noise as
    the model predicts them, and (alpha, sigma) of the moment:

        x0' = M * blur(x0) + (1 - M) * x0         x' = alpha * x0' + sigma * noise

    The perturbed prediction is that of x', turned into the noise that it means for x'; with eps(p) the noise of p,
    guided = p moved so that eps(guided) = eps(p) + s * (eps(p) - eps'(p')), whatever the model predicts.

    blur_sigma: of the Gaussian, in pixels of the latent, from 0 (which changes nothing). threshold: from 0; 1 is the
    average. scale, start, stop, rescale, where: as in :class:`PerturbationSpec`.

    Source: Self-Attention Guidance (arXiv 2210.00939), eq. 9 to 12; defaults as diffusers has them.
    """

    scale: float = field(default=0.75, metadata=SCALE)
    blur_sigma: float = field(default=1.0, metadata=SIGMA)
    threshold: float = field(default=1.0, metadata=between(0, 1e6))

    def scale_at(self, moment: Moment) -> float:
        """s at a moment, 0 where it does not act."""
        return super().scale_at(moment) if self.blur_sigma > 0 else 0.0
