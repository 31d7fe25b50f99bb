"""Objects that are handed about: a mask made of blocks, a cache of keys, a function that closes over an index.

What such an object holds is part of a call. Python works on a copy of it that holds proxies; a leaf that it is handed
on to gets the object itself, where it came in as an argument, or else one that is made anew:

    new_block_mask(kv_indices=kv_indices, mask_mod=new_mask_mod(closure=(frames, 250)), ...)
"""

from __future__ import annotations

import enum
import functools
import types
from collections import UserDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from sloth_fx.capture.proxy import HintInt

DEEPEST = 4  # objects in each other; further inside they are compared as they are
State = dict[str, Any]


class HandedOn(UserDict[Any, Any]):
    """Options of a host that its modules hand to each other, and that are no part of a call.

    Python that is captured finds it empty; a leaf that it is handed on to gets the one that came in. It is no ``dict``,
    because those are taken apart wherever calls are.

    ``of_groups`` gives the options of a call with some groups of the batch alone, told for each whether it is among
    them. Where it is None nobody can say what of the options goes by groups, and a call keeps all of its rows.
    """

    of_groups: Callable[[tuple[bool, ...]], HandedOn] | None = None


class _Plain:
    """An object whose state is all in its ``__dict__``."""


def parts(value: Any) -> tuple[Any, State] | None:
    """What kind of object ``value`` is, and what it holds by name; ``None`` for what is no such object.

    Objects of one kind differ in what they hold alone. Modules, classes and constants are no such objects.
    """
    if _is_proxy(value):
        return None
    if isinstance(value, HandedOn):
        return HandedOn, {}
    if isinstance(value, types.FunctionType):
        return _parts_of_function(value)
    if isinstance(value, types.MethodType):
        return types.MethodType, {"function": value.__func__, "instance": value.__self__}
    if type(value) is functools.partial:
        return functools.partial, {"function": value.func, "arguments": value.args, "keywords": value.keywords}
    kind = type(value)
    plain = kind.__basicsize__ == _Plain.__basicsize__ and isinstance(getattr(value, "__dict__", None), dict)
    if not plain or isinstance(value, (nn.Module, enum.Enum)):
        return None
    return kind, dict(vars(value))


def maker(value: Any) -> Callable[..., Any]:
    """A function that makes an object like ``value`` of what it is to hold, under a name for generated code."""
    if isinstance(value, types.FunctionType):
        return _named(_maker_of_function(value), f"new_{value.__code__.co_name}")
    if isinstance(value, types.MethodType):
        return _bound
    if type(value) is functools.partial:
        return _partial
    kind = type(value)
    if kind is HandedOn:
        return HandedOn

    def make(**state: Any) -> Any:
        made: Any = object.__new__(kind)
        made.__dict__.update(state)
        return made

    return _named(make, f"new_{kind.__name__}")


@dataclass(frozen=True)
class Argument:
    """An object that Python works on: a copy, whose ``handle`` stands for the original, and what it held at first."""

    copy: Any
    handle: fx.Node
    state: State

    def written(self) -> list[str]:
        """The attributes that are no longer what they were."""
        if is_function(self.copy):
            return []
        now = vars(self.copy)
        return [name for name in {**self.state, **now} if now.get(name, self) is not self.state.get(name, self)]


def is_function(value: Any) -> bool:
    """Whether what ``value`` holds cannot be set."""
    return isinstance(value, (types.FunctionType, types.MethodType, functools.partial))


def holds(value: Any, kinds: type | tuple[type, ...] = torch.Tensor) -> bool:
    """Whether one of these kinds, or a proxy, is within ``value``; modules are not looked into."""
    waiting, seen = [value], {id(value): value}
    while waiting:
        each = waiting.pop()
        if _is_proxy(each) or isinstance(each, kinds):
            return True
        inner = [item for item in _items(each) if id(item) not in seen]
        seen |= {id(item): item for item in inner}
        waiting += inner
    return False


def constant(value: Any) -> Callable[[], Any]:
    """A function that gives ``value`` itself, under a name for generated code."""
    return _named(lambda: value, f"the_{getattr(value, '__name__', type(value).__name__)}")


def _is_proxy(value: Any) -> bool:
    return issubclass(type(value), (fx.Proxy, HintInt))  # whatever it answers to ``isinstance``


def _items(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, (list, tuple)):
        return value
    apart = parts(value)
    return apart[1].values() if apart is not None else ()


def _parts_of_function(function: types.FunctionType) -> tuple[Any, State] | None:
    if not function.__closure__ and not function.__defaults__ and not function.__kwdefaults__:
        return None
    try:
        closure = tuple(cell.cell_contents for cell in function.__closure__ or ())
    except ValueError:  # a name that has no value yet
        return None
    state = {"closure": closure, "defaults": function.__defaults__, "keywords": function.__kwdefaults__}
    return function.__code__, state


def _maker_of_function(function: types.FunctionType) -> Callable[..., Any]:
    code, namespace, attributes = function.__code__, function.__globals__, dict(function.__dict__)

    def make(closure: tuple[Any, ...], defaults: tuple[Any, ...] | None, keywords: State | None) -> Any:
        made = types.FunctionType(code, namespace, code.co_name, defaults, tuple(map(types.CellType, closure)))
        made.__kwdefaults__ = keywords
        made.__dict__.update(attributes)
        return made

    return make


def _bound(function: Callable[..., Any], instance: Any) -> Any:
    return types.MethodType(function, instance)


def _partial(function: Callable[..., Any], arguments: tuple[Any, ...], keywords: State) -> Any:
    return functools.partial(function, *arguments, **keywords)


def _named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    function.__name__ = function.__qualname__ = name
    return function
