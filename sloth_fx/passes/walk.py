"""What a node of a graph was computed from, and what is computed from it; writes into tensors included."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn

from sloth_fx.capture.effects import writes


def behind(end: fx.Node, until: fx.Node | None = None) -> dict[fx.Node, None]:
    """``end``, the tensors that it was computed from, and those that were written into them; in order of execution.

    What only told a size is left out, and so is ``until`` with what only it was computed from.
    """
    found: dict[fx.Node, None] = {}
    waiting = [end]
    while waiting:
        node = waiting.pop()
        if node not in found and node is not until:
            found[node] = None
            waiting.extend(parent for parent in node.all_input_nodes if carries(parent))
            waiting.extend(user for user in node.users if _written(user) is node)
    return dict.fromkeys(sorted(found))


def ahead(starts: Iterable[fx.Node]) -> dict[fx.Node, None]:
    """``starts``, the tensors that are computed from them, and those that they are written into; in order."""
    found: dict[fx.Node, None] = {}
    waiting = list(starts)
    written: dict[fx.Node, None] = {}
    while waiting:
        node = waiting.pop()
        if node not in found and (carries(node) or _written(node) is not None):
            found[node] = None
            waiting.extend(node.users)
            if (target := _written(node)) is not None:  # whoever read it before is not concerned
                written[target] = None
                waiting.extend(user for user in target.users if node < user)
    return dict.fromkeys(sorted({**found, **written}))


def outcomes(graph: fx.Graph) -> list[fx.Node]:
    """What a graph is run for: its output, and what it writes into objects and tensors that it is given."""
    return [node for node in graph.nodes if node.op == "output" or (writes(node) and _writes_outside(node))]


def _writes_outside(node: fx.Node) -> bool:
    target = node.args[0] if node.args else None
    return node.target is setattr or (isinstance(target, fx.Node) and target.op == "placeholder")


def needed(ends: Iterable[fx.Node], until: fx.Node | None = None) -> list[fx.Node]:
    """``ends`` and all that has to run before them, sizes too, but for what only ``until`` needs; in order."""
    found: dict[fx.Node, None] = {}
    waiting = list(ends)
    while waiting:
        node = waiting.pop()
        if node not in found and node is not until:
            found[node] = None
            waiting.extend(node.all_input_nodes)
    return sorted(found)


def projections(end: fx.Node, owner: nn.Module) -> list[fx.Node]:
    """The last linear layers on the ways to ``end``: one for each stream of tokens, or one for all."""
    found = [node for node in behind(end) if is_projection(node, owner)]
    return [node for node in found if not any(later in found for later in ahead([node]) if later is not node)]


def is_projection(node: fx.Node, owner: nn.Module) -> bool:
    """Whether a node is a linear layer, of whatever make (LoRA and quantised ones have these attributes too)."""
    if node.op != "call_module":
        return False
    module = owner.get_submodule(str(node.target))
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def name_of(node: fx.Node) -> str:
    """What a node calls, without its module."""
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", node.target))


def tensor_of(node: Any) -> torch.Tensor | None:
    """The hint of a node that is a tensor."""
    hint = node.meta.get("hint") if isinstance(node, fx.Node) else None
    return hint if isinstance(hint, torch.Tensor) else None


def carries(node: fx.Node) -> bool:
    """Whether a node may hold tokens: it is a tensor, or several."""
    hint = node.meta.get("hint")
    return isinstance(hint, (torch.Tensor, tuple, list)) and not isinstance(hint, torch.Size)


def _written(user: fx.Node) -> fx.Node | None:
    """The tensor that a node writes into."""
    return user.args[0] if user.target is operator.setitem and isinstance(user.args[0], fx.Node) else None
