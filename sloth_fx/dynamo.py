"""What the context needs of TorchDynamo and torch does not offer in public. A test guards it.

Forward hooks of a compiled module run outside its graph, as Python; but while a compiled module runs, TorchDynamo
looks at every Python function that is called, and would compile our hook as a graph of its own. Nothing here imports
TorchDynamo before it is needed: that takes longer than importing torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._C._dynamo.eval_frame import get_eval_frame_callback

__all__ = ["get_eval_frame_callback", "never_compile", "outside_graphs"]


def never_compile(function: Callable[..., Any]) -> None:
    """TorchDynamo shall not compile ``function`` by itself; it may still inline it into a graph that calls it."""
    from torch._dynamo.eval_frame import skip_code

    skip_code(function.__code__)


def outside_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, such that it and all it calls run as plain Python whoever calls it; in a graph that is a break."""
    disabled: Callable[..., Any] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return disabled
