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

_SOFTMAX = (torch.softmax, torch.special.softmax, F.softmax, "softmax")
_LEADING = frozenset({"view", "reshape", "flatten", "unflatten", torch.reshape, torch.flatten, torch.unflatten})
_TRIVIAL = (nn.Dropout, nn.Identity)
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
    tells that the attention map is used elsewhere as well.
    """

    softmax: fx.Node
    scores: Product
    output: Product
    chain: tuple[fx.Node, ...]
    query: Operand
    key: Operand
    value: Operand
    scores_order: tuple[int | None, ...]
    output_order: tuple[int | None, ...]
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
    scores, output = product(before[0]), product(after[-1])
    assert scores is not None
    assert output is not None
    rank, keys_at = dimensions(softmax), _softmax_dim(softmax)
    if keys_at is None or rank < 3:
        return None
    keys_at %= rank
    from_end = keys_at - rank  # the queries and keys keep their place where leading dimensions are regrouped
    probs, value = (output.left, output.right) if output.left is after[-2] else (output.right, output.left)
    probs_letters, value_letters = _letters(output, probs)
    regrouped = len(scores.out) != rank or len(probs_letters) != rank
    if regrouped and from_end != -1:
        return None

    key_letter = scores.out[from_end]
    sides = scores.side(key_letter)
    if sides is None:
        return None
    key, key_letters, query, query_letters = sides
    queries = [each for each in scores.out if each in query_letters and each not in key_letters]
    channels = [each for each in query_letters if each in key_letters and each not in scores.out]
    if not queries or len(channels) != 1:
        return None
    query_letter = queries[-1]
    queries_at = scores.out.index(query_letter) - len(scores.out)
    if regrouped and queries_at != -2:
        return None
    batch = [each for each in scores.out if each not in (query_letter, key_letter)]

    value_channels = [each for each in value_letters if each in output.out and each not in probs_letters]
    summed, kept = probs_letters[from_end], probs_letters[queries_at]
    if len(value_channels) != 1 or summed in output.out or summed not in value_letters or kept in value_letters:
        return None
    batch_after = [each for each in probs_letters if each not in (summed, kept)]
    if len(batch_after) != len(batch) or any(each not in output.out for each in (kept, *batch_after)):
        return None
    chain = (*before, *after)
    return ExplicitAttention(
        softmax=softmax,
        scores=scores,
        output=output,
        chain=chain,
        query=Operand(query, _order([*batch, query_letter, *channels], query_letters)),
        key=Operand(key, _order([*batch, key_letter, *channels], key_letters)),
        value=Operand(value, _order([*batch_after, summed, *value_channels], value_letters)),
        scores_order=_order([*batch, query_letter, key_letter], scores.out),
        output_order=_order([*batch_after, kept, *value_channels], output.out),
        shared=any(len(node.users) > 1 and not _only_in(node, chain) for node in chain[:-1]),
    )


def _letters(output: Product, probs: fx.Node) -> tuple[str, str]:
    """The letters of the probabilities and of the values."""
    letters = output.left_letters, output.right_letters
    return letters if output.left is probs else letters[::-1]


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
    """Whether ``node`` works on each score of ``parent`` alone, or at most regroups leading dimensions."""
    if node.op == "call_module":
        return isinstance(node.meta.get("module"), _TRIVIAL)
    if node.op not in ("call_function", "call_method"):
        return False
    before, after = parent.meta.get("hint"), node.meta.get("hint")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    if before.shape == after.shape:
        return True
    return node.target in _LEADING and before.ndim > 2 and before.shape[-2:] == after.shape[-2:]
