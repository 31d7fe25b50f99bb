"""Arguments and results of a model: values in lists, tuples, dicts and outputs, as deep as a host nests them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


def mapped(function: Callable[..., Any], value: Any, *others: Any) -> Any:
    """``value`` with all that is no container what ``function`` makes of it, and of what lies there in the ``others``.

    Containers are new ones: what a host takes out of them it does not take out of ``value``.
    """
    if isinstance(value, dict):
        changed = {name: mapped(function, each, *(other[name] for other in others)) for name, each in value.items()}
        return type(value)(**changed) if hasattr(value, "__dataclass_fields__") else changed
    if isinstance(value, (list, tuple)):
        items = [mapped(function, *each) for each in zip(value, *others, strict=True)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return function(value, *others)


def copied(value: Any) -> Any:
    """``value`` in containers of its own."""
    return mapped(lambda each: each, value)


def leaves(value: Any) -> Iterator[Any]:
    """All that is no container."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from leaves(each)
    else:
        yield value
