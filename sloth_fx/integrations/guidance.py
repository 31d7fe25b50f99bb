"""How a pipeline stacks conditionings in a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_STACKED = (2, 3)  # without and with text; a third of a perturbed run, or of an image without its text


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
