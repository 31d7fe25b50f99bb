"""What capture needs of torch that has no public name. ``tests/capture/test_torch_private.py`` guards it."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, NamedTuple


class _Global(NamedTuple):
    module: str
    name: str


# What ``torch.vmap(function)`` calls when it is called: (function, in_dims, out_dims, randomness, chunk, *arguments).
VMAP = _Global("torch._functorch.apis", "vmap_impl")


def undispatched(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of ``torch.nn.functional`` as one that runs its Python code for proxies, too.

    Such a function first asks whether an argument has ``__torch_function__``, and hands itself over if so. The copy
    gets "no" for an answer.
    """
    unasked = {name: lambda *_: False for name in function.__globals__ if name.startswith("has_torch_function")}
    copy = types.FunctionType(
        function.__code__,
        {**function.__globals__, **unasked},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
