"""Which inputs the values of a node depend on.

Reading the shape, dtype or device of a tensor is no dependency on its values; writing into it makes it depend on what
is written.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import fx

from sloth_fx.capture.recorder import writes
from sloth_fx.passes.core import first_input

_PROPERTIES = frozenset({"shape", "dtype", "device", "ndim", "itemsize", "nbytes"})
_PROPERTY_METHODS = frozenset({"size", "dim", "numel", "stride", "element_size", "is_floating_point"})
_BLANK = frozenset({"new_empty", "new_zeros", "new_ones", "new_full"})
_BLANK_LIKE = (torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like)


class Dependencies:
    """The dependencies in one graph. Nothing in the graph may change as long as this is used."""

    def __init__(self, graph: fx.Graph) -> None:
        self._written: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in graph.nodes:
            if writes(node):
                for base in _bases(node):
                    self._written[base].append(node)
        self._known: dict[fx.Node, frozenset[fx.Node]] = {}
        for node in graph.nodes:  # in order of execution: what a node needs is known
            self._known[node] = self._of(node)

    def placeholders(self, node: fx.Node) -> frozenset[fx.Node]:
        """The placeholders that the values of ``node`` depend on."""
        return self._known[node]

    def needed(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """All nodes whose values ``nodes`` are computed from, themselves among them."""
        found: set[fx.Node] = set()
        waiting = list(nodes)
        while waiting:
            node = waiting.pop()
            if node not in found:
                found.add(node)
                waiting.extend(_needed_by(node))
                waiting.extend(self._written[node])
        return found

    def _of(self, node: fx.Node) -> frozenset[fx.Node]:
        if node.op == "placeholder":
            return frozenset((node,))
        if is_property(node) or is_blank(node):
            return frozenset()
        found = frozenset[fx.Node]().union(*(self._known[each] for each in node.all_input_nodes))
        if writes(node):
            for base in _bases(node):
                self._known[base] |= found
        return found


def _needed_by(node: fx.Node) -> list[fx.Node]:
    if is_property(node):
        return []
    return [each for each in node.all_input_nodes if not (is_blank(node) and each is node.args[0])]


def is_property(node: fx.Node) -> bool:
    """Whether ``node`` reads what a tensor is, not what it holds."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in _PROPERTIES
    return node.op == "call_method" and node.target in _PROPERTY_METHODS


def is_blank(node: fx.Node) -> bool:
    """Whether ``node`` makes a tensor that is like another, but for its values."""
    return node.target in _BLANK_LIKE if node.op == "call_function" else node.target in _BLANK


def _bases(node: fx.Node) -> list[fx.Node]:
    """The tensor that ``node`` writes into, and all of which that may be a view."""
    found = []
    base = first_input(node)
    while base is not None and base.op in ("call_function", "call_method"):
        found.append(base)
        base = first_input(base)
    return [*found, base] if base is not None else found
