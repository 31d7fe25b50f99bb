"""Outline attention that is spelled out into one function of query, key, value and mask.

The function has the host's operations in the host's order, so that the result is bit for bit what it was; yet it can be
called on other tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from sloth_fx.capture.generate import generate
from sloth_fx.capture.recorder import has_effect
from sloth_fx.passes.core import Attend, core_function, is_core
from sloth_fx.passes.explicit import ExplicitAttention
from sloth_fx.passes.masks import Mask, in_host_layout, with_mask
from sloth_fx.passes.products import dimensions
from sloth_fx.passes.views import canonical_source, from_canonical, size, to_canonical

_NEAR = 24  # how many operations a size may be away from the tensor that it is of


class Outline:
    """The function of one attention, and what it needs besides query, key, value and mask.

    ``extras`` are these nodes, with the names of the function's parameters. The nodes from which the function computes
    whatever else it needs are the operands of the products.
    """

    def __init__(self, attention: ExplicitAttention, mask: Mask | None) -> None:
        self.attention = attention
        self.mask = mask
        self.extras: dict[fx.Node, str] = {}
        self._sizes: dict[fx.Node, tuple[str, int]] = {}
        self._structure: tuple[str, ...] = ()
        self._operands = {"query": attention.query, "key": attention.key, "value": attention.value}
        self._known = {operand.node for operand in self._operands.values()}
        self._known |= {
            source
            for operand in self._operands.values()
            if (source := canonical_source(operand.node, operand.order)) is not None
        }
        if mask is not None:
            self._known.add(mask.mask)
        self.ignored = _ignored_input(attention)
        for node in attention.chain:
            for each in node.all_input_nodes:
                if each is not self.ignored:
                    self._find_extras(each)

    @property
    def options(self) -> dict[str, fx.Node]:
        return {name: node for node, name in self.extras.items()}

    def follow_sizes(self) -> bool:
        """Take integers that are sizes of query or key from those. Returns whether there are any."""
        found: dict[int, tuple[str, int]] = {}
        for name in ("query", "key"):
            operand = self._operands[name]
            for at, dim in enumerate(operand.order[:-1]):
                if dim is not None:
                    found.setdefault(operand.node.meta["hint"].shape[dim], (name, at))
        self._sizes = {
            node: found[hint] for node in self.extras if type(hint := node.meta["hint"]) is int and hint in found
        }
        self.extras = {node: name for node, name in self.extras.items() if node not in self._sizes}
        return bool(self._sizes)

    def function(self) -> Attend:
        """``attend(query, key, value, mask=None, **extras)``. Raises LookupError where it needs a module."""
        self._structure = ()
        plain = self._generated()
        masked = self._generated(masked=True)
        own = self._generated(masked=True, own=True) if self.mask is not None else masked
        own_is_boolean = self.mask is not None and self.mask.kind != "added"

        def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **extras: Any) -> Tensor:
            if mask is None:
                return plain(None, query, key, value, **extras)  # type: ignore[no-any-return]
            function = own if (mask.dtype is torch.bool) == own_is_boolean else masked
            return function(None, query, key, value, mask, **extras)  # type: ignore[no-any-return]

        attend.sloth_fx_structure = self._structure  # type: ignore[attr-defined] # equal where two compute the same
        return core_function(attend)

    def _find_extras(self, node: fx.Node) -> None:
        if node in self._known or node in self.attention.chain:
            return
        if self._after_scores(node) or self._from_operands(node, _NEAR) or _made_from_sizes(node):
            for each in node.all_input_nodes:
                self._find_extras(each)
        else:
            self.extras.setdefault(node, f"extra_{len(self.extras)}")

    def _after_scores(self, node: fx.Node) -> bool:
        """Whether ``node`` is computed from the scores."""
        if node < self.attention.chain[0]:
            return False
        return node in self.attention.chain or any(map(self._after_scores, node.all_input_nodes))

    def _from_operands(self, node: fx.Node, left: int) -> bool:
        """Whether ``node`` is computed from the operands alone."""
        if node in self._known:
            return True
        if not left or node.op not in ("call_function", "call_method") or is_core(node):
            return False
        return all(self._from_operands(each, left - 1) for each in node.all_input_nodes)

    def _generated(self, *, masked: bool = False, own: bool = False) -> Any:
        graph = _Body(self, self._operands, self._sizes, masked=masked, own=own).graph
        self._structure += (_structure(graph),)
        return generate(graph, "attention")


def _structure(graph: fx.Graph) -> str:
    """What a graph computes, without the names of its nodes."""
    numbers = {node: index for index, node in enumerate(graph.nodes)}
    return str(
        [
            (node.op, node.target, fx.node.map_arg((node.args, node.kwargs), lambda each: f"%{numbers[each]}"))
            for node in graph.nodes
        ]
    )


def _made_from_sizes(node: fx.Node) -> bool:
    """Whether ``node`` is a tensor that is computed from no other tensor."""
    if node.op != "call_function" or not dimensions(node):
        return False
    return not any(isinstance(each.meta["hint"], torch.Tensor) for each in node.all_input_nodes)


def _ignored_input(attention: ExplicitAttention) -> fx.Node | None:
    """What ``baddbmm`` is given to add to the scores, where it does not read it."""
    node = attention.scores.node
    first = node.args[0] if node.args else None
    return first if node.kwargs.get("beta", 1) == 0 and isinstance(first, fx.Node) else None


class _Body:
    """The graph of one variant: without a mask, with the host's kind of mask, or with any other."""

    def __init__(
        self,
        outline: Outline,
        operands: dict[str, Any],
        sizes: dict[fx.Node, tuple[str, int]],
        *,
        masked: bool,
        own: bool,
    ) -> None:
        self.attention = outline.attention
        self.host_mask = outline.mask
        self.own = own
        self.ignored = outline.ignored
        self.graph = fx.Graph()
        canonical = {name: self.graph.placeholder(name) for name in operands}
        self.mask = self.graph.placeholder("mask") if masked else None
        self.copies = {node: self.graph.placeholder(name) for node, name in outline.extras.items()}
        for name, operand in operands.items():
            source = canonical_source(operand.node, operand.order)
            if source is not None:
                self.copies.setdefault(source, canonical[name])
            self.copies[operand.node] = from_canonical(canonical[name], operand.order)
        for node, (name, dim) in sizes.items():
            self.copies[node] = size(canonical[name], dim)
        # A dtype or device that was captured as a constant is the query's: other types may come.
        hint, query = self.attention.query.node.meta["hint"], canonical["query"]
        self.types = {
            hint.dtype: self.graph.call_function(getattr, (query, "dtype")),
            hint.device: self.graph.call_function(getattr, (query, "device")),
        }
        self.graph.output(to_canonical(self.copied(self.attention.output.node), self.attention.output_order))
        self.graph.eliminate_dead_code(has_effect)

    def copied(self, node: fx.Node) -> fx.Node:
        if node not in self.copies:
            if node.op not in ("call_function", "call_method"):
                raise LookupError(node.name)
            self.copies[node] = self._at_mask(node) if self._is_masking(node) else self._copy(node)
        return self.copies[node]

    def _copy(self, node: fx.Node, without: fx.Node | None = None) -> fx.Node:
        without = without or (self.ignored if node is self.attention.chain[0] else None)
        for parent in node.all_input_nodes:
            if parent is not without:
                self.copied(parent)
        if without is not None:
            self.copies[without] = self.graph.call_method("new_zeros", (self.copies[self.attention.query.node], ()))
        copy = self.graph.node_copy(node, lambda parent: self.copies[parent])
        if node.meta.get("baked_types"):
            copy.args, copy.kwargs = fx.node.map_aggregate(
                (copy.args, copy.kwargs),
                lambda each: self.types.get(each, each) if isinstance(each, (torch.dtype, torch.device)) else each,
            )
        if node is self.attention.softmax and self.mask is not None and not self.own:
            scores = self.copies[node.all_input_nodes[0]]
            with self.graph.inserting_before(copy):
                mask = self._host_mask()
                copy.replace_input_with(scores, self.graph.call_function(with_mask, (scores, mask)))
        return copy

    def _host_mask(self) -> fx.Node:
        assert self.mask is not None
        order = self.attention.scores_order
        moved = order != tuple(range(len(order)))
        return self.graph.call_function(in_host_layout, (self.mask, order)) if moved else self.mask

    def _is_masking(self, node: fx.Node) -> bool:
        return self.host_mask is not None and node is self.host_mask.node

    def _at_mask(self, node: fx.Node) -> fx.Node:
        assert self.host_mask is not None
        if self.own:
            mask = self._host_mask()
            if self.host_mask.kind == "ignore":
                mask = self.graph.call_method("logical_not", (mask,))
            self.copies[self.host_mask.mask] = mask
            return self._copy(node)
        if self.host_mask.scores is not None:
            return self.copied(self.host_mask.scores)
        return self._copy(node, without=self.host_mask.mask)
