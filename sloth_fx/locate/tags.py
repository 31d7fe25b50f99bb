"""The places that a tensor carries, as an attribute of the tensor itself: they end with it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from sloth_fx.locate.places import NOWHERE, Places

_PLACES = "_sloth_fx_places"
_FOLLOWS = "_sloth_fx_follows"


def places_of(tensor: torch.Tensor) -> Places | None:
    """The places of a tensor's elements; ``None`` where no input has a part in it, or nobody knows."""
    places: Places | None = getattr(tensor, _PLACES, None)
    return places


def places_or_nowhere(tensor: torch.Tensor) -> Places:
    """The places of a tensor's elements, ``NOWHERE`` where it has none."""
    places = places_of(tensor)
    return places if places is not None else np.broadcast_to(np.int64(NOWHERE), tuple(tensor.shape))


def set_places(tensor: torch.Tensor, places: Places | None) -> None:
    """Give ``tensor`` its places; it loses those it had where they are ``None`` or of another shape."""
    if places is not None and tuple(places.shape) == tuple(tensor.shape):
        mark(tensor, _PLACES, places)
    elif hasattr(tensor, _PLACES):
        delattr(tensor, _PLACES)


def follows(tensor: torch.Tensor) -> bool:
    """Whether an input that is followed has a part in a tensor, though nobody may know which."""
    return hasattr(tensor, _PLACES) or hasattr(tensor, _FOLLOWS)


def note_followers(outputs: Iterable[torch.Tensor], inputs: Iterable[torch.Tensor]) -> None:
    """Remember which tensors an input that is followed has a part in."""
    if any(map(follows, inputs)):
        for output in outputs:
            mark(output, _FOLLOWS, True)


def mark(tensor: torch.Tensor, name: str, value: Any) -> None:
    """Note ``value`` on the tensor, under ``name``."""
    setattr(tensor, name, value)
