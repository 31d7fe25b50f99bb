"""The adapter of a model, and how one is found: by class name, so that no host library is imported."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sloth_fx.schedule import NoiseSchedule

Inputs = dict[str, Any]
_TIMESTEP_NAMES = ("timestep", "timesteps", "t", "time")


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


def adapter_for(model: nn.Module) -> ModelAdapter:
    """The adapter registered for the class of ``model`` or a base of it; else one read off its ``forward``."""
    from sloth_fx.model_adapters.unet import ADAPTERS

    for base in type(model).__mro__:
        if base.__name__ in ADAPTERS:
            return ADAPTERS[base.__name__]
    names = list(inspect.signature(model.forward).parameters)
    return ModelAdapter(
        latent=names[0] if names else None,
        timestep=next((name for name in _TIMESTEP_NAMES if name in names), None),
    )


def latent_size(latent: Any) -> tuple[int, int] | None:
    """(rows, columns) of a latent (B, C, ..., H, W); ``None`` for anything else."""
    if isinstance(latent, torch.Tensor) and latent.ndim >= 4:
        return int(latent.shape[-2]), int(latent.shape[-1])
    return None

