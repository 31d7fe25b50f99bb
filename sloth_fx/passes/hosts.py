"""Calls of a host's attention function become cores.

    out = dispatch_attention_fn(q, k, v)     ->     query, key, value = q.transpose(1, 2), ...
                                                    core = attend(query, key, value)
                                                    out = core.transpose(1, 2)

``attend`` undoes the transposes and calls the very function that the host called. All of it is views: no bit changes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from sloth_fx.capture.host_call import HostFunction
from sloth_fx.capture.host_functions import Function, recognised
from sloth_fx.errors import SlothError
from sloth_fx.passes.core import Attend, core_function, refuse
from sloth_fx.passes.views import call

# From a layout to (B, H, N, D) and back, as method calls; "heads" stands for their number.
_Steps = tuple[tuple[Any, ...], ...]
_TO_CORE: dict[str, _Steps] = {
    "BHND": (),
    "BND": (),
    "BNHD": (("transpose", 1, 2),),
    "BNC": (("unflatten", 2, ("heads", -1)), ("transpose", 1, 2)),
    "NHD": (("transpose", 0, 1), ("unsqueeze", 0)),
}
_FROM_CORE: dict[str, _Steps] = {
    "BHND": (),
    "BND": (),
    "BNHD": (("transpose", 1, 2),),
    "BNC": (("transpose", 1, 2), ("flatten", 2)),
    "NHD": (("squeeze", 0), ("transpose", 0, 1)),
}


def host_cores(graph: fx.Graph) -> bool:
    """Make a core of every call of a known function in ``graph``. Returns whether there were any."""
    calls = [(node, entry) for node in graph.nodes if (entry := recognised(node.target)) is not None]
    for node, entry in calls:
        _make_core(graph, node, entry)
    return bool(calls)


def _make_core(graph: fx.Graph, node: fx.Node, entry: HostFunction) -> None:
    given = entry.arguments(node.args, node.kwargs)
    hints: Any = fx.node.map_aggregate(given, lambda each: each.meta["hint"] if isinstance(each, fx.Node) else each)
    tensors = [given.pop(name) for name in entry.parameters[:3]]
    mask = given.pop(entry.mask, None) if entry.mask is not None else None
    causal = given.pop(entry.causal, False) if entry.causal is not None else False
    heads = given.get(entry.heads) if entry.heads is not None else None
    layout, output_layout = entry.layout_of(hints)
    if tensors[0].meta["hint"].ndim < len(layout):
        layout, output_layout = layout.replace("H", ""), output_layout.replace("H", "")
    attend = _attend(entry, node.target, layout, output_layout)  # type: ignore[arg-type]
    with graph.inserting_before(node):
        query, key, value = (_through(tensor, _steps_to_core(layout, tensor), heads) for tensor in tensors)
        kwargs = {**given, **({"mask": _mask(mask, query)} if mask is not None else {})}
        core = graph.call_function(attend, (query, key, value), {**kwargs, **({"causal": True} if causal else {})})
        query_hint, value_hint = query.meta["hint"], value.meta["hint"]
        core.meta["hint"] = query_hint.new_empty((*query_hint.shape[:-1], value_hint.shape[-1]))
        out = _through(core, _FROM_CORE[output_layout], heads)
    refuse(core, entry.refusal(hints))
    node.replace_all_uses_with(out)
    graph.erase_node(node)


def _attend(entry: HostFunction, function: Function, layout: str, output_layout: str) -> Attend:
    to_host, from_host = _FROM_CORE[layout], _TO_CORE[output_layout]

    def attend(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, causal: bool = False, **options: Any
    ) -> Tensor:
        if mask is not None:
            if entry.mask is None:
                raise SlothError(f"{entry.name} takes no mask")
            options[entry.mask] = mask
        if causal and entry.causal is not None:
            options[entry.causal] = causal
        out = function(*(_steps(each, to_host, None) for each in (query, key, value)), **options)
        return _steps(out, from_host, query.shape[1])

    def shape_only(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
        return query.new_empty((*query.shape[:-1], value.shape[-1]))

    attend.sloth_fx_softmax = True  # type: ignore[attr-defined] # no more than torch's, whatever kernel computes it
    attend.sloth_fx_of_form = entry.of_form  # type: ignore[attr-defined]
    attend.sloth_fx_evaluate = shape_only  # type: ignore[attr-defined] # fused kernels need data
    return core_function(attend)


def _steps_to_core(layout: str, tensor: fx.Node) -> _Steps:
    """Those of BNC, where heads and channels are apart already, are of BNHD."""
    return _TO_CORE["BNHD" if layout == "BNC" and tensor.meta["hint"].ndim == 4 else layout]


def _steps(tensor: Tensor, steps: _Steps, heads: int | None) -> Tensor:
    for method, *args in steps:
        tensor = getattr(tensor, method)(*_with_heads(args, heads))
    return tensor


def _through(node: fx.Node, steps: _Steps, heads: Any) -> fx.Node:
    for method, *args in steps:
        node = call(node.graph, method, node, *_with_heads(args, heads))
    return node


def _with_heads(args: list[Any], heads: Any) -> list[Any]:
    return [(heads, -1) if arg == ("heads", -1) else arg for arg in args]


def _mask(mask: Any, query: fx.Node) -> Any:
    """The mask in four dimensions: hosts give (B, M) and (B, N, M), too."""
    hint = mask.meta["hint"] if isinstance(mask, fx.Node) else None
    batch, tokens = query.meta["hint"].shape[0], query.meta["hint"].shape[-2]
    if not isinstance(hint, torch.Tensor) or query.meta["hint"].ndim != 4:
        return mask
    if hint.ndim == 2 and hint.shape[0] == batch != tokens:
        return call(query.graph, "unsqueeze", call(query.graph, "unsqueeze", mask, 1), 1)
    if hint.ndim == 3:
        return call(query.graph, "unsqueeze", mask, 1)
    return mask
