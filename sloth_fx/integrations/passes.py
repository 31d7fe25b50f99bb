"""Pipelines that call their model once for each text, and say which with the name of a cache context."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_METHOD = "cache_context"
_NAME = "_sloth_fx_pass"
_NAMES = ("cond", "uncond")


def name_passes(model: nn.Module) -> None:
    """From now on remember which cache context ``model`` is called in, if it has such."""
    if hasattr(type(model), _METHOD):
        model.__dict__[_METHOD] = types.MethodType(_named, model)


def unname_passes(model: nn.Module) -> None:
    """Undo it."""
    model.__dict__.pop(_METHOD, None)


def named_pass(model: nn.Module) -> str | None:
    """ "cond" or "uncond", if the pipeline says so of the call that it is about to make."""
    name = model.__dict__.get(_NAME)
    return name if name in _NAMES else None


@contextmanager
def _named(model: Any, name: str, **options: Any) -> Iterator[None]:
    model.__dict__[_NAME] = name
    try:
        with type(model).cache_context(model, name, **options):
            yield
    finally:
        model.__dict__.pop(_NAME, None)
