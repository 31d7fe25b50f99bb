"""Views from a host's layout to the canonical one and back: they move no data, so no bit changes.

An *order* tells for each dimension of the canonical tensor which dimension it is in the host's; ``None`` stands for one
that the host's tensor has not, over which it is broadcast.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

Order = tuple[int | None, ...]
_TRANSPOSE = frozenset({"transpose", "swapaxes", "swapdims", torch.transpose, torch.swapaxes, torch.swapdims})
_PERMUTE = frozenset({"permute", torch.permute})


def to_canonical(node: fx.Node, order: Order) -> fx.Node:
    """``node`` in the canonical layout; new nodes go where the graph inserts."""
    source = canonical_source(node, order)
    if source is not None:
        return source
    present = [dim for dim in order if dim is not None]
    if present != sorted(present):
        node = call(node.graph, "permute", node, *present)
    for at, dim in enumerate(order):
        if dim is None:
            node = call(node.graph, "unsqueeze", node, at)
    return node


def from_canonical(node: fx.Node, order: Order) -> fx.Node:
    """The inverse of :func:`to_canonical`."""
    for at in reversed([at for at, dim in enumerate(order) if dim is None]):
        node = call(node.graph, "squeeze", node, at)
    present = [dim for dim in order if dim is not None]
    if present == sorted(present):
        return node
    return call(node.graph, "permute", node, *(present.index(dim) for dim in range(len(present))))


def canonical_source(node: fx.Node, order: Order) -> fx.Node | None:
    """The tensor of which ``node`` is a transpose, where that tensor is canonical itself."""
    if all(dim == at for at, dim in enumerate(order)):
        return node
    permuted = permutation(node)
    if permuted is None or None in order:
        return None
    source = node.args[0]
    same = all(permuted[dim] == at for at, dim in enumerate(order) if dim is not None)
    return source if same and isinstance(source, fx.Node) else None


def permutation(node: fx.Node) -> list[int] | None:
    """For each dimension of ``node`` the dimension of its source, where it is a transpose."""
    hint = node.meta.get("hint")
    rank = hint.ndim if isinstance(hint, torch.Tensor) else 0
    dims = list(range(rank))
    if node.target is getattr and node.args[1:] == ("mT",):
        return [*dims[:-2], dims[-1], dims[-2]]
    moved: Any = node.args[1:]
    if len(moved) == 1 and isinstance(moved[0], (list, tuple)):
        moved = tuple(moved[0])
    if not moved or not all(type(dim) is int for dim in moved):
        return None
    if node.target in _TRANSPOSE and len(moved) == 2:
        one, two = (dim % rank for dim in moved)
        dims[one], dims[two] = two, one
        return dims
    if node.target in _PERMUTE and len(moved) == rank:
        return [dim % rank for dim in moved]
    return None


def call(graph: fx.Graph, method: str, node: fx.Node, *args: Any) -> fx.Node:
    """A method call as a node, with its hint where ``node`` has one."""
    new = graph.call_method(method, (node, *args))
    if "hint" in node.meta:
        values = fx.node.map_aggregate(args, lambda each: each.meta["hint"] if isinstance(each, fx.Node) else each)
        new.meta["hint"] = getattr(node.meta["hint"], method)(*values)
    return new


def size(node: fx.Node, dim: int) -> fx.Node:
    """The size of a dimension, as a node."""
    return node.graph.call_function(operator.getitem, (node.graph.call_function(getattr, (node, "shape")), dim))
