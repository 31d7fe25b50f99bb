"""What the tokens of an attention are: its kind, the grid of its image tokens, and where they and the text lie."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sloth_fx.locate.places import NOWHERE, Places
from sloth_fx.locate.provenance import Source
from sloth_fx.site import Kind, LatentSize

LATENT = "latent"
"""The name of the source that is the latent."""

_Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Latent:
    """How the model's latent is laid out.

    ``axes`` has a letter for each dimension, of which ``t``, ``h`` and ``w`` are frames, rows and columns, and ``n``
    tokens that the host has packed. ``size`` says how many there are (``None``: unknown), and ``first`` which of the
    packed tokens is the first of these.
    """

    axes: str
    size: LatentSize | None
    first: int = 0


@dataclass(frozen=True)
class ImageTokens:
    """Image tokens ``start`` to ``stop`` of a sequence, in the order of ``grid`` (frames, rows, columns).

    ``levels`` is the grid of all rows of the batch together, and ``whole`` tells for each axis whether one row sees all
    of it: not where it is cut into windows, nor where each frame, or each pixel, is attended on its own. Without a grid
    they are in no order that is known, or not adjacent.
    """

    start: int
    stop: int
    grid: tuple[int, int, int] | None = None
    whole: tuple[bool, bool, bool] = (True, True, True)
    levels: tuple[int, int, int] = (1, 1, 1)


@dataclass(frozen=True)
class Tokens:
    """A sequence of ``total`` tokens: which of them are the latent's, which are text, and from which inputs all are."""

    total: int
    image: ImageTokens | None = None
    text: tuple[int, int] | None = None
    sources: frozenset[int] = frozenset()


def read_tokens(
    rows: Places | None, total: int, sources: Sequence[Source], latent: Latent, text: frozenset[str]
) -> Tokens:
    """What the tokens are that have the places ``rows`` (rows of the batch, tokens). ``text`` names text inputs."""
    if rows is None or not sources or rows.shape[1] != total:
        return Tokens(total)
    row = np.asarray(rows[0])
    origin = np.searchsorted([source.first for source in sources], row, "right") - 1
    origin[row == NOWHERE] = -1
    named = [index for index, source in enumerate(sources) if source.name in text]
    words = np.isin(origin, named).nonzero()[0]
    image = np.isin(origin, _latents(sources)).nonzero()[0]
    return Tokens(
        total,
        _image_tokens(rows, image, sources, latent) if len(image) else None,
        (int(words[0]), int(words[-1]) + 1) if _contiguous(words) else None,
        frozenset(0 if index in _latents(sources) else int(index) for index in np.unique(origin) if index >= 0),
    )


def kind_of(query: Tokens, key: Tokens) -> Kind:
    """See :class:`sloth_fx.site.AttentionSite`."""
    if query.image is None or key.image is None:
        return "self" if (query.total, query.text, query.sources) == (key.total, key.text, key.sources) else "cross"
    if len(key.sources) > 1:
        return "joint"
    grid, whole = key.image.grid, key.image.whole
    return "temporal" if grid is not None and grid[1] * grid[2] == 1 and not all(whole[1:]) else "self"


def _latents(sources: Sequence[Source]) -> list[int]:
    """The latent comes first; where hosts take a list of them, one for each image, so do all of these."""
    return [index for index, source in enumerate(sources) if index == 0 or source.name.startswith(f"{LATENT}[")]


def _image_tokens(rows: Places, positions: _Numbers, sources: Sequence[Source], latent: Latent) -> ImageTokens:
    """The first image of those at ``positions``; where the host appends others, they are not the one to denoise."""
    source = sources[0]
    start, stop = int(positions[0]), int(positions[-1]) + 1
    somewhere = ImageTokens(start, stop)
    everywhere = np.asarray(rows)
    held = np.any([sources[index].holds(everywhere) for index in _latents(sources)], axis=0)
    elsewhere = held != held[:1]  # hosts may pack each sample on its own
    if not _contiguous(positions) or elsewhere.any():
        return somewhere
    coordinates = _coordinates(np.asarray(rows[0])[start:stop], source, latent)
    if coordinates is None:
        return somewhere
    coordinates = _without_repeats(coordinates)
    count = len(coordinates[0])
    levels = [np.unique(each) for each in coordinates]
    grid = _sizes(levels)
    expected = np.meshgrid(*levels, indexing="ij")
    if math.prod(grid) != count or any((a != b.ravel()).any() for a, b in zip(coordinates, expected, strict=True)):
        return somewhere
    all_rows = everywhere[:, start : start + count]
    mine = all_rows[source.holds(all_rows)]
    spread = _coordinates(mine, source, latent, one_sample=False) or coordinates
    all_levels = _sizes([np.unique(each) for each in spread])
    if math.prod(all_levels) == 1:  # a latent of one token is a vector
        return somewhere
    whole = [here >= all_ for here, all_ in zip(grid, all_levels, strict=True)]
    return ImageTokens(start, start + count, grid, (whole[0], whole[1], whole[2]), all_levels)


def _without_repeats(coordinates: list[_Numbers]) -> list[_Numbers]:
    """Up to the first place that comes again: hosts pad by repeating the last token, or append a copy of the image."""
    _, first, inverse = np.unique(np.stack(coordinates), axis=1, return_index=True, return_inverse=True)
    again = (first[inverse.reshape(-1)] != np.arange(len(coordinates[0]))).nonzero()[0]
    return [each[: again[0]] for each in coordinates] if len(again) else coordinates


def _coordinates(places: Places, source: Source, latent: Latent, one_sample: bool = True) -> list[_Numbers] | None:
    """Frame, row and column of each place, of those that belong to the image that is denoised."""
    if len(latent.axes) != len(source.shape):
        return None
    by_axis = dict(zip(latent.axes, source.coordinates(places), strict=True))
    if "n" in by_axis:
        if latent.size is None:
            return None
        packed = by_axis["n"] - latent.first
        if len(packed) < math.prod(latent.size):  # a part of them
            return None
        return list(np.unravel_index(packed, tuple(latent.size)))
    if (
        one_sample and "b" in by_axis and "t" not in by_axis and len(np.unique(by_axis["b"])) > 1
    ):  # frames that the host calls a batch
        by_axis["t"] = by_axis["b"]
    nothing = np.zeros(len(places), dtype=np.int64)
    return [by_axis.get(letter, nothing) for letter in "thw"]


def guess_axes(rows: Places, source: Source) -> str:
    """A letter for each axis of the latent, from those along which its tokens lie; the first other one is channels."""
    held = np.asarray(rows)[source.holds(np.asarray(rows))]
    spatial = [axis for axis, each in enumerate(source.coordinates(held)) if axis > 0 and len(np.unique(each)) > 1]
    letters = ["b", *("_" * (len(source.shape) - 1))]
    for axis in range(1, len(letters)):
        if axis not in spatial:
            letters[axis] = "c"
            break
    left = [axis for axis in range(1, len(letters)) if letters[axis] != "c"]
    for axis, letter in zip(reversed(left), "wht", strict=False):
        letters[axis] = letter
    return "".join(letters)


def _sizes(levels: list[_Numbers]) -> tuple[int, int, int]:
    return len(levels[0]), len(levels[1]), len(levels[2])


def _contiguous(positions: _Numbers) -> bool:
    return len(positions) > 0 and int(positions[-1]) - int(positions[0]) + 1 == len(positions)
