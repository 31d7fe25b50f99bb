"""How a pipeline stacks conditionings in a batch, and with which scale it guides."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor, nn

from sloth_fx.errors import SlothError

_STACKED = (2, 3)  # without and with text; a third of a perturbed run, or of an image without its text
_FROM_CONDITIONAL = ("CosmosTextToWorld", "CosmosVideoToWorld", "Cosmos2", "Krea2")
"""How the names of pipelines begin whose result is c + w (c - u): their scale is one less than others'. Those that
stack their conditionings are not here, since nothing is divided there."""
_LEAVE_OUT = ("Lumina2",)
"""Those that take c alone in some of the steps of a run that is guided, and do not say in which."""


def guidance_scale_of(pipe: Any, model: nn.Module, given: float | None) -> float | None:
    """The scale of the classifier-free guidance that takes what ``model`` returns for one text, as far as ``pipe``
    tells, or else what is ``given``; ``None`` for none. It is w of u + w (c - u), however the pipeline counts.

    Raises :class:`SlothError` for a scale that is no single number, and where it is not one for the whole run.
    """
    guides = getattr(pipe, "do_classifier_free_guidance", None)
    if guides is not True:
        return None if guides is False else given
    name = type(pipe).__name__
    if _is_one_of(pipe, _LEAVE_OUT) and given is None:
        raise SlothError(
            f"{name} may leave out its unconditional calls in some of the steps (cfg_trunc_ratio), and does not say in "
            "which: if it is called without that, attach with guidance_scale=..., that of its classifier-free guidance"
        )
    second = getattr(pipe, "transformer_2", None)
    second = getattr(second, "_orig_mod", second)  # of one that was compiled
    told = getattr(pipe, "_guidance_scale_2", None) if second is model else None
    told = getattr(pipe, "guidance_scale", None) if told is None else told
    scale = given if told is None else told
    if isinstance(scale, numbers.Real) and 0 < float(scale) < math.inf:
        return float(scale) + (told is not None and _is_one_of(pipe, _FROM_CONDITIONAL))
    raise SlothError(f"{name} guides with scale {scale!r:.80}: a number above 0 is needed to divide by")


def _is_one_of(pipe: Any, prefixes: tuple[str, ...]) -> bool:
    return any(base.__name__.startswith(prefixes) for base in type(pipe).__mro__)


class GroupCounter:
    """Counts the groups of conditioning in the batches of a run.

    A pipeline that stacks them gives the model the same latents once for each, so the batch itself tells. That is read
    from the device once for each run and size of batch, and never while the pipeline says that it does not guide.
    """

    def __init__(self, axes: str | None) -> None:
        self._axes = axes
        self._known: dict[int, int] = {}
        self._run: Any = None

    def count(self, pipe: Any, latent: Any, run: int) -> int:
        """Groups in the batch of ``latent``, 1 or more; ``run`` tells runs apart."""
        if getattr(pipe, "do_classifier_free_guidance", None) is False and not _perturbs(pipe):
            return 1
        if not isinstance(latent, Tensor) or latent.ndim < 3 or latent.device.type == "meta":
            return 1
        if run != self._run:
            self._run, self._known = run, {}
        batch = len(latent)
        if batch not in self._known:
            self._known[batch] = next((groups for groups in _STACKED if self._repeats(latent, groups)), 1)
        return self._known[batch]

    def _repeats(self, latent: Tensor, groups: int) -> bool:
        """Whether the batch is ``groups`` times the same. What lies behind the first channel may be an image or a mask,
        which one of the groups lacks."""
        if len(latent) % groups:
            return False
        axes = self._axes or ""
        channels = axes.index("c") if len(axes) == latent.ndim and "c" in axes else 1 if latent.ndim > 3 else 2
        first, *others = latent.detach().select(channels, 0).chunk(groups)
        return all(torch.equal(first, other) for other in others)


def _perturbs(pipe: Any) -> bool:
    return getattr(pipe, "do_perturbed_attention_guidance", None) is True
