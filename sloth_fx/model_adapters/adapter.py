"""What an adapter holds."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sloth_fx.schedule import NoiseSchedule

Inputs = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ModelAdapter:
    """Data about one family of models.

    ``latent`` and ``timestep`` name parameters of ``forward`` (``None``: unknown). ``noise`` is the schedule the model
    was trained with, which turns its timesteps into sigmas (``None``: unknown, so the caller has to give sigma).
    ``inputs(model)`` makes arguments for a trial run, of which only shapes and dtypes matter.
    """

    latent: str | None
    timestep: str | None
    noise: NoiseSchedule | None = None
    inputs: Callable[[nn.Module], Inputs] | None = None

    @staticmethod
    def argument(model: nn.Module, name: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a call of ``model`` gives its parameter ``name``; ``None`` where it gives nothing."""
        if name is None or name in kwargs:
            return kwargs.get(name) if name is not None else None
        return dict(zip(inspect.signature(model.forward).parameters, args, strict=False)).get(name)


def latent_size(latent: Any) -> tuple[int, int] | None:
    """(rows, columns) of a latent (B, C, ..., H, W); ``None`` for anything else."""
    if isinstance(latent, torch.Tensor) and latent.ndim >= 4:
        return int(latent.shape[-2]), int(latent.shape[-1])
    return None

