"""Every spelling of attention becomes one core node.

    scores = torch.baddbmm(empty, query, key.transpose(-1, -2), beta=0, alpha=scale)
    probs = scores.softmax(dim=-1).to(dtype)                    ->     out = attend(query, key, value)
    out = torch.bmm(probs, value)

Calls of a host's attention functions become cores in the canonical layout; attention that is spelled out is outlined,
in the host's own order, into one function; slices that are computed one after the other are joined. All is bit for bit
what it was, and operators can call each core's function on other tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from sloth_fx.capture.recorder import has_effect
from sloth_fx.passes.core import refuse
from sloth_fx.passes.explicit import ExplicitAttention, explicit_attention
from sloth_fx.passes.hosts import host_cores
from sloth_fx.passes.masks import Mask, masks_of, refusal_of_masks
from sloth_fx.passes.outline import Outline
from sloth_fx.passes.slices import join_slices
from sloth_fx.passes.trial import refusal_at_other_sizes
from sloth_fx.passes.views import call, from_canonical, to_canonical


def canonicalise(graph: fx.Graph) -> bool:
    """Make every attention of ``graph`` a core; ``scaled_dot_product_attention`` is one as it is.

    Returns whether the graph changed. A softmax that is no attention stays.
    """
    changed = host_cores(graph)
    _prepare(graph)
    for attention in explicit_attention(graph):
        changed = _outline(graph, attention) or changed
    changed = join_slices(graph) or changed
    graph.eliminate_dead_code(has_effect)
    graph.lint()
    return changed


def _prepare(graph: fx.Graph) -> None:
    """Modules without parameters between the products become functions; a tensor in two roles becomes two nodes."""
    for attention in explicit_attention(graph):
        for node in attention.chain:
            if node.op == "call_module":
                _inline(graph, node)
        if attention.query.node is attention.key.node:
            _use_alias(graph, attention.scores.node, attention.scores.right)
        if attention.value.node in (attention.query.node, attention.key.node):
            _use_alias(graph, attention.output.node, attention.value.node)


def _use_alias(graph: fx.Graph, product: fx.Node, factor: fx.Node) -> None:
    """Let the last argument of ``product`` that is ``factor`` be a view of it."""
    with graph.inserting_before(product):
        alias = call(graph, "permute", factor, *range(factor.meta["hint"].ndim))
    last = max(index for index, arg in enumerate(product.args) if arg is factor)
    product.update_arg(last, alias)


def _inline(graph: fx.Graph, node: fx.Node) -> None:
    """What a module without parameters computes, as a node. Its settings are still read when the graph runs."""
    module, (scores,) = node.meta["module"], node.all_input_nodes
    with graph.inserting_before(node):
        if isinstance(module, nn.Softmax):
            new = graph.call_function(torch.softmax, (scores, module.dim))
        elif isinstance(module, nn.Dropout):
            settings = [graph.create_node("get_attr", f"{node.target}.{name}") for name in ("p", "training")]
            for setting, value in zip(settings, (module.p, module.training), strict=True):
                setting.meta["hint"] = value
            new = graph.call_function(nn.functional.dropout, (scores, *settings))
        else:
            new = scores
    if new is not scores:
        new.meta["hint"] = node.meta["hint"]
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _outline(graph: fx.Graph, attention: ExplicitAttention) -> bool:
    """Put a core in place of an attention that is spelled out, unless it needs more than functions and methods."""
    masks = masks_of(attention)
    output = attention.output.node
    with graph.inserting_before(output):
        tensors = [to_canonical(each.node, each.order) for each in (attention.query, attention.key, attention.value)]
    hints = [node.meta["hint"] for node in tensors]
    outline = Outline(attention, masks)
    try:
        function = outline.function()
        refusal = refusal_at_other_sizes(function, hints, outline.options)
        if refusal is not None and outline.follow_sizes():
            function = outline.function()
            refusal = refusal_at_other_sizes(function, hints, outline.options)
        sum_of_masks = outline.sum_of_masks()
    except LookupError:
        return False
    if attention.shared:
        refusal = "its attention map is used elsewhere as well"
    refusal = refusal or refusal_of_masks(masks, attention)
    options: dict[str, Any] = dict(outline.options)
    with graph.inserting_before(output):
        mask = _canonical_mask(graph, masks[0], attention) if masks and sum_of_masks is None else None
        if sum_of_masks is not None:
            mask = graph.call_function(sum_of_masks, tuple(tensors), {**options})
            mask.meta["hint"] = attention.softmax.meta["hint"].permute(attention.scores_order)
        if mask is not None:
            options |= {"mask": mask, "whole_mask": mask}
        core = graph.call_function(function, tuple(tensors), options)
        core.meta["hint"] = output.meta["hint"].permute(attention.output_order)
        refuse(core, refusal)
        result = from_canonical(core, attention.output_order)
    output.replace_all_uses_with(result)
    for node in reversed(attention.chain):
        if not node.users:  # also where it writes into the scores
            graph.erase_node(node)
    graph.eliminate_dead_code(has_effect)
    return True


def _canonical_mask(graph: fx.Graph, mask: Mask, attention: ExplicitAttention) -> fx.Node:
    """The mask over (..., N, M), as a core has it."""
    node, order = mask.mask, attention.scores_order
    if order != tuple(range(len(order))):
        for _ in range(len(order) - node.meta["hint"].ndim):
            node = call(graph, "unsqueeze", node, 0)
        node = to_canonical(node, order)
    return call(graph, "logical_not", node) if mask.kind == "ignore" else node
