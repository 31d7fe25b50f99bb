"""Inputs for a trial run of a model, made from its config and the signature of its forward.

Each parameter is described by a *value*:

- text, which is a tensor: dimensions between spaces, each a number, a size (``batch``, ``text``, ``tokens``, ...), a
  field of the config (of a list, its first entry), a sum of such, or alternatives between bars: ``"batch text
  joint_attention_dim|cross_attention_dim"``. It may begin with ``long`` or ``bool``, and end with ``if FIELD``: left
  out unless that field of the config is set;
- a list, tuple or dict of values;
- a function of the :class:`Trial`; what it returns is given as it is;
- anything else is given as it is, and ``None`` means: leave the parameter out.

Floating point tensors have the model's dtype and lie on ``meta``. Whole numbers and masks are real: zeros, and all
true.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import nn

from sloth_fx.errors import SlothError
from sloth_fx.model_adapters.adapter import Inputs

Value: TypeAlias = Any
Values: TypeAlias = Mapping[str, Value]
Size: TypeAlias = int | str | Callable[["Trial"], int]

LATENT_CHANNELS = "in_channels|in_visual_dim|in_dim|io_channels|latent_channel|latent_dim|out_channels"

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_AXES = {"b": "batch", "t": "time", "h": "height", "w": "width", "n": "tokens"}
_SIZES: dict[str, Size] = {
    "batch": 2,
    "text": 13,
    "frames": 1,  # tokens
    "rows": 8,
    "columns": 12,
    "time": lambda trial: trial.size("frames") * trial.patch[0],  # pixels of the latent
    "height": lambda trial: trial.size("rows") * trial.patch[1],
    "width": lambda trial: trial.size("columns") * trial.patch[2],
    "tokens": lambda trial: trial.size("frames") * trial.size("rows") * trial.size("columns"),
}


class UnknownError(Exception):
    """Neither the sizes nor the config know a term."""


class Trial:
    """One model, and the sizes of its trial run."""

    def __init__(self, model: nn.Module, sizes: Mapping[str, Size]) -> None:
        self.model = model
        self.config = config_of(model)
        self.dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        self._sizes = {**_SIZES, **sizes}

    def field(self, name: str, default: Any = None) -> Any:
        """A field of the config; ``default`` where it has none, or ``None`` there."""
        found = self.config.get(name) if isinstance(self.config, Mapping) else getattr(self.config, name, None)
        return default if found is None else found

    def size(self, terms: str) -> int:
        """The first of the alternatives ``terms`` that is known. Raises :class:`UnknownError` if none is."""
        for term in terms.split("|"):
            parts = [self._number(part) for part in term.replace("-", "+-").split("+")]
            total = sum(part for part in parts if part is not None)
            if None not in parts and total > 0:
                return total
        raise UnknownError(terms)

    def _number(self, name: str) -> int | None:
        if name.startswith("-"):
            number = self._number(name[1:])
            return None if number is None else -number
        if name.isdigit():
            return int(name)
        found: Any = self._sizes.get(name)
        if isinstance(found, str):
            return self.size(found)
        if callable(found):
            return int(found(self))
        found = self.field(name) if found is None else found
        while isinstance(found, (list, tuple)) and found:
            found = found[0]
        return int(found) if isinstance(found, (int, float)) else None

    def tensor(self, description: str) -> torch.Tensor | None:
        """The tensor that ``description`` (see above) stands for; ``None`` where its condition does not hold."""
        description, _, condition = description.partition(" if ")
        if condition and not any(self.field(name) for name in condition.split("|")):
            return None
        kind, _, dimensions = description.partition(" ")
        if kind not in ("long", "bool"):
            return self.zeros(*(self.size(term) for term in description.split()))
        shape = [self.size(term) for term in dimensions.split()]
        return torch.ones(shape, dtype=torch.bool) if kind == "bool" else torch.zeros(shape, dtype=torch.int64)

    def zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=self.dtype, device="meta")

    def value(self, value: Value) -> Any:
        """What ``value`` (see above) stands for."""
        if isinstance(value, str):
            return self.tensor(value)
        if isinstance(value, (list, tuple)):
            return type(value)(self.value(item) for item in value)
        if isinstance(value, dict):
            return {name: self.value(item) for name, item in value.items()}
        return value(self) if callable(value) else value

    @property
    def patch(self) -> tuple[int, int, int]:
        """Frames, rows and columns of the latent that make one token."""
        given = self.field("patch_size", 1)
        patch = list(given) if isinstance(given, (list, tuple)) else [given, given]
        time = patch.pop(0) if len(patch) == 3 else self.field("patch_size_t", 1)
        return time, patch[0], patch[-1]

    def grid_ids(self, *, columns: int = 3) -> torch.Tensor:
        """(tokens, columns) coordinates: frame, row, column, and zeros. Real, because hosts may look at them."""
        grid = [torch.arange(self.size(name), dtype=torch.float32) for name in ("frames", "rows", "columns")]
        return nn.functional.pad(torch.cartesian_prod(*grid), (0, columns - 3))


@dataclass(frozen=True)
class TrialInputs:
    """Makes keyword arguments for a trial run of a model: ``TrialInputs(...)(model)``.

    ``latent`` is the parameter that holds the latent (``None``: the first of forward), ``axes`` its axes and
    ``channels`` its channels, in terms as above. ``values`` comes before the general table of parameters, ``sizes``
    before the general sizes.
    """

    latent: str | None
    axes: str
    general: Values
    channels: str = LATENT_CHANNELS
    sizes: Mapping[str, Size] = field(default_factory=dict)
    values: Values = field(default_factory=dict)

    def __call__(self, model: nn.Module) -> Inputs:
        """Raises :class:`SlothError` where a parameter that the model needs is not known."""
        trial = Trial(model, self.sizes)
        parameters = inspect.signature(model.forward).parameters
        latent = self.latent or next(iter(parameters), "")
        dimensions = " ".join(_AXES.get(axis, self.channels) for axis in self.axes)
        values = {**self.general, latent: dimensions, **self.values}
        inputs: Inputs = {}
        for name, parameter in parameters.items():
            found, why = None, "nothing is known of it"
            try:
                found = trial.value(values.get(name))
            except UnknownError as unknown:
                why = f"the config has no {unknown}".replace("|", " or ")
            if found is not None:
                inputs[name] = found
            elif parameter.default is parameter.empty and parameter.kind not in _VARIADIC:
                raise SlothError(
                    f"{type(model).__name__}: what to give {name!r} in a trial run is not known ({why}); "
                    "give example_inputs, or register an adapter that makes inputs"
                )
        return inputs


def config_of(model: nn.Module) -> Any:
    """The config of the model, or of the first module in it that has one; an empty one if there is none."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return next((config for config in configs if config is not None), {})
