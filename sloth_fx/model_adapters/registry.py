"""How the adapter of a model is found: by class name, so that no host library is imported."""

from __future__ import annotations

import inspect

from torch import nn

from sloth_fx.model_adapters.adapter import ModelAdapter
from sloth_fx.model_adapters.unet import ADAPTERS

_TIMESTEP_NAMES = ("timestep", "timesteps", "t", "time")


def adapter_for(model: nn.Module) -> ModelAdapter:
    """The adapter registered for the class of ``model`` or a base of it; else one read off its ``forward``."""
    for base in type(model).__mro__:
        if base.__name__ in ADAPTERS:
            return ADAPTERS[base.__name__]
    names = list(inspect.signature(model.forward).parameters)
    return ModelAdapter(
        latent=None,
        timestep=next((name for name in _TIMESTEP_NAMES if name in names), None),
    )
