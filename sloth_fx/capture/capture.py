"""Capture an owner twice, at two sizes, and see what its graph depends on."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from sloth_fx.capture.call import read_call
from sloth_fx.capture.recorder import Recorder
from sloth_fx.capture.skeleton import Skeleton, quiet
from sloth_fx.errors import SlothError

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Capture:
    """The graph of one owner for one pattern of call.

    ``alike``: captured at two sizes it came out the same. ``any_size``: and no size decided a branch, so none is baked
    in.
    ``any_type``: neither dtype nor device is. ``any_mode``: training or not is the same. Where one of these does not
    hold, the graph serves only calls like the one it was captured from.

    ``values`` are those that Python has read, and that tensors have to have again, by their number in a call.

    ``inexact``: the forward itself takes a native path, or one that depends on which arguments are the same tensor, so
    that the graph is the same mathematics and not the same bits.
    """

    owner: nn.Module
    graph: fx.Graph
    pattern: tuple[Any, ...]
    alike: bool
    any_size: bool
    any_type: bool
    any_mode: bool
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    inexact: bool = False


def capture(skeleton: Skeleton, owner: nn.Module, call: Call, other: Call | None) -> Capture:
    """Capture ``owner.forward`` for the fake arguments ``call``; ``other`` is the same call at another size.

    Raises :class:`SlothError` with the reason when the forward cannot be captured.
    """
    try:
        with quiet():
            recorder = _record(skeleton, owner, call)
            again = _record(skeleton, owner, other) if other is not None else None
            any_mode = _outcome(recorder) == _outcome(_in_other_mode(skeleton, owner, call))
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise SlothError(
            f"the forward of {type(owner).__name__} cannot be captured: {type(error).__name__}: "
            f"{reason[0] if reason else 'no message'}"
        ) from error
    pattern, tensors = read_call(*call)
    alike = again is not None and _outcome(recorder) == _outcome(again)
    return Capture(
        owner=owner,
        graph=recorder.graph,
        pattern=pattern,
        alike=alike,
        any_size=again is not None and alike and recorder.steered_by == again.steered_by,
        any_type=not recorder.type_steered,
        any_mode=any_mode,
        values={index: tensors[index].clone() for index in _read(recorder)},
        inexact=isinstance(owner, nn.MultiheadAttention) and (owner.batch_first or _has_aliases(call)),
    )


def _outcome(recorder: Recorder) -> tuple[str, list[int]]:
    return recorder.graph.python_code("self").src, _read(recorder)


def _read(recorder: Recorder) -> list[int]:
    """The numbers of the tensors whose values became part of a graph."""
    placeholders = [node for node in recorder.graph.nodes if node.op == "placeholder"]
    return [index for index, node in enumerate(placeholders) if node in recorder.read]


def _has_aliases(call: Call) -> bool:
    _, tensors = read_call(*call)
    return len({id(tensor) for tensor in tensors}) < len(tensors)


def _in_other_mode(skeleton: Skeleton, owner: nn.Module, call: Call) -> Recorder:
    """The forward as it is in training, or out of it."""
    owner.train(not owner.training)
    try:
        return _record(skeleton, owner, call)
    finally:
        owner.train(not owner.training)


def _record(skeleton: Skeleton, owner: nn.Module, call: Call) -> Recorder:
    recorder = Recorder(skeleton, owner, reads_values=True)
    try:
        recorder.record(*call)
    except Exception:  # perhaps a proxy where only a real dtype or device will do
        recorder = Recorder(skeleton, owner, follow_types=False, reads_values=True)
        recorder.record(*call)
    return recorder


def _empty(value: Any) -> bool:
    """The hooks that a module does not have, and the like."""
    return isinstance(value, (dict, list, tuple, set)) and not value


def fingerprint(value: Any, depth: int = 4) -> Hashable:
    """Equal for modules whose forwards take the same path through the same code: they can share one capture.

    Compares classes, plain attributes, shapes of parameters, children, and the objects a module holds (processors).
    """
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return type(value).__name__, value
    if isinstance(value, torch.Tensor):
        return "tensor", tuple(value.shape), value.dtype
    if isinstance(value, (list, tuple, set, frozenset)):
        return type(value).__name__, *[fingerprint(item, depth) for item in value]
    if isinstance(value, dict):
        return "dict", *[(name, fingerprint(item, depth)) for name, item in value.items()]
    function = getattr(value, "__func__", value)
    if callable(value) and hasattr(function, "__code__"):
        return "function", id(function)
    if depth == 0 or not hasattr(value, "__dict__"):
        return "object", type(value)
    state = vars(value)
    if isinstance(value, nn.Module):  # how deep modules nest is theirs to decide
        return type(value), *[(name, fingerprint(item, depth)) for name, item in state.items() if not _empty(item)]
    return type(value), *[(name, fingerprint(item, depth - 1)) for name, item in state.items()]
