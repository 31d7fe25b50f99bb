"""Record one module's forward as a ``torch.fx.Graph``, with its children as ``call_module`` leaves.

Nothing of torch is patched meanwhile, but for the few functions that :func:`intercept` stands in for: the module that
runs is a throw-away copy whose children record their own call instead of computing, so captures in one thread do not
meet models that run in another.
"""

from __future__ import annotations

import dataclasses
import enum
import operator
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._subclasses.fake_tensor import is_fake
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from sloth_fx.capture.call import Handle, labelled_tensors, substitute, unwritten
from sloth_fx.capture.effects import has_effect, writes
from sloth_fx.capture.evaluate import evaluate
from sloth_fx.capture.host_functions import HostFunction, intercept
from sloth_fx.capture.objects import Argument, constant, holds, is_function, maker, parts
from sloth_fx.capture.proxy import HintProxy, HintTracer, TensorProxy, is_proxy
from sloth_fx.capture.skeleton import Skeleton
from sloth_fx.capture.torch_private import undispatched
from sloth_fx.copying import copy_module

_multi_head_attention = undispatched(F.multi_head_attention_forward)

__all__ = ["Recorder", "evaluate", "has_effect", "writes"]

# Functions that make a tensor from sizes: the sizes may be traced, and the result is never a constant of the model.
_FACTORIES = frozenset(
    getattr(torch, name)
    for name in ("arange", "empty", "empty_strided", "eye", "full", "linspace", "ones", "tensor", "zeros")
)
# Where a tensor of the owner lies: a path of attributes, and keys of lists and dicts from there.
Place = tuple[str | int, ...]
_DEEPEST = 3
# What torch.fx has a spelling for.
_CONSTANTS = (list, tuple, dict, range, slice, enum.Enum, nn.Module, fx.Proxy, type(None), type(...))
# What hands the values of a tensor to Python.
_READING = frozenset({"item", "tolist", "numpy", "equal", "allclose", "is_nonzero"})


