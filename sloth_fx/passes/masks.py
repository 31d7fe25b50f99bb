"""Masks: how hosts apply one to their scores, and how a core does."""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx

from sloth_fx.passes.explicit import ExplicitAttention, regroups
from sloth_fx.passes.products import dimensions
from sloth_fx.passes.views import permutation
from sloth_fx.passes.walk import name_of

_ADD = (operator.add, operator.iadd, torch.add, "add", "add_", "__add__", "__iadd__")
_FILL = (torch.masked_fill, "masked_fill", "masked_fill_")
_SCALE = (operator.mul, operator.imul, operator.truediv, operator.itruediv, torch.mul, torch.div)
_SUBTRACT = (operator.sub, operator.isub, torch.sub, "sub", "sub_")
_CAST = ("to", "type", "type_as", "float", "half", "bfloat16", "double", "contiguous", "clone")
_LINEAR = frozenset({*_ADD, *_SUBTRACT, *_SCALE, "mul", "mul_", "div", "div_", *_CAST})


@dataclass(frozen=True)
class Mask:
    """``node`` of the chain applies ``mask`` to ``scores``.

    ``kind``: it is added, or its True means "attend", or "do not attend". ``scores`` is ``None`` where the scores are
    made by that very node (``baddbmm``). ``moved`` tells that the softmax has other dimensions than ``node``.
    """

    node: fx.Node
    scores: fx.Node | None
    mask: fx.Node
    kind: Literal["added", "attend", "ignore"]
    moved: bool = False


def masks_of(attention: ExplicitAttention) -> list[Mask]:
    """The masks of an attention, in order."""
    added = attention.scores.added
    found = [Mask(attention.scores.node, None, added, "added")] if added is not None else []
    before = attention.chain[: attention.chain.index(attention.softmax)]
    applied = (_applied(node, scores) for scores, node in itertools.pairwise(before))
    found += [mask for mask in applied if mask is not None and _has_tokens(mask, attention)]
    unmoved = list(range(len(attention.scores_order)))
    return [replace(mask, moved=attention.layouts[mask.node] != unmoved) for mask in found]


def one_as_it_is(masks: list[Mask]) -> Mask | None:
    """The only mask, if it is over the softmax's dimensions: then it needs no sum."""
    return masks[0] if len(masks) == 1 and not masks[0].moved else None


def refusal_of_masks(masks: list[Mask], attention: ExplicitAttention) -> str | None:
    """Why the masks of an attention cannot be one mask of its core, if so."""
    if masks and dimensions(attention.softmax) != dimensions(attention.scores.node):
        return "it is masked where its scores have other dimensions than they are made with"
    if not masks or one_as_it_is(masks) is not None:
        return None
    after = attention.chain[attention.chain.index(masks[0].node) + 1 : attention.chain.index(attention.softmax)]
    applied = [mask.node for mask in masks]
    for node in after:  # what is added may go through it
        linear = node.target in _LINEAR or regroups(node) or permutation(node) is not None
        if node not in applied and not linear:
            return f"it applies {len(masks)} masks, and {name_of(node)} in between"
    return None


def no_scores(left: Tensor, right: Tensor, letters: tuple[str, str, str]) -> Tensor:
    """Zeros in the shape of a product; ``letters`` name the dimensions of its factors and its own."""
    sizes: dict[str, int] = {}
    for tensor, names in zip((left, right), letters, strict=False):
        for name, size in zip(names, tensor.shape, strict=True):
            sizes[name] = max(size, sizes.get(name, 1))  # one of the two may be broadcast
    return left.new_zeros([sizes[name] for name in letters[2]])


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


def _has_tokens(mask: Mask, attention: ExplicitAttention) -> bool:
    """Whether ``mask`` differs from key to key or from query to query: else it is a number by head."""
    shape, layout, tokens = mask.mask.meta["hint"].shape, attention.layouts[mask.node], attention.scores_order[-2:]
    rank = len(layout)
    at_tokens = [at - rank for at, dim in enumerate(layout) if dim in tokens]
    return any(len(shape) >= -at and shape[at] > 1 for at in at_tokens)


def in_host_layout(mask: Tensor, order: tuple[int, ...]) -> Tensor:
    """A mask over (..., N, M) as one over the host's scores; ``order`` is that of these."""
    mask = mask[(None,) * (len(order) - mask.ndim)]
    return mask.permute([order.index(dim) for dim in range(len(order))])


def with_mask(scores: Tensor, mask: Tensor) -> Tensor:
    """``scores`` with a mask as :class:`~sloth_fx.passes.core.AttentionCore` has it."""
    if mask.dtype is torch.bool:
        return scores.masked_fill(~mask, -torch.inf)
    return scores + mask.to(scores.dtype)


def without_blind(probs: Tensor, scores: Tensor, keys_at: int) -> Tensor:
    """The softmax ``probs`` of ``scores`` over dimension ``keys_at``, with zeros for queries that see no key."""
    blind = (scores == -torch.inf).all(keys_at, keepdim=True)
    return probs.masked_fill(blind, 0.0)
