"""What the calls of a model tell about themselves: the size of the latent, and the timestep."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import is_fake

from sloth_fx.errors import SlothError
from sloth_fx.model_adapters import Arguments, ModelAdapter
from sloth_fx.site import LatentSize
from sloth_fx.timeline import whole


class Calls:
    """Reads calls of ``model``, as ``adapter`` says. ``latent`` is the size that the last one had, or that was given
    for calls which do not tell."""

    def __init__(self, model: nn.Module, adapter: ModelAdapter) -> None:
        self._adapter = adapter
        self.arguments = Arguments(model, adapter)
        self.latent: LatentSize | None = None
        self._given: LatentSize | None = None
        self._shape: tuple[int, ...] = ()
        self._around: tuple[int, int] | None = None

    def located_with(
        self, model: nn.Module, adapter: ModelAdapter, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Remember what the call looked like from which the sites are known, and how to read others."""
        self._adapter, self.arguments = adapter, Arguments(model, adapter)
        self._around = self.arguments.around(args, kwargs)

    def resize(self, latent: Sequence[int]) -> None:
        """Raises :class:`SlothError` for what is no size."""
        sizes = [whole(size) for size in latent]
        if len(sizes) not in (2, 3) or any(size is None or size < 1 for size in sizes):
            raise SlothError(f"resize({latent!r}): (rows, columns) or (frames, rows, columns), each 1 or more")
        frames, rows, columns = (1, *map(int, latent))[-3:]
        self.latent = self._given = LatentSize(frames, rows, columns)

    def same_size(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the latent of a call has the size of the last one; it can be asked within a graph."""
        if self._adapter.ids is not None:  # values, which a graph does not have
            return tuple(self.arguments.latent(args, kwargs).shape[1:]) == self._shape
        return (self.arguments.size(args, kwargs) or self._given) == self.latent

    def read_size(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the size of the latent from a call. Raises :class:`SlothError` where it does not tell, or where it packs
        other tokens around those of the image than the model was located with."""
        latent = self.arguments.size(args, kwargs) or self._given
        if latent is None:
            raise SlothError(
                "this call does not tell the size of its latent: no argument is a tensor (B, C, ..., H, W), and if "
                "tokens are packed nothing says how they lie; say so with resize((rows, columns)), or register an "
                "adapter (docs/extending.md)"
            )
        around = self.arguments.around(args, kwargs)
        if self._around not in (None, around):
            raise SlothError(
                f"this call packs {around[0]} tokens before and {around[1]} after those of the image, and the model "
                f"was located with {self._around}: transform it with example_inputs like these"
            )
        self.latent = latent
        self._shape = tuple(getattr(self.arguments.latent(args, kwargs), "shape", ())[1:])

    def timestep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        """The timestep of a call. Raises :class:`SlothError` unless it has one, for all rows of the batch."""
        return _one_number(self.arguments.timestep(args, kwargs))


def _one_number(timestep: Any) -> float:
    if isinstance(timestep, torch.Tensor) and timestep.numel() > 0:
        if torch.compiler.is_exporting() or is_fake(timestep) or timestep.is_meta:
            raise SlothError("the timestep has no value here: drive the context with at(progress)")
        values = set(timestep.flatten().tolist())
        if len(values) > 1:
            raise SlothError(
                f"the timesteps of this batch differ ({min(values):g} to {max(values):g}), so it has no single moment: "
                "drive the context with at(progress), or use schedule=Constant()"
            )
        timestep = values.pop()
    if isinstance(timestep, numbers.Real) and math.isfinite(timestep):
        return float(timestep)
    raise SlothError("this call has no timestep to follow: drive the context with step(i, n) or at(progress)")
