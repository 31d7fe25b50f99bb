"""A warning before torch stops compiling in silence, after ``recompile_limit`` graphs of one function."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from sloth_fx.steering import Layouts


class RecompileWarning:
    """Warns once. ``check`` is called before every call of a model, and counts again where ``state`` is another."""

    def __init__(self) -> None:
        self._counted: tuple[Any, ...] | None = None
        self._warned = False

    def check(
        self, model: nn.Module, compiled: bool, state: tuple[Any, ...], sets: Callable[[], Iterable[Layouts]]
    ) -> None:
        """``sets`` are those of layouts that the run goes through; ``compiled``: the call is of a compiled module."""
        state = (*state, compiled)
        if self._warned or self._counted == state:
            return
        self._counted = state
        if not compiled and all(module._compiled_call_impl is None for module in model.modules()):
            return
        limit = torch._dynamo.config.recompile_limit
        distinct = set(sets())
        # Blocks compiled one by one are one function to torch, whose graphs are the distinct layouts of all of them.
        graphs = len(distinct) if compiled else len({layout for each in distinct for layout in each})
        if graphs > limit:
            self._warned = True
            warnings.warn(
                f"this schedule goes through {graphs} distinct sets of strides and tiles, each a compiled graph, and "
                f"torch stops compiling after {limit}: transform with phases={limit} or raise "
                "torch._dynamo.config.recompile_limit",
                stacklevel=2,
            )
