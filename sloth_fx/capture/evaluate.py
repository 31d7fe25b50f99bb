"""The hint of a node: what it evaluates to, as far as shapes go."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from sloth_fx.capture.call import substitute, unwritten
from sloth_fx.capture.host_functions import HostCall, not_intercepting, recognised
from sloth_fx.capture.proxy import is_opaque


def evaluate(node: fx.Node, owner: nn.Module, mode: Any) -> Any:
    """The hint of ``node`` from the hints of its inputs (shapes only: nothing is computed)."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: _lent(n.meta["hint"]))
    with torch._C.DisableTorchFunction(), mode, torch.no_grad(), not_intercepting():
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(owner)
        if node.op == "call_module":
            with unwritten(args, kwargs, f"its child {node.target} writes"):
                return owner.get_submodule(str(node.target))(*args, **kwargs)
        entry = recognised(node.target)
        if entry is not None:
            return HostCall.read(entry, args, kwargs).empty()
        if node.target is setattr:  # the object may be somebody's
            return None
        try:
            with unwritten(tuple(filter(is_opaque, args)), {}, f"{node.target} writes"):
                return _call(node, args, kwargs)
        except DynamicOutputShapeException:
            return _as_if_all(node, args, kwargs)


def _lent(hint: Any) -> Any:
    """A hint that a leaf may write into."""
    return substitute(hint, lambda tensor: tensor) if is_opaque(hint) else hint


def _call(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    function = getattr(node.target, "sloth_fx_evaluate", node.target)  # for functions that need data
    return function(*args, **kwargs)


def _as_if_all(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """How many elements are chosen depends on data: the hint is as if all were. What is computed from it must not
    steer Python, see :meth:`HintTracer.decide`."""
    node.meta["depends_on_data"] = True
    tensor = args[0]
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name == "nonzero" and not kwargs.get("as_tuple"):
        return tensor.new_empty((tensor.numel(), tensor.ndim), dtype=torch.int64)
    if name == "masked_select":
        return tensor.new_empty((tensor.numel(),))
    if name == "getitem" and isinstance(args[1], torch.Tensor) and args[1].dtype is torch.bool:
        return tensor.flatten(0, args[1].ndim - 1)
    raise NotImplementedError(f"the shape that {name} gives depends on data")
