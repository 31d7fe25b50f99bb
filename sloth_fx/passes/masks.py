"""Masks: how hosts apply one to their scores, and how a core does."""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from sloth_fx.passes.explicit import ExplicitAttention
from sloth_fx.passes.products import dimensions

_ADD = (operator.add, operator.iadd, torch.add, "add", "add_", "__add__", "__iadd__")
_FILL = (torch.masked_fill, "masked_fill", "masked_fill_")


@dataclass(frozen=True)
class Mask:
    """``node`` of the chain applies ``mask`` to ``scores``.

    ``kind``: it is added, or its True means "attend", or "do not attend". ``scores`` is ``None`` where the scores are
    made by that very node (``baddbmm``).
    """

    node: fx.Node
    scores: fx.Node | None
    mask: fx.Node
    kind: Literal["added", "attend", "ignore"]


def masks_of(attention: ExplicitAttention) -> list[Mask]:
    """The masks of an attention, in order."""
    found = []
    if attention.scores.added is not None and attention.scores.node in attention.unmoved:
        found.append(Mask(attention.scores.node, None, attention.scores.added, "added"))
    before = attention.chain[: attention.chain.index(attention.softmax)]
    for scores, node in itertools.pairwise(before):
        mask = _applied(node, scores)
        if mask is not None and node in attention.unmoved and _has_tokens(mask.mask, attention):
            found.append(mask)
    return found


def _applied(node: fx.Node, scores: fx.Node) -> Mask | None:
    args: list[Any] = [*node.args, *(node.kwargs[name] for name in ("other", "mask") if name in node.kwargs)]
    if node.target in _ADD and len(args) == 2 and not node.kwargs.get("alpha"):
        other = args[0] if args[1] is scores else args[1]
        return Mask(node, scores, other, "added") if dimensions(other) else None
    if node.target in _FILL and args[0] is scores:
        return Mask(node, scores, args[1], "ignore") if dimensions(args[1]) else None
    if node.target is torch.where and len(args) == 3 and dimensions(args[0]):
        return Mask(node, scores, args[0], "attend" if args[1] is scores else "ignore")
    return None


def _has_tokens(mask: fx.Node, attention: ExplicitAttention) -> bool:
    """Whether ``mask`` differs from key to key or from query to query: else it is a number by head."""
    shape = mask.meta["hint"].shape
    rank = len(attention.scores_order)
    return any(len(shape) >= rank - at and shape[at - rank] > 1 for at in attention.scores_order[-2:] if at is not None)


def in_host_layout(mask: Tensor, order: tuple[int, ...]) -> Tensor:
    """A mask over (..., N, M) as one over the host's scores; ``order`` is that of these."""
    mask = mask[(None,) * (len(order) - mask.ndim)]
    return mask.permute([order.index(dim) for dim in range(len(order))])


def with_mask(scores: Tensor, mask: Tensor) -> Tensor:
    """``scores`` with a mask as :class:`~sloth_fx.passes.core.AttentionCore` has it."""
    if mask.dtype is torch.bool:
        return scores.masked_fill(~mask, -torch.inf)
    return scores + mask.to(scores.dtype)
