"""Find attention that is spelled out: a softmax between two products.

    scores = query @ key.transpose(-1, -2) * scale + mask
    out = scores.softmax(dim=-1) @ value

Which tensor is which follows from the dimensions alone, so that keys may come first, heads last, or both be folded: the
dimension that the softmax runs over is that of the keys, the one that they share with the queries is the channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from sloth_fx.passes.products import Product, dimensions, product
from sloth_fx.passes.views import permutation

_SOFTMAX = (torch.softmax, torch.special.softmax, F.softmax, "softmax")
_LEADING = frozenset({"view", "reshape", "flatten", "unflatten", torch.reshape, torch.flatten, torch.unflatten})
_TRIVIAL = (nn.Dropout, nn.Identity)
Layout = list[int | None]
_LONGEST = 24  # operations between a product and the softmax


@dataclass(frozen=True)
class Operand:
    """A factor of a product: its node, and for each dimension of the canonical tensor the dimension it is there.

    ``None`` stands for a dimension that the node has not: it is broadcast.
    """

    node: fx.Node
    order: tuple[int | None, ...]


@dataclass(frozen=True)
class ExplicitAttention:
    """The nodes of one attention.

    ``chain`` runs from the product that gives the scores to that which gives the output, ``softmax`` among them.
    ``scores_order`` and ``output_order`` are to scores and output what an :class:`Operand`'s order is to it. ``shared``
    tells that the attention map is used elsewhere as well. ``layouts`` has, for each node of the chain before the
    softmax, which dimension of the softmax each of its dimensions is (``None``: one of those that were regrouped).
    """

    softmax: fx.Node
    scores: Product
    output: Product
    chain: tuple[fx.Node, ...]
    query: Operand
    key: Operand
    value: Operand
    scores_order: tuple[int, ...]
    output_order: tuple[int, ...]
    layouts: dict[fx.Node, Layout]
    shared: bool


def explicit_attention(graph: fx.Graph) -> list[ExplicitAttention]:
    """Every attention of ``graph`` that is spelled out, in order."""
    found = (_around(node) for node in graph.nodes if is_softmax(node))
    return [each for each in found if each is not None]


def is_softmax(node: fx.Node) -> bool:
    return node.target in _SOFTMAX or type(node.meta.get("module")) is nn.Softmax


def _around(softmax: fx.Node) -> ExplicitAttention | None:
    before = _up(softmax.args[0], _LONGEST) if softmax.args else None
    after = _down(softmax, _LONGEST)
    if before is None or after is None:
        return None
    scores, output, keys_at = product(before[0]), product(after[-1]), _softmax_dim(softmax)
    if scores is None or output is None or keys_at is None:
        return None
    layouts = _layouts(before, after[:-1])
    probs = after[-2]
    if output.left is output.right:
        return None
    of_scores, of_probs = layouts[before[0]], layouts[probs]
    keys_at %= dimensions(softmax)
    if keys_at not in of_scores or keys_at not in of_probs:
        return None

    key_letter = scores.out[of_scores.index(keys_at)]
    sides = scores.side(key_letter)
    if sides is None:
        return None
    key, key_letters, query, query_letters = sides
    queries = [each for each in scores.out if each in query_letters and each not in key_letters]
    channels = [each for each in query_letters if each in key_letters and each not in scores.out]
    if not queries or len(channels) != 1:
        return None
    query_letter = queries[-1]
    queries_at = of_scores[scores.out.index(query_letter)]
    if queries_at is None or queries_at not in of_probs:
        return None
    batch = _batch(scores.out, of_scores, (queries_at, keys_at))

    probs_letters, value_letters = output.left_letters, output.right_letters
    value = output.right
    if output.right is probs:
        probs_letters, value_letters, value = value_letters, probs_letters, output.left
    summed, kept = (probs_letters[of_probs.index(at)] for at in (keys_at, queries_at))
    value_channels = [each for each in value_letters if each in output.out and each not in probs_letters]
    batch_after = _batch(probs_letters, of_probs, (queries_at, keys_at))
    if len(value_channels) != 1 or summed in output.out or summed not in value_letters or kept in value_letters:
        return None
    if len(batch_after) != len(batch) or any(each not in output.out for each in (kept, *batch_after)):
        return None
    chain = (*before, *after)
    rank = dimensions(softmax)
    return ExplicitAttention(
        softmax=softmax,
        scores=scores,
        output=output,
        chain=chain,
        query=Operand(query, _order([*batch, query_letter, *channels], query_letters)),
        key=Operand(key, _order([*batch, key_letter, *channels], key_letters)),
        value=Operand(value, _order([*batch_after, summed, *value_channels], value_letters)),
        scores_order=(*(at for at in range(rank) if at not in (queries_at, keys_at)), queries_at, keys_at),
        output_order=tuple(output.out.index(each) for each in (*batch_after, kept, *value_channels)),
        layouts={node: layouts[node] for node in before},
        shared=any(len(node.users) > 1 and not _only_in(node, chain) for node in chain[:-1]),
    )


def _batch(letters: str, layout: Layout, tokens: tuple[int, int]) -> list[str]:
    """The letters of samples and heads, in the order that their dimensions have at the softmax."""
    batch = [(at, index) for index, at in enumerate(layout) if at not in tokens]
    known = sorted(batch) if all(at is not None for at, _ in batch) else batch
    return [letters[index] for _, index in known]


def _layouts(before: tuple[fx.Node, ...], after: tuple[fx.Node, ...]) -> dict[fx.Node, Layout]:
    """For each node of the chain but the last, which dimension of the softmax each of its dimensions is.

    ``None`` stands for leading dimensions that were regrouped.
    """
    softmax = after[0]
    layout: Layout = list(range(dimensions(softmax)))
    found: dict[fx.Node, Layout] = {softmax: layout}
    for node in after[1:]:
        permuted = permutation(node)
        layout = [layout[dim] for dim in permuted] if permuted is not None else _regrouped(layout, dimensions(node))
        found[node] = layout
    layout = found[softmax]
    for parent, node in zip(reversed(before), (softmax, *reversed(before[1:])), strict=True):
        permuted = permutation(node)
        if permuted is not None:
            layout = [layout[permuted.index(dim)] for dim in range(len(permuted))]
        else:
            layout = _regrouped(layout, dimensions(parent))
        found[parent] = layout
    return found


def _regrouped(layout: Layout, rank: int) -> Layout:
    return layout if len(layout) == rank else [*[None] * (rank - 2), *layout[-2:]]


def _order(letters: list[str], there: str) -> tuple[int | None, ...]:
    return tuple(there.index(letter) if letter in there else None for letter in letters)


def _only_in(node: fx.Node, chain: tuple[fx.Node, ...]) -> bool:
    """Whether all that ``node`` is used for ends in the chain (a maximum that is subtracted, say)."""
    return all(user in chain or (user.users and _only_in(user, chain)) for user in node.users)


def _softmax_dim(node: fx.Node) -> int | None:
    dim = node.meta["module"].dim if node.op == "call_module" else node.kwargs.get("dim", node.args[1:2] or None)
    dim = dim[0] if isinstance(dim, tuple) else dim
    return dim if isinstance(dim, int) else None


def _up(node: Any, left: int) -> tuple[fx.Node, ...] | None:
    """The nodes from the product that gives the scores to ``node``."""
    if not isinstance(node, fx.Node) or not left or not dimensions(node) or is_softmax(node):
        return None
    if product(node) is not None:
        return (node,)
    for parent in node.all_input_nodes:
        path = _up(parent, left - 1) if _keeps_tokens(parent, node) else None
        if path is not None:
            return (*path, node)
    return None


def _down(node: fx.Node, left: int) -> tuple[fx.Node, ...] | None:
    """The nodes from ``node`` to the product with the values."""
    for user in node.users if left else ():
        after = product(user)
        if after is not None and after.added is None and (node is after.left) != (node is after.right):
            return (node, user)
        path = _down(user, left - 1) if _keeps_tokens(node, user) and not is_softmax(user) else None
        if path is not None:
            return (node, *path)
    return None


def _keeps_tokens(parent: fx.Node, node: fx.Node) -> bool:
    """Whether ``node`` works on each score of ``parent`` alone, or moves or regroups dimensions."""
    if node.op == "call_module":
        return isinstance(node.meta.get("module"), _TRIVIAL)
    if node.op not in ("call_function", "call_method"):
        return False
    before, after = parent.meta.get("hint"), node.meta.get("hint")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    if before.shape == after.shape or (permutation(node) is not None and node.args[0] is parent):
        return True
    return regroups(node) and before.ndim > 2 and before.shape[-2:] == after.shape[-2:]


def regroups(node: fx.Node) -> bool:
    """Whether ``node`` gives a tensor other dimensions, and leaves its numbers in their order."""
    return node.target in _LEADING
