"""What a call looks like: which of its arguments are tensors, and which constants stand between them.

A captured graph takes the tensors of a call in the order in which they occur, and its objects, each before the tensors
that it holds; everything else (``None``, flags, numbers) was part of the control flow that was captured. The *pattern*
of a call is that rest, and two calls with equal patterns are served by one capture.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from sloth_fx.branching.lengths import Length, comparable
from sloth_fx.capture.objects import DEEPEST, holds, is_function, maker, parts


class Handle:
    """An object of a call, among its tensors: ``value``, with as much of a tensor as calls are told apart by."""

    ndim, shape, dtype, device = 0, torch.Size(()), None, None

    def __init__(self, value: Any) -> None:
        self.value = value


def read_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], list[torch.Tensor]]:
    """The pattern of a call, comparable with ``==``, and its tensors in order, with a :class:`Handle` for each object.

    Runs at every call of a patched module, under ``torch.compile`` as well: so it is plain Python on few values.
    """
    tensors: list[Any] = []
    pattern = [_pattern(value, tensors) for value in args]
    for name, value in kwargs.items():
        pattern.append((name, _pattern(value, tensors)))
    return tuple(pattern), tensors


def _pattern(value: Any, tensors: list[Any], deep: int = DEEPEST) -> Any:
    if isinstance(value, torch.Tensor) or hasattr(type(value), "__torch_function__"):  # or what stands for one
        tensors.append(value)
        return ...
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)):
        return (type(value).__name__, value)  # 1, 1.0 and True are equal but not the same
    if isinstance(value, Length):
        return (type(value).__name__, *comparable([value]))
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *[_pattern(item, tensors, deep) for item in value])
    if isinstance(value, dict):
        return ("dict", *[(key, _pattern(item, tensors, deep)) for key, item in value.items()])
    if isinstance(value, np.ndarray):
        return ("ndarray", value.shape, value.dtype.str, value.tobytes())
    apart = parts(value) if deep else None
    if apart is None:
        return value
    tensors.append(Handle(value))
    kind, state = apart
    return (kind, *[(name, _pattern(item, tensors, deep - 1)) for name, item in state.items()])


def labelled_tensors(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors and handles of a call in the order of :func:`read_call`, each with the name of its parameter."""
    positional = [
        parameter.name
        for parameter in inspect.signature(forward).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    for index, value in enumerate(args):
        yield from _labelled(positional[index] if index < len(positional) else f"arg_{index}", value)
    for name, value in kwargs.items():
        yield from _labelled(name, value)


def _labelled(name: str, value: Any, deep: int = DEEPEST) -> Iterator[tuple[str, Any]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _labelled(f"{name}_{key}", item, deep)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _labelled(f"{name}_{index}", item, deep)
    elif deep and not _is_plain(value) and (apart := parts(value)) is not None:
        yield name, Handle(value)
        for key, item in apart[1].items():
            yield from _labelled(f"{name}_{key}", item, deep - 1)


def substitute(
    value: Any,
    convert: Callable[[torch.Tensor], Any],
    copied: Callable[[Any, Any], None] = lambda value, copy: None,
    deep: int = DEEPEST,
) -> Any:
    """``value`` with each tensor, in the order of :func:`read_call`, replaced by what ``convert`` makes of it.

    Containers and objects are new ones, functions where they hold tensors; ``copied`` is told of the objects.
    """
    if isinstance(value, torch.Tensor):
        return convert(value)
    if isinstance(value, (list, tuple)):
        items = [substitute(item, convert, copied, deep) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: substitute(item, convert, copied, deep) for key, item in value.items()}
    apart = parts(value) if deep and not _is_plain(value) else None
    if apart is None:
        return value
    state = {name: substitute(item, convert, copied, deep - 1) for name, item in apart[1].items()}
    copy = maker(value)(**state) if holds(value) or not is_function(value) else value
    copied(value, copy)
    return copy


@contextmanager
def unwritten(args: tuple[Any, ...], kwargs: dict[str, Any], who: str) -> Iterator[None]:
    """Raises NotImplementedError if the lists, dicts and objects of a call hold something else afterwards.

    A graph makes such containers anew: whoever waits for what is written into them would wait in vain.
    """
    before = _content(args, kwargs)
    yield
    if _content(args, kwargs) != before:
        raise NotImplementedError(f"{who} into a list, a dict or an object that it is given")


def _content(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, list[int]]:
    pattern, tensors = read_call(args, kwargs)
    return pattern, [id(each.value if isinstance(each, Handle) else each) for each in tensors]


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))
