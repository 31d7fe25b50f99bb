"""The tokens of an attention by row of the batch, whatever heads are folded into it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from sloth_fx.locate.places import Places, collapse, varies
from sloth_fx.locate.tags import places_of


def rows_of(tensor: torch.Tensor) -> Places | None:
    """The places of tokens (B, H, N, D), (B * H, N, D) or (B, N, D), by row of the batch."""
    places = places_of(tensor)
    return rows_of_places(places) if places is not None else None


def rows_of_places(places: Places) -> Places:
    """Of places (..., N, D): (rows, N). Heads all have the same tokens; windows do not, and are rows of their own."""
    places = places[..., 0]
    for axis in _heads_axes(places):
        places = collapse(places, axis)
    return places.reshape(-1, places.shape[-1])


def heads_of(query: torch.Tensor, rows: Places | None, arguments: Any) -> int:
    """How many heads a query (..., N, D) has that comes from a module with these ``arguments``.

    Heads that are folded into the batch repeat the places ``rows`` of their sample.
    """
    if query.ndim >= 4:
        places = places_of(query)
        return (
            math.prod(query.shape[axis] for axis in _heads_axes(places[..., 0]))
            if places is not None
            else query.shape[-3]
        )
    fits = times_of_batch(len(query), query, arguments)
    if rows is None or not (rows != rows[:1]).any():
        return fits
    alike = (rows == rows[:1]).all(1)
    run = int((~alike).argmax())  # the heads of a sample, one after the other
    return run if run > 1 else min(int(alike.sum()), fits)  # or a head of all samples, then the next


def _heads_axes(places: Places) -> list[int]:
    return [axis for axis in range(1, places.ndim - 1) if not varies(places, axis)]


def times_of_batch(rows: int, query: torch.Tensor, arguments: Any) -> int:
    """How often the batch of a module that was called with ``arguments`` goes into that many rows."""
    tokens = next((tensor for tensor in tree_leaves(arguments) if hasattr(tensor, "shape")), query)
    return max(1, rows // tokens.shape[0]) if tokens.ndim else 1


def joined(first: Places | None, second: Places | None) -> Places | None:
    """Two parts of the tokens, one after the other."""
    return np.concatenate([first, second], axis=-1) if first is not None and second is not None else None