class Recorder(HintTracer):
    """Builds the graph of ``owner.forward(*args, **kwargs)`` for fake ``args`` and ``kwargs`` of ``skeleton``.

    With ``follow_types`` the dtypes and devices that the code reads are nodes; without, they are constants, for code
    that hands them to functions like ``torch.finfo``, which accept no proxy. After :meth:`record`, ``type_steered``
    tells whether a branch or a number was taken from one of them. ``is_leaf`` says which modules below the owner become
    a node when they are called (default: all).

    With ``reads_values``, Python that looks into an argument of whole numbers finds what the example has there, and
    that becomes part of the graph: it serves only calls in which the tensors of the placeholders ``read`` are equal.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        owner: nn.Module,
        *,
        follow_types: bool = True,
        is_leaf: Callable[[nn.Module], bool] = lambda module: True,
        reads_values: bool = False,
    ) -> None:
        super().__init__(follow_types=follow_types)
        self.owner = owner
        self.is_leaf = is_leaf
        self.skeleton = skeleton
        self.reads_values = reads_values
        self.objects: dict[int, Argument] = {}
        self.graph = fx.Graph(tracer_cls=Recorder)
        self.root, self.attributes = self._stand_in(owner)

    def record(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Graph:
        args, kwargs = self._placeholders(args, kwargs)
        with (
            _Recording(self),
            intercept(self._host_function, self._native_function),
            unwritten(args, kwargs, "it writes"),
        ):
            result = self.root.forward(*args, **kwargs)
            self._record_writes()
        self.graph.output(self.create_arg(result))
        self.graph.eliminate_dead_code(has_effect)
        self.graph.lint()
        return self.graph

    def _placeholders(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with proxies in place of tensors, and copies of objects that hold proxies."""
        proxies = []  # one for each argument, also where two of them are the same tensor now: another time they are not
        objects: dict[int, fx.Node] = {}
        for name, tensor in labelled_tensors(self.owner.forward, args, kwargs):
            node = self.graph.placeholder(name)
            if isinstance(tensor, Handle):
                node.meta["hint"], objects[id(tensor.value)] = tensor, node
                continue
            node.meta["hint"] = tensor if is_fake(tensor) else self.skeleton.fake(tensor)
            if self.reads_values and not is_fake(tensor):
                node.meta["value"] = tensor
            proxies.append(self.proxy(node))

        def copied(value: Any, copy: Any) -> None:
            state = {} if is_function(copy) else dict(vars(copy))
            self.objects[id(copy)] = Argument(copy, objects[id(value)], state)

        remaining = iter(proxies)
        substituted: tuple[Any, Any] = substitute((args, kwargs), lambda tensor: next(remaining), copied)
        return substituted

    def _record_writes(self) -> None:
        """What the forward has set of an object that it was given, the graph sets of the object itself."""
        for each in self.objects.values():
            written = each.written()
            for name in written:
                if name not in vars(each.copy):
                    raise NotImplementedError(f"it deletes the {name} of a {type(each.copy).__name__}")
            now = {name: vars(each.copy)[name] for name in written}
            if written:
                vars(each.copy).clear()
                vars(each.copy).update(each.state)
            for name, value in now.items():
                node = self._original(each)
                self.create_node("call_function", setattr, (node, name, self.create_arg(value)), {})

    def _original(self, each: Argument) -> fx.Node:
        return self.create_node("call_function", getattr, (each.handle, "value"), {})

    def _stand_in(self, owner: nn.Module) -> tuple[nn.Module, dict[int, Place]]:
        """A copy of ``owner`` over the same tensors whose leaves, when called, become nodes."""
        root = copy_module(owner, lambda tensor: tensor)
        for path, child in root.named_modules():
            if path and self.is_leaf(child):
                child.forward = self._leaf(path)
        return root, {id(tensor): place for place, tensor in _tensors_of(root)}

    def _leaf(self, path: str) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self.create_proxy("call_module", path, args, kwargs)

        return forward

    def _host_function(
        self, entry: HostFunction, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A host's own attention function is a leaf: the backend that its user chose stays."""
        return self.create_proxy("call_function", function, args, kwargs)

    def _native_function(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.create_proxy("call_function", function, args, kwargs)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *others: Any, **named: Any) -> Any:
        name = target if isinstance(target, str) else getattr(target, "__name__", "")
        if self.reads_values and kind in ("call_method", "call_function") and name in _READING:
            return self._read(name, args, kwargs)
        proxy = super().create_proxy(kind, target, args, kwargs, *others, **named)
        if kind == "call_method" and writes(proxy.node) and is_proxy(args[0]):
            args[0].node = proxy.node  # what is done with the tensor from now on is done with the result
        return proxy

    def _read(self, method: str, args: Any, kwargs: Any) -> Any:
        """What a method that hands values to Python gives, as a constant."""

        def known(each: Any) -> Any:
            return self.value(each.node) if is_proxy(each) else each

        args, kwargs = tuple(map(known, args)), {name: known(each) for name, each in kwargs.items()}
        with torch._C.DisableTorchFunction():
            return getattr(args[0], method)(*args[1:], **kwargs)

    def create_arg(self, a: Any) -> Any:
        if is_proxy(a):  # it answers isinstance(a, torch.Tensor), so ask this first
            return a.node
        if isinstance(a, torch.Tensor):
            return self.attribute(a).node
        if isinstance(a, slice):  # a tensor that says where to cut hands its value to Python
            return super().create_arg(slice(*(_as_bound(each) for each in (a.start, a.stop, a.step))))
        if isinstance(a, np.generic):  # its repr is no code that the generated function could run
            return a.item()
        if id(a) in self.objects:
            if any(each.written() for each in self.objects.values()):
                raise NotImplementedError(f"it hands on a {type(a).__name__} after it has written into its arguments")
            return self._original(self.objects[id(a)])
        if dataclasses.is_dataclass(a) and not isinstance(a, type):  # what models return
            fields = {field.name: getattr(a, field.name) for field in dataclasses.fields(a) if field.init}
            return self.create_node("call_function", type(a), (), self.create_arg(fields))
        if a is self.root:
            raise NotImplementedError("it hands on itself, or a function that closes over itself")
        return super().create_arg(a) if isinstance(a, (*_CONSTANTS, *fx.node.base_types)) else self._object(a)

    def _object(self, value: Any) -> fx.Node:
        """An object that a leaf is given: made anew of what it holds, or itself where it holds no tensors."""
        apart = parts(value) if holds(value) else None
        if apart is not None:
            return self.create_node("call_function", maker(value), (), self.create_arg(apart[1]))
        if holds(value, kinds=(torch.Tensor, nn.Module)):
            raise NotImplementedError(f"it hands on a {type(value).__name__} that holds a module")
        return self.create_node("call_function", constant(value), (), {})

    def attribute(self, tensor: torch.Tensor) -> Any:
        """A parameter, buffer or attribute of the owner, as a node."""
        found = self.attributes.get(id(tensor))
        if found is None:
            raise NotImplementedError(
                f"it uses a tensor of shape {tuple(tensor.shape)} that is no parameter, buffer or attribute of a module"
            )
        name, *keys = found
        proxy = self.proxy(self.create_node("get_attr", name, (), {}))
        for key in keys:
            proxy = proxy[key]
        return proxy

    def create_node(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any | None = None,
    ) -> fx.Node:
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        if kind == "call_module":
            node.meta["module"] = self.owner.get_submodule(target)
        if not self.follow_types:
            node.meta["baked_types"] = True
        node.meta["hint"] = evaluate(node, self.owner, self.skeleton.mode)
        return node


class _Recording(TorchFunctionMode):
    """Records what proxies alone would not see: factories, and functions of parameters alone."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FACTORIES:
            return self.recorder.create_proxy("call_function", func, args, kwargs)
        if func is F.multi_head_attention_forward:  # its projections and its attention are what matters
            with _Recording(self.recorder):
                return _multi_head_attention(*args, **kwargs)
        attributes = self.recorder.attributes
        if not any(id(leaf) in attributes for leaf in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)  # with proxies on to Proxy.__torch_function__; else a hint is being read
        args, kwargs = tree_map(
            lambda leaf: self.recorder.attribute(leaf) if id(leaf) in attributes else leaf, (args, kwargs)
        )
        if func.__name__ == "__get__":  # parameter.dtype, .shape, .device, .ndim
            return getattr(args[0], func.__self__.__name__)
        return HintProxy.__torch_function__(func, types, args, kwargs)


def _as_bound(bound: Any) -> Any:
    return operator.index(bound) if type(bound) is TensorProxy else bound


def _tensors_of(root: nn.Module) -> Iterator[tuple[Place, torch.Tensor]]:
    """Parameters and buffers, and tensors that are plain attributes, or lie in lists and objects that are."""
    modules = [(f"{path}." if path else "", module) for path, module in root.named_modules()]
    for prefix, module in modules:
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                yield from _tensors_in((prefix + name,), value, _DEEPEST)
    for prefix, module in modules:  # of several names for a tensor, that of a parameter counts
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            if value is not None:
                yield (prefix + name,), value


def _tensors_in(place: Place, value: Any, deep: int) -> Iterator[tuple[Place, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield place, value
    elif isinstance(value, (list, tuple, dict)) and deep:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(key, (str, int)):
                yield from _tensors_in((*place, key), item, deep - 1)
    elif len(place) == 1 and hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)) and deep:
        for name, item in vars(value).items():
            yield from _tensors_in((f"{place[0]}.{name}",), item, deep - 1)
