"""A ``torch.fx`` proxy that knows the value it stands for.

``torch.fx.symbolic_trace`` stops at the first ``if x.ndim == 4`` or ``b, n, c = x.shape``, which every attention module
has. A :class:`HintProxy` carries a *hint*: the fake tensor, integer or dtype that its node evaluates to. Questions
whose answer steers Python (``bool``, ``len``, ``int``, iteration, ``ndim``) are answered from the hint; everything
that may change from call to call (shapes, dtypes, devices) is recorded as a node, so that the captured graph serves
other sizes and types as well.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import fx

from sloth_fx.capture.values import behind, value_of

# What a tensor is rather than what it holds: the same for every call that follows the same path through the code.
_CONCRETE = frozenset(
    {"ndim", "layout", "is_cuda", "is_meta", "is_nested", "is_quantized", "is_sparse", "requires_grad"}
    | {"dim", "ndimension", "is_floating_point", "is_complex", "grad_fn", "names", "is_leaf"}
)
# Read as nodes, so that the graph follows the tensor that arrives and not the one it was captured with.
_RECORDED = frozenset({"shape", "dtype", "device", "T", "mT", "H", "mH", "real", "imag", "data", "itemsize", "nbytes"})

_OWN = frozenset({"node", "tracer", "hint", "_decide"})


class HintTracer(fx.Tracer):
    """A tracer whose nodes have hints.

    ``type_steered``: a dtype or device has decided a branch or a number. ``steered_by``: for each decision in turn, the
    integers that it was made from; at another size they are the same only if none of them is a size. ``read`` are the
    placeholders whose values Python has seen.
    """

    def __init__(self, *, follow_types: bool) -> None:
        super().__init__()
        self.follow_types = follow_types
        self.type_steered = not follow_types
        self.steered_by: list[tuple[int, ...]] = []
        self.read: set[fx.Node] = set()

    def decide(self, node: fx.Node) -> Any:
        """The value of ``node``, which is about to steer Python: it becomes part of the capture."""
        hint, parents = node.meta["hint"], behind(node)
        of_type = isinstance(hint, (torch.dtype, torch.device))
        depends = isinstance(hint, torch.Tensor) or any("depends_on_data" in each.meta for each in parents)
        value = self.value(node) if depends and not of_type else hint
        self.type_steered = self.type_steered or any(
            each.target is getattr and each.args[1] in ("dtype", "device") for each in parents
        )
        self.steered_by.append(tuple(hint for each in parents if type(hint := each.meta["hint"]) is int))
        return value

    def value(self, node: fx.Node) -> Any:
        """The value of ``node``, computed from those of arguments, which become part of the capture.

        Raises NotImplementedError where it depends on tensors without values.
        """
        value, sources = value_of(node)
        self.read |= sources
        return value

    def proxy(self, node: fx.Node) -> Any:
        hint = node.meta["hint"]
        if isinstance(hint, torch.Tensor):
            return TensorProxy(node, self)
        return HintInt(node, self) if type(hint) is int else HintProxy(node, self)


class HintProxy(fx.Proxy):
    """Stands for the value of ``node``, whose hint lies in ``node.meta["hint"]``."""

    tracer: HintTracer

    @property
    def hint(self) -> Any:
        return self.node.meta["hint"]

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        hint = self.hint
        return type(hint) if isinstance(hint, (bool, float, torch.Size)) or is_opaque(hint) else HintProxy

    def __getattr__(self, name: str) -> Any:
        hint = self.node.meta["hint"]
        if name in ("_is_param", "_is_buffer"):  # isinstance(x, nn.Parameter)
            return False
        if name.startswith("__"):
            raise AttributeError(name)
        if isinstance(hint, torch.Tensor):
            if name in _CONCRETE:
                return getattr(hint, name)
            if name in ("dtype", "device") and not self.tracer.follow_types:
                return getattr(hint, name)
            if name in _RECORDED:
                return self.tracer.create_proxy("call_function", getattr, (self, name), {})
        elif isinstance(hint, (torch.device, torch.dtype)):
            return getattr(self._decide(), name)
        elif is_opaque(hint) and not callable(value := getattr(hint, name)):
            found = self.tracer.create_proxy("call_function", getattr, (self, name), {})
            return value if value is None or isinstance(value, str) else found
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if "node" in self.__dict__ and is_opaque(self.node.meta["hint"]):
            raise NotImplementedError(f"it sets the {name} of a {type(self.node.meta['hint']).__name__}")
        super().__setattr__(name, value)

    def _decide(self) -> Any:
        return self.tracer.decide(self.node)

    def __bool__(self) -> bool:
        return bool(self._decide())

    def __int__(self) -> int:
        return int(self._decide())

    def __index__(self) -> int:
        return operator.index(self._decide())

    def __float__(self) -> float:
        return float(self._decide())

    def __round__(self, *digits: int) -> Any:
        return self.tracer.create_proxy("call_function", round, (self, *digits), {})

    def __floor__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.floor, (self,), {})

    def __ceil__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.ceil, (self,), {})

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        """NumPy computes with the value: it becomes part of the capture."""
        return np.asarray(self._decide(), *args)

    def __len__(self) -> int:
        return len(self.hint)

    def __iter__(self) -> Iterator[Any]:
        return iter([self[index] for index in range(len(self.hint))])  # type: ignore[index]

    def __hash__(self) -> int:
        return id(self)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


class TensorProxy(HintProxy, torch.Tensor):  # type: ignore[misc]
    """A proxy that is a tensor: torch's argument parser looks into whatever says of itself that it is one.

    The tensor is on ``meta`` and nobody's business; every attribute and method is the proxy's.
    """

    @staticmethod
    def __new__(cls, node: fx.Node, tracer: HintTracer) -> TensorProxy:
        hint = node.meta["hint"]
        with torch._C.DisableTorchFunction():
            return torch.empty(hint.shape, dtype=hint.dtype, device="meta").as_subclass(cls)

    __class__ = property(lambda self: TensorProxy)

    def __getattribute__(self, name: str) -> Any:
        if name in _OWN or (name.startswith("__") and name.endswith("__")):
            return object.__getattribute__(self, name)
        return HintProxy.__getattr__(self, name)


class HintInt(int):
    """A traced integer that is an ``int``: ``torch.empty(n, ...)`` and ``range(n)`` take nothing less.

    It cannot be an ``fx.Proxy`` as well (torch's argument parser refuses integers with ``__torch_function__``), so its
    arithmetic is recorded here.
    """

    node: fx.Node
    tracer: HintTracer

    def __new__(cls, node: fx.Node, tracer: HintTracer) -> HintInt:
        self = int.__new__(cls, node.meta["hint"])
        self.node, self.tracer = node, tracer
        return self

    __hash__ = int.__hash__

    def __bool__(self) -> bool:
        return bool(self.tracer.decide(self.node))


def _recorded(function: Callable[..., Any], *, reflected: bool = False) -> Callable[..., Any]:
    def method(self: HintInt, *others: Any) -> Any:
        operands = (*others, self) if reflected else (self, *others)
        return self.tracer.create_proxy("call_function", function, operands, {})

    return method


for _name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "pow"):
    setattr(HintInt, f"__{_name}__", _recorded(getattr(operator, _name)))
    setattr(HintInt, f"__r{_name}__", _recorded(getattr(operator, _name), reflected=True))
for _name in ("eq", "ne", "lt", "le", "gt", "ge", "neg"):
    setattr(HintInt, f"__{_name}__", _recorded(getattr(operator, _name)))


def is_opaque(hint: object) -> bool:
    """Whether ``hint`` is an object whose class alone knows what it is, such as a mask made of blocks."""
    plain = isinstance(hint, (torch.Tensor, tuple, list, dict)) or callable(hint)
    return hasattr(hint, "__dict__") and not plain


def is_proxy(value: object) -> bool:
    """Whether ``value`` really is a proxy, whatever it answers to ``isinstance``."""
    return issubclass(type(value), (HintProxy, HintInt))
