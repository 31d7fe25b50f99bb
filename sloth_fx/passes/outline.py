"""Outline attention that is spelled out into one function of query, key, value and mask.

The function has the host's operations in the host's order, so that the result is bit for bit what it was; yet it can be
called on other tensors.

Several masks are summed outside of it, and so is one that is applied to scores of other dimensions (of windows, say).
While the sum arrives as it was made, the host's masks are applied, one by one: a sum in another order has other bits.
A query that sees nothing of what an operator leaves gets zeros, as it does from ``scaled_dot_product_attention``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from sloth_fx.capture.generate import generate
from sloth_fx.capture.recorder import has_effect
from sloth_fx.passes.core import Attend, core_function, is_core, named
from sloth_fx.passes.explicit import ExplicitAttention, regroups
from sloth_fx.passes.masks import Mask, in_host_layout, no_scores, one_as_it_is, with_mask, without_blind
from sloth_fx.passes.products import dimensions
from sloth_fx.passes.views import canonical_source, from_canonical, size, to_canonical

_NEAR = 24  # how many operations a size may be away from the tensor that it is of


class Outline:
    """The function of one attention, and what it needs besides query, key, value and mask.

    ``extras`` are these nodes, with the names of the function's parameters. The nodes from which the function computes
    whatever else it needs are the operands of the products. ``mask`` is the one mask that the function is given, where
    it needs no sum; else all are among the extras, and :meth:`sum_of_masks` computes it.
    """

    def __init__(self, attention: ExplicitAttention, masks: list[Mask]) -> None:
        self.attention = attention
        self.masks = masks
        self.mask = one_as_it_is(masks)
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
        self._known |= {mask.mask for mask in masks}
        if masks and self.mask is None:
            self.extras = {mask.mask: f"mask_{index}" for index, mask in enumerate(masks)}
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
        """``attend(query, key, value, mask=None, whole_mask=None, **extras)``; where ``mask`` is ``whole_mask``, the
        host's own mask or masks are meant. Raises LookupError where it needs a module."""
        self._structure = ()
        plain = self._generated()
        masked = self._generated(masked=True)
        own = self._generated(masked=True, own=True) if self.masks else masked

        def attend(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            mask: Tensor | None = None,
            whole_mask: Tensor | None = None,
            **extras: Any,
        ) -> Tensor:
            if mask is None:
                return plain(None, query, key, value, **extras)  # type: ignore[no-any-return]
            function = own if mask is whole_mask else masked
            return function(None, query, key, value, mask, **extras)  # type: ignore[no-any-return]

        attend.sloth_fx_structure = self._structure  # type: ignore[attr-defined] # equal where two compute the same
        return core_function(attend)

    def sum_of_masks(self) -> Attend | None:
        """``whole_mask(query, key, value, **extras)``: what the masks make of scores that are zero, in canonical
        order; ``None`` where there is nothing to sum. Raises LookupError where it needs a module."""
        if not self.masks or self.mask is not None:
            return None
        body = _Body(self, self._operands, self._sizes, own=True, of_masks=True)
        function = generate(body.graph, "masks")

        def whole_mask(query: Tensor, key: Tensor, value: Tensor, **extras: Any) -> Tensor:
            return function(None, query, key, value, **extras)  # type: ignore[no-any-return]

        return named(whole_mask, "whole_mask")

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
    """The graph of one variant: without a mask, with the host's own, or with any other; or that of the sum of masks."""

    def __init__(
        self,
        outline: Outline,
        operands: dict[str, Any],
        sizes: dict[fx.Node, tuple[str, int]],
        *,
        masked: bool = False,
        own: bool = False,
        of_masks: bool = False,
    ) -> None:
        self.attention = outline.attention
        self.host_mask = outline.mask
        self.masks = {mask.node: mask for mask in outline.masks}
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
        if of_masks:
            self._blank_scores()
            end, order = self.attention.softmax.all_input_nodes[0], self.attention.scores_order
        else:
            end, order = self.attention.output.node, self.attention.output_order
        self.graph.output(to_canonical(self.copied(end), order))
        self.graph.eliminate_dead_code(has_effect)

    def copied(self, node: fx.Node) -> fx.Node:
        if node not in self.copies:
            if node.op not in ("call_function", "call_method"):
                raise LookupError(node.name)
            ungrouped = None if self.own else self._ungrouped(node)
            if ungrouped is not None:
                self.copies[node] = self.copied(ungrouped)
            else:
                self.copies[node] = self._at_mask(self.masks[node]) if node in self.masks else self._copy(node)
        return self.copies[node]

    def _ungrouped(self, node: fx.Node) -> fx.Node | None:
        """The scores before they were regrouped for a mask, where ``node`` regroups them back: without that mask, they
        are the same."""
        if not regroups(node) or node not in self.attention.layouts:
            return None
        before = self.attention.chain[: self.attention.chain.index(node)]
        for earlier in reversed(before):
            if earlier.meta["hint"].shape == node.meta["hint"].shape and not regroups(earlier):
                return earlier
            if earlier not in self.masks and not regroups(earlier):
                return None
        return None

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
            return self._masked_softmax(copy)
        return copy

    def _masked_softmax(self, softmax: fx.Node) -> fx.Node:
        """The mask goes in front of the softmax, whatever mask the host has and where."""
        scores = self.copies[self.attention.softmax.all_input_nodes[0]]
        with self.graph.inserting_before(softmax):
            masked = self.graph.call_function(with_mask, (scores, self._host_mask()))
            softmax.replace_input_with(scores, masked)
        return self.graph.call_function(without_blind, (softmax, masked, self.attention.scores_order[-1]))

    def _host_mask(self) -> fx.Node:
        assert self.mask is not None
        order = self.attention.scores_order
        moved = order != tuple(range(len(order)))
        return self.graph.call_function(in_host_layout, (self.mask, order)) if moved else self.mask

    def _at_mask(self, mask: Mask) -> fx.Node:
        if not self.own:
            return self.copied(mask.scores) if mask.scores is not None else self._copy(mask.node, without=mask.mask)
        if self.host_mask is not None:
            own = self._host_mask()
            self.copies[mask.mask] = self.graph.call_method("logical_not", (own,)) if mask.kind == "ignore" else own
        return self._copy(mask.node)

    def _blank_scores(self) -> None:
        """Let the scores be zeros in the sum of masks."""
        product = self.attention.scores
        letters = product.left_letters, product.right_letters, product.out
        scores = self.graph.call_function(no_scores, (self.copied(product.left), self.copied(product.right), letters))
        if product.added is not None:
            scores = self.graph.call_function(torch.add, (scores, self.copied(product.added)))
        self.copies[product.node] = scores
