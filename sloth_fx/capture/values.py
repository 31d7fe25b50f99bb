"""What a node of a graph evaluates to, as far as that follows from the arguments that have values.

Hosts steer by lengths and masks: ``grid_sizes.tolist()``, ``if mask.all()``. Arguments that are whole numbers keep
their values in a capture (see :meth:`sloth_fx.capture.Skeleton.fake_inputs`), everything else has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from sloth_fx.capture.effects import writes

_LARGEST = 2**20  # elements of a tensor that is computed
_SHAPED = (bool, int, float, str, torch.Size, torch.dtype, torch.device)


def value_of(node: fx.Node) -> tuple[Any, set[fx.Node]]:
    """The value of ``node``, and the placeholders that it was computed from.

    Raises NotImplementedError where it depends on tensors that have no values.
    """
    needed = _needed(node)
    known: dict[fx.Node, Any] = {}
    with torch._C.DisableTorchFunction(), torch.no_grad():
        for each in node.graph.nodes:
            if each in needed:
                known[each] = _value(each, known)
    return known[node], {each for each in needed if each.op == "placeholder"}


def _value(node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    if _is_shape(node):
        return node.meta["hint"]
    if node.op == "placeholder" and "value" in node.meta:
        return node.meta["value"].clone()  # the host may write into it
    hint = node.meta["hint"]
    small = not isinstance(hint, torch.Tensor) or hint.numel() <= _LARGEST
    if node.op not in ("call_function", "call_method") or not small:
        raise NotImplementedError("what its forward does depends on the data in its inputs")
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _needed(node: fx.Node) -> set[fx.Node]:
    """``node``, all that its value is computed from, and what writes into any of that."""
    writing = [(each, set(_bases(each))) for each in node.graph.nodes if writes(each)]
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        each = waiting.pop()
        if each in found:
            continue
        found.add(each)
        if not _is_shape(each):
            waiting.extend(each.all_input_nodes)
            waiting.extend(writer for writer, bases in writing if each in bases)
    return found


def _is_shape(node: fx.Node) -> bool:
    """Whether the hint of ``node`` is its value: sizes and types are known without data."""
    return isinstance(node.meta["hint"], _SHAPED) and not any("depends_on_data" in each.meta for each in behind(node))


def _bases(node: fx.Node) -> Iterator[fx.Node]:
    """The tensor that ``node`` writes into, and all of which that may be a view."""
    base = node.args[0] if node.args else None
    while isinstance(base, fx.Node):
        yield base
        base = base.args[0] if base.op in ("call_function", "call_method") and base.args else None


def behind(node: fx.Node) -> list[fx.Node]:
    """``node`` and all that it was computed from, in a fixed order."""
    found, waiting = {node: None}, [node]
    while waiting:
        unseen = [parent for parent in waiting.pop().all_input_nodes if parent not in found]
        found.update(dict.fromkeys(unseen))
        waiting.extend(unseen)
    return list(found)
