"""What a call looks like: which of its arguments are tensors, and which constants stand between them.

A captured graph takes the tensors of a call in the order in which they occur; everything else (``None``, flags,
numbers) was part of the control flow that was captured. The *pattern* of a call is that rest, and two calls with equal
patterns are served by one capture.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch


def read_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], list[torch.Tensor]]:
    """The pattern of a call, comparable with ``==``, and its tensors in order.

    Runs at every call of a patched module, under ``torch.compile`` as well: so it is plain Python on few values.
    """
    tensors: list[torch.Tensor] = []
    pattern = [_pattern(value, tensors) for value in args]
    for name, value in kwargs.items():
        pattern.append((name, _pattern(value, tensors)))
    return tuple(pattern), tensors


def _pattern(value: Any, tensors: list[torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return ...
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)):
        return (type(value).__name__, value)  # 1, 1.0 and True are equal but not the same
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *[_pattern(item, tensors) for item in value])
    if isinstance(value, dict):
        return ("dict", *[(key, _pattern(item, tensors)) for key, item in value.items()])
    return value


def labelled_tensors(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a call in the order of :func:`read_call`, each with the name of its parameter."""
    positional = [
        parameter.name
        for parameter in inspect.signature(forward).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    for index, value in enumerate(args):
        yield from _labelled(positional[index] if index < len(positional) else f"arg_{index}", value)
    for name, value in kwargs.items():
        yield from _labelled(name, value)


def _labelled(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _labelled(f"{name}_{key}", item)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _labelled(f"{name}_{index}", item)
