"""Arrays of places: for each element of a tensor, which element of the model's inputs it stands for.

Such an array has the shape of its tensor, and stride 0 along every axis on which it does not depend, so that it costs
what its tokens cost, whatever the number of channels or heads. ``NOWHERE`` is the largest place: where several places
meet in one element the smallest one stands for all, so a patch is known by its first pixel, and what comes from an
input wins over what does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Places = NDArray[np.int64]
NOWHERE = np.iinfo(np.int64).max


def narrow(places: Places) -> Places:
    """One element along the axes of stride 0."""
    return places[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in places.strides)]


def spread(places: Places, shape: Sequence[int]) -> Places:
    return np.broadcast_to(places, tuple(shape))


def smallest(parts: Iterable[Places], shape: Sequence[int]) -> Places:
    """Element by element, the smallest of ``parts``, which broadcast to ``shape``."""
    first, *others = (narrow(part) for part in parts)
    for other in others:
        first = np.minimum(first, other)
    return spread(first, shape)


def varies(places: Places, axis: int) -> bool:
    """Whether the places along ``axis`` differ."""
    if places.strides[axis] == 0 or places.shape[axis] < 2:
        return False
    slim = narrow(places)
    return bool((slim != slim.take([0], axis)).any())


def collapse(places: Places, axis: int) -> Places:
    """The smallest place along ``axis``, which stays with one element."""
    if places.strides[axis] == 0:
        return places[(slice(None),) * (axis % places.ndim) + (slice(0, 1),)]
    smallest_there: Places = narrow(places).min(axis, keepdims=True)
    return smallest_there


def reshape(places: Places, shape: Sequence[int]) -> Places:
    """As ``numpy.reshape``, but axes of stride 0 that are not mixed with others keep it."""
    slim, wide = narrow(places), []
    source: list[int] = []
    for olds, news in _aligned(places.shape, tuple(shape)):
        if all(slim.shape[axis] == 1 for axis in olds):
            source += [1] * len(olds)
            wide += [1] * len(news)
        else:
            source += [places.shape[axis] for axis in olds]
            wide += [shape[axis] for axis in news]
    return spread(spread(slim, source).reshape(wide), shape)


def concatenate(parts: Sequence[Places], axis: int) -> Places:
    """As ``numpy.concatenate``; axes along which no part differs keep stride 0."""
    shape = list(parts[0].shape)
    shape[axis] = sum(part.shape[axis] for part in parts)
    slim = [narrow(part) for part in parts]
    sizes = [
        max(each.shape[other] for each in slim) if other != axis % len(shape) else 0 for other in range(len(shape))
    ]
    axis %= len(shape)
    widened = []
    for part, each in zip(parts, slim, strict=True):
        sizes[axis] = part.shape[axis]
        widened.append(spread(each, sizes))
    return spread(np.concatenate(widened, axis), shape)


def pick(places: Places, axis: int, size: int) -> Places:
    """``size`` elements spread evenly along ``axis``: the places of a map that was scaled."""
    length = places.shape[axis]
    return narrow(places).take(np.arange(size) * length // size if places.strides[axis] else [0], axis)


def _aligned(old: tuple[int, ...], new: tuple[int, ...]) -> Iterable[tuple[list[int], list[int]]]:
    """The axes of two shapes of equal size in groups, each of which is reshaped on its own."""
    i = j = 0
    while i < len(old) or j < len(new):
        olds, news = [], []
        if i < len(old):
            olds.append(i)
            i += 1
        if j < len(new):
            news.append(j)
            j += 1
        while math.prod(old[a] for a in olds) != math.prod(new[a] for a in news):
            if math.prod(old[a] for a in olds) < math.prod(new[a] for a in news) or j == len(new):
                olds.append(i)
                i += 1
            else:
                news.append(j)
                j += 1
        yield olds, news
