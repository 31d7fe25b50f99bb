"""Every spelling of attention becomes one core node.

    scores = torch.baddbmm(empty, query, key.transpose(-1, -2), beta=0, alpha=scale)
    probs = scores.softmax(dim=-1).to(dtype)                    ->     out = attend(query, key, value)
    out = torch.bmm(probs, value)

The nodes of the idiom are outlined, in the host's own order, into one function of query, key and value: the result is
bit for bit what it was, and operators can call that function on other tensors.
"""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from sloth_fx.capture.recorder import has_effect

_SOFTMAX = (torch.softmax, F.softmax, "softmax")
_PRODUCTS = (operator.matmul, torch.matmul, torch.bmm, torch.baddbmm, "matmul", "bmm", "baddbmm", "__matmul__")
_TRANSPOSED = ((-1, -2), (-2, -1))
_numbers = itertools.count()


def canonicalise(graph: fx.Graph) -> bool:
    """Outline explicit softmax attention in ``graph``; ``scaled_dot_product_attention`` is canonical as it is.

    Returns whether the graph changed. A softmax that is no attention stays.
    """
    regions = [region for node in list(graph.nodes) if node.target in _SOFTMAX for region in _attention_around(node)]
    for query, key, value, output in regions:
        outlined = _outline(query, key, value, output)
        if outlined is not None:
            with graph.inserting_before(output):
                core = graph.call_function(outlined, (query, key, value))
            core.meta["hint"] = output.meta["hint"]
            output.replace_all_uses_with(core)
            graph.eliminate_dead_code(has_effect)
    graph.lint()
    return bool(regions)


def _attention_around(softmax: fx.Node) -> list[tuple[fx.Node, fx.Node, fx.Node, fx.Node]]:
    """(query, key, value, output) of the attention that ``softmax`` belongs to, if it belongs to one."""
    hint, dim = softmax.meta["hint"], softmax.kwargs.get("dim", softmax.args[-1])
    if dim not in (-1, hint.ndim - 1):  # not over the keys
        return []
    scores = _through(softmax.args[0], up=True)
    output = _through(softmax, up=False)
    if scores is None or output is None:
        return []
    query, transposed = [arg for arg in scores.args if isinstance(arg, fx.Node)][-2:]
    value = output.args[-1]
    if transposed.target != "transpose" or transposed.args[1:] not in _TRANSPOSED or not isinstance(value, fx.Node):
        return []
    return [(query, transposed.args[0], value, output)]  # type: ignore[list-item]


def _through(node: Any, *, up: bool) -> fx.Node | None:
    """The matrix product before (after) a run of operations that keep the shape of the scores."""
    shape = node.meta["hint"].shape
    while isinstance(node, fx.Node):
        if node.target in _PRODUCTS and (up or node.meta["hint"].shape != shape):
            return node
        if up:
            node = next((arg for arg in node.all_input_nodes if _has_shape(arg, shape)), None)
        else:
            node = next(iter(node.users)) if len(node.users) == 1 else None
            if node is not None and node.target not in _PRODUCTS and not _has_shape(node, shape):
                return None
    return None


def _has_shape(node: fx.Node, shape: torch.Size) -> bool:
    hint = node.meta.get("hint")
    return isinstance(hint, torch.Tensor) and hint.shape == shape


def _outline(query: fx.Node, key: fx.Node, value: fx.Node, output: fx.Node) -> Any:
    """A function of query, key and value that computes ``output``; ``None`` if that needs anything else."""
    body = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for name, node in (("query", query), ("key", key), ("value", value)):
        copies[node] = body.placeholder(name)
    if len(copies) < 3:  # one tensor in two roles: its two placeholders would be one
        return None

    # A dtype or device that was captured as a constant is the query's: other variants call this with other types.
    hint = query.meta["hint"]
    types = {
        hint.dtype: body.call_function(getattr, (copies[query], "dtype")),
        hint.device: body.call_function(getattr, (copies[query], "device")),
    }

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:
            if node.op not in ("call_function", "call_method"):
                raise LookupError(node.name)
            for parent in node.all_input_nodes:
                copied(parent)
            copies[node] = copy = body.node_copy(node, lambda parent: copies[parent])
            follow = {name: types[option] for name, option in copy.kwargs.items() if option in types}
            copy.kwargs = {**copy.kwargs, **follow}
        return copies[node]

    try:
        body.output(copied(output))
    except LookupError:
        return None
    body.eliminate_dead_code(has_effect)
    code = body.python_code("self")
    namespace = dict(code.globals)
    exec(code.src.replace("def forward(self, ", "def attend("), namespace)  # our own graph's code, not a caller's
    attend = namespace["attend"]
    attend.__name__ = attend.__qualname__ = f"attention_{next(_numbers)}"
    attend.__module__ = __name__
    attend.sloth_fx_core = True
    return attend
