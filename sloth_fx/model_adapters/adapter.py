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

    ``latent`` and ``timestep`` name parameters of ``forward`` (``None``: the latent is the first argument with four or
    more dimensions; there is no timestep to follow). ``noise`` is the schedule the model
    was trained with, which turns its timesteps into sigmas (``None``: unknown, so the caller has to give sigma).
    ``inputs(model)`` makes arguments for a trial run, of which only shapes and dtypes matter.
    """

    latent: str | None
    timestep: str | None
    noise: NoiseSchedule | None = None
    inputs: Callable[[nn.Module], Inputs] | None = None


class Arguments:
    """Reads the latent and the timestep from the arguments of a call of ``model``."""

    def __init__(self, model: nn.Module, adapter: ModelAdapter) -> None:
        self._names = adapter.latent, adapter.timestep
        parameters = list(inspect.signature(model.forward).parameters)
        self._positions = {name: index for index, name in enumerate(parameters)}

    def latent(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The latent (B, C, ..., H, W), or ``None``."""
        if self._names[0] is not None:
            return self._named(self._names[0], args, kwargs)
        return next((value for value in (*args, *kwargs.values()) if latent_size(value) is not None), None)

    def timestep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The timestep (a number, or a tensor of them), or ``None``."""
        return self._named(self._names[1], args, kwargs) if self._names[1] is not None else None

    def _named(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in kwargs:
            return kwargs[name]
        position = self._positions.get(name, len(args))
        return args[position] if position < len(args) else None


def latent_size(latent: Any) -> tuple[int, int] | None:
    """(rows, columns) of a latent (B, C, ..., H, W); ``None`` for anything else."""
    if isinstance(latent, torch.Tensor) and latent.ndim >= 4:
        return int(latent.shape[-2]), int(latent.shape[-1])
    return None
