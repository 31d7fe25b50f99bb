"""Which nodes of a graph do more than compute their result."""

from __future__ import annotations

import operator

from torch import fx

_IN_PLACE = frozenset(
    getattr(operator, name)
    for name in ("setitem", "iadd", "isub", "imul", "itruediv", "imatmul", "iand", "ior", "ixor")
) | {setattr}


def has_effect(node: fx.Node) -> bool:
    """What dead-code elimination must keep; a child may do more than compute, so its call always stays."""
    return node.op in ("placeholder", "output", "call_module") or writes(node)


def writes(node: fx.Node) -> bool:
    """Whether ``node`` writes into a tensor or an object that it is given."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.target in _IN_PLACE or (name.endswith("_") and name[-2:] != "__") or "out" in node.kwargs
