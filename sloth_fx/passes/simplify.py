"""Take out arithmetic that changes nothing.

    out = self.to_out(x)
    return out / 1.0        ->      return self.to_out(x)

Hosts divide every attention's result by a factor that nearly always is one: a pass over memory for nothing.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from sloth_fx.capture.recorder import writes

_BY_ONE = (operator.truediv, operator.mul)


def simplify(graph: fx.Graph) -> bool:
    """Remove divisions and multiplications of a floating-point tensor by one. Returns whether there were any.

    Nothing is removed from a graph that writes into tensors, where the result being a tensor of its own may matter.
    """
    if any(writes(node) for node in graph.nodes):
        return False
    found = [node for node in graph.nodes if _is_identity(node)]
    for node in found:
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
    graph.lint()
    return bool(found)


def _is_identity(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target not in _BY_ONE or not isinstance(node.args[0], fx.Node):
        return False
    hint, factor = node.args[0].meta.get("hint"), node.args[1]
    return (
        isinstance(hint, torch.Tensor) and hint.is_floating_point() and isinstance(factor, (int, float)) and factor == 1
    )
