"""How the adapter of a model is found: by class name, so that no host library is imported."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields as fields_of
from dataclasses import replace
from typing import Any

from torch import nn

from sloth_fx.checks import unknown
from sloth_fx.errors import SlothError
from sloth_fx.model_adapters import audio, controlnet, image, packed, packed_video, unet, video
from sloth_fx.model_adapters.adapter import Inputs, ModelAdapter
from sloth_fx.model_adapters.parameters import PARAMETERS
from sloth_fx.model_adapters.trial import Size, Trial, TrialInputs, config_of

BUILT_IN: dict[str, ModelAdapter] = {
    name: adapter
    for module in (unet, image, packed, video, packed_video, audio, controlnet)
    for name, adapter in module.ADAPTERS.items()
}
_registered: dict[str, ModelAdapter] = {}

_TIMESTEP_NAMES = ("timestep", "timesteps", "t", "time", "timestep_ratio", "sigma")
_SIZE_NAMES = ("num_frames", "height", "width")
_CONVOLVED: dict[type[nn.Module], str] = {nn.Conv1d: "bcw", nn.Conv2d: "bchw", nn.Conv3d: "bcthw"}
_FILMS = ("3D", "Video", "Motion", "Temporal")
_FIELDS = tuple(field.name for field in fields_of(ModelAdapter))


def register_adapter(
    cls_or_name: type[nn.Module] | str, adapter: ModelAdapter | None = None, **fields: Any
) -> ModelAdapter:
    """Say what the arguments of a model class mean; from now on models of it, and of its subclasses, follow this.

    ``cls_or_name`` is the class or its name (with its module, ``"host.models.Denoiser"``, where other classes have the
    same name), ``adapter`` an adapter to begin with, and ``fields`` are fields of
    :class:`ModelAdapter`: ``register_adapter("MyDenoiser", latent="z", ids="positions", timesteps=1)``. It replaces
    what was registered, or built in, for a class of that name. Returns the adapter.

    Raises :class:`SlothError` for an unknown field, a value that makes no sense, or nothing to register.
    """
    if isinstance(cls_or_name, type) and issubclass(cls_or_name, nn.Module):
        name = cls_or_name.__name__
    elif isinstance(cls_or_name, str) and all(part.isidentifier() for part in cls_or_name.split(".")):
        name = cls_or_name
    else:
        raise SlothError(f"register_adapter({cls_or_name!r:.80}): give a class of modules, or the name of one")
    if adapter is not None and not isinstance(adapter, ModelAdapter):
        raise SlothError(f"register_adapter({name}, {adapter!r:.80}): give a ModelAdapter, or fields of one by name")
    if adapter is None and not fields:
        raise SlothError(f"register_adapter({name}): nothing to register; fields are {', '.join(_FIELDS)}")
    for field in fields:
        if field not in _FIELDS:
            raise SlothError(f"register_adapter({name}): field {unknown(field, _FIELDS)}")
    _registered[name] = replace(adapter or ModelAdapter(), **fields)
    return _registered[name]


@contextmanager
def assumed(model: nn.Module, adapter: ModelAdapter) -> Iterator[None]:
    """While it is entered, ``adapter`` is that of the class of ``model``, built-in ones of that name notwithstanding,
    unless somebody has registered another for it or a base of it."""
    names = _names_of(model)
    if any(name in _registered for name in names):
        yield
        return
    _registered[names[0]] = adapter
    try:
        yield
    finally:
        del _registered[names[0]]


def adapter_for(model: nn.Module) -> ModelAdapter:
    """The adapter registered for the class of ``model`` or a base of it, or the built-in one.

    Where there is none, or it leaves the timestep or the trial inputs open, they are read off the signature of forward
    and the config. A latent of which something says how its tokens lie is packed.
    """
    parameters = list(inspect.signature(model.forward).parameters)
    adapter = _described(model) or _read_off(parameters)
    if adapter.axes is None and (adapter.ids or adapter.shapes or adapter.sizes) is not None:
        adapter = replace(adapter, axes="bnc")
    if adapter.timestep is None:
        adapter = replace(adapter, timestep=next((name for name in _TIMESTEP_NAMES if name in parameters), None))
    if adapter.inputs is None and config_of(model):
        axes = adapter.axes or _axes_of(model)
        sizes: dict[str, Size] = {"frames": 3} if "t" in axes or adapter.sizes == _SIZE_NAMES else {}
        if levels := Trial(model, {}).field("block_out_channels"):
            sizes |= {"height": 8 << len(levels), "width": 12 << len(levels)}
        adapter = replace(adapter, inputs=TrialInputs(adapter.latent, axes, PARAMETERS, sizes=sizes))
    return adapter


def is_known(model: nn.Module) -> bool:
    """Whether the class of ``model``, or a base of it, has an adapter of its own."""
    return _described(model) is not None


def trial_call(model: nn.Module, adapter: ModelAdapter) -> tuple[tuple[()], Inputs] | None:
    """(args, kwargs) for a trial run of ``model``; ``None`` where nobody knows what it takes.

    Raises :class:`SlothError` where the adapter of a known class fails to make them.
    """
    if adapter.inputs is None:
        return None
    try:
        return (), adapter.inputs(model)
    except SlothError:
        if is_known(model):
            raise
        return None


def _described(model: nn.Module) -> ModelAdapter | None:
    names = _names_of(model)
    return next((known[name] for name in names for known in (_registered, BUILT_IN) if name in known), None)


def _names_of(model: nn.Module) -> list[str]:
    return [name for base in type(model).__mro__ for name in (f"{base.__module__}.{base.__name__}", base.__name__)]


def _read_off(parameters: list[str]) -> ModelAdapter:
    """What the names of forward's parameters say of a model that nobody has described."""
    if "img_ids" in parameters:
        return ModelAdapter(ids="img_ids")
    if "img_shapes" in parameters:
        return ModelAdapter(shapes="img_shapes")
    if set(_SIZE_NAMES) <= set(parameters):
        return ModelAdapter(sizes=_SIZE_NAMES)
    return ModelAdapter()


def _axes_of(model: nn.Module) -> str:
    """The axes of the latent to try a model with that nobody has described."""
    if any(word in type(model).__name__ for word in _FILMS):
        return "bcthw"
    convolved = (axes for module in model.modules() for kind, axes in _CONVOLVED.items() if isinstance(module, kind))
    return next(convolved, "bchw")
