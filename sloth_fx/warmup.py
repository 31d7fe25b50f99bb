"""Compile everything that a sampling run will need, before it starts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sloth_fx.locate import as_call
from sloth_fx.patch import patch_of


def warmup(patched: nn.Module, inputs: Any, *, steps: int | None = None, progress: bool = True) -> int:
    """Run ``patched`` once for each distinct set of strides and tiles, so that compiled code exists for all of them.

    Args:
        patched: a patched model, compiled as it will be used (``torch.compile(patched)``, or with compiled blocks).
        inputs: arguments for it, a dict (by keyword) or a tuple (by position), in the size and the form that will be
            used: torch may compile again for arguments by position where it was warmed up with keywords.
        steps: number of steps of the coming run; default: every set that any run can meet.
        progress: show a progress bar (on stderr, where tqdm is installed).

    Returns:
        How many sets there are. The context is afterwards as it was.
    """
    context = patch_of(patched).context
    args, kwargs = as_call(inputs)
    with torch.no_grad(), context.saved():
        context.at(0.0, context.sigma_at(0.0))
        patched(*args, **kwargs)
        moments = context.moments(steps)
        for moment in _bar(moments) if progress else moments:
            context.at(*moment)
            patched(*args, **kwargs)
    return len(moments)


def _bar(moments: list[Any]) -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return moments
    return tqdm(moments, desc="compiling phases", unit="phase")
