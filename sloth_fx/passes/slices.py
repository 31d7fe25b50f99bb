"""Attention that is computed in slices, one after the other, is one attention.

    out[0:2] = attend(query[0:2], key[0:2], value[0:2])
    out[2:4] = attend(query[2:4], key[2:4], value[2:4])     ->     out = attend_in_slices(query, key, value)

Slices of samples (and folded heads), or slices of queries with all keys; written into a buffer, or concatenated. The
joined function slices as the host did, to save the same memory.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sloth_fx.passes.core import Attend, AttentionCore, attention_cores, core_function
from sloth_fx.passes.products import dimensions

_CONCATENATE = (torch.cat, torch.concat, torch.concatenate)


@dataclass(frozen=True)
class Slice:
    """``tensor[start:stop]`` along ``dim``."""

    tensor: fx.Node
    dim: int
    start: int
    stop: int


def join_slices(graph: fx.Graph) -> bool:
    """Join the cores of ``graph`` that are slices of one. Returns whether there were any."""
    groups = itertools.groupby(attention_cores(graph), key=_whole)
    joined = [_join(graph, whole, list(cores)) for whole, cores in list(_listed(groups)) if whole is not None]
    return any(joined)


def _listed(groups: Any) -> Iterator[tuple[Any, list[AttentionCore]]]:
    for whole, cores in groups:
        yield whole, list(cores)


def _whole(core: AttentionCore) -> tuple[Any, ...] | None:
    """The tensors that ``core`` attends over a slice of, the dimension of it, and how it computes; equal for slices of
    one attention. ``None`` if it is no slice."""
    query, key, value = (_sliced(each) for each in (core.query, core.key, core.value))
    mask = _sliced(core.mask)
    if query is None:
        return None
    tokens = dimensions(core.query) - 2
    options = {name: option for name, option in core.options.items() if name != "whole_mask" or option is not core.mask}
    how = (
        getattr(core.attend, "sloth_fx_structure", core.attend),
        tuple(options.items()),
        core.causal,
        core.refusal,
    )
    if query.dim == 0 and key is not None and value is not None and key.dim == value.dim == 0:
        spans = {(each.start, each.stop) for each in (query, key, value)}
        mask_dim = 0
        tensors = query.tensor, key.tensor, value.tensor
    elif query.dim == tokens:
        spans = {(query.start, query.stop)}
        mask_dim = dimensions(core.mask) - 2
        tensors = query.tensor, core.key, core.value
    else:
        return None
    if mask is not None and mask.dim == mask_dim:
        spans.add((mask.start, mask.stop))
        return (*tensors, mask.tensor, query.dim, how) if len(spans) == 1 else None
    return (*tensors, core.mask, query.dim, how) if len(spans) == 1 else None


def _join(graph: fx.Graph, whole: tuple[Any, ...], cores: list[AttentionCore]) -> bool:
    query, key, value, mask, dim, _ = whole
    spans = [span for core in cores if (span := _sliced(core.query)) is not None]
    length = query.meta["hint"].shape[dim]
    size = spans[0].stop
    expected = [(start, min(start + size, length)) for start in range(0, length, size)]
    result = _result(cores, dim)
    if result is None or [(span.start, span.stop) for span in spans] != expected:
        return False
    out, last = result
    core = cores[0]
    with graph.inserting_before(last):
        given = {**core.options, **({"mask": mask} if mask is not None else {})}
        given |= {"whole_mask": mask} if "whole_mask" in given else {}
        given |= {"causal": True} if core.causal else {}
        joined = graph.call_function(_in_slices(core.attend, dim, size), (query, key, value), given)
        hint = query.meta["hint"]
        joined.meta = {
            **core.node.meta,
            "calls": len(cores),
            "hint": hint.new_empty((*hint.shape[:-1], value.meta["hint"].shape[-1])),
        }
    writing = [user for user in out.users if user.target is operator.setitem]
    out.replace_all_uses_with(joined, delete_user_cb=lambda user: user not in writing)
    for node in (*writing, *([] if out in writing else [out]), *(core.node for core in cores)):
        graph.erase_node(node)
    return True


def _in_slices(attend: Attend, dim: int, size: int) -> Attend:
    def sliced(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
        whole = "whole_mask" in options and mask is options.pop("whole_mask")
        parts = []
        for start in range(0, query.shape[dim], size):
            part = query.narrow(dim, start, min(size, query.shape[dim] - start))
            keys, values, hidden = key, value, mask
            if dim == 0:
                keys, values = key[start : start + size], value[start : start + size]
            if mask is not None:
                axis = dim - query.ndim  # the mask may have fewer dimensions
                if mask.ndim >= -axis and mask.shape[axis] == query.shape[dim]:
                    hidden = mask.narrow(axis, start, part.shape[dim])
            told = {"whole_mask": hidden} if whole else {}
            parts.append(attend(part, keys, values, *([] if hidden is None else [hidden]), **told, **options))
        return torch.cat(parts, dim)

    return core_function(sliced)


def _result(cores: list[AttentionCore], dim: int) -> tuple[fx.Node, fx.Node] | None:
    """The node that holds all slices in the end, and the last one that gives it what it holds."""
    users = [list(core.node.users) for core in cores]
    if any(len(each) != 1 for each in users):
        return None
    takers = [each[0] for each in users]
    if all(taker is takers[0] for taker in takers) and takers[0].target in _CONCATENATE:
        parts, *rest = takers[0].args
        at = rest[0] if rest else takers[0].kwargs.get("dim", 0)
        ordered = list(parts) == [core.node for core in cores]  # type: ignore[arg-type]
        same = isinstance(at, int) and at % dimensions(cores[0].node) == dim
        return (takers[0], takers[0]) if ordered and same else None
    buffer = takers[0].args[0]
    if not isinstance(buffer, fx.Node) or any(
        taker.target is not operator.setitem or taker.args[0] is not buffer for taker in takers
    ):
        return None
    written = [_span(buffer, taker.args[1]) for taker in takers]
    read = [_sliced(core.query) for core in cores]
    places = [(each.dim, each.start, each.stop) if each is not None else None for each in written]
    if places != [(each.dim, each.start, each.stop) if each is not None else None for each in read]:
        return None
    others = [user for user in buffer.users if user not in takers]
    if any(user < takers[-1] for user in others) or buffer.meta["hint"].dtype != cores[0].node.meta["hint"].dtype:
        return None
    return buffer, takers[-1]


def _sliced(node: Any) -> Slice | None:
    """``node`` as a slice of another tensor, if it is one."""
    if not isinstance(node, fx.Node) or node.target is not operator.getitem or not dimensions(node.args[0]):
        return None
    return _span(node.args[0], node.args[1])


def _span(tensor: Any, index: Any) -> Slice | None:
    """``tensor[index]``, where that is a slice along one dimension."""
    index = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(each, slice) for each in index):
        return None
    narrowed = [dim for dim, each in enumerate(index) if each != slice(None)]
    if len(narrowed) != 1:
        return None
    dim = narrowed[0]
    start, stop, step = index[dim].start or 0, index[dim].stop, index[dim].step
    length = tensor.meta["hint"].shape[dim]
    stop = length if stop is None else stop
    if type(start) is not int or type(stop) is not int or step not in (None, 1) or start < 0 or stop < 0:
        return None
    return Slice(tensor, dim, start, min(stop, length))
