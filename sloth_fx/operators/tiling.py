"""Cutting a grid of tokens into tiles, without padding and without masks.

Source: Near-sighted Tile and Near-sighted Attention nodes, release of 2023-12-16. The nodes zero-pad the grid to a
whole number of tiles, and the padding then takes part in the softmax. Here an edge tile is simply smaller: the tiles
of one axis are at most three runs of equal tiles (first, inner, last), and each pair of a row run and a column run is
one group, attended on its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sloth_fx.errors import SlothError


class Run(NamedTuple):
    """`tiles` adjacent tiles of `size` real tokens each along one axis, the first one at token `start`."""

    start: int
    size: int
    tiles: int

    @property
    def stop(self) -> int:
        return self.start + self.size * self.tiles


def tile_size(length: int, tile: int) -> int:
    """The size of the fewest equal tiles, none larger than `tile`, that cover an axis.

    size = ceil(length / n) with n = ceil(length / tile), between 1 and min(tile, length).

    Raises:
        SlothError: `length` or `tile` is below 1.

    Source: Near-sighted Tile, release of 2023-12-16.
    """
    if length < 1 or tile < 1:
        raise SlothError(f"cannot cut {length} tokens into tiles of {tile}: both have to be at least 1")
    return -(-length // -(-length // tile))


def runs(length: int, size: int, pad_before: int = 0) -> list[Run]:
    """The tiles of one axis as at most three runs of equal real tiles.

    With n = ceil(length / size) tiles and n * size - length tokens of padding, of which `pad_before` lie before the
    axis, tile i holds the real tokens from max(0, i * size - pad_before) to min(length, (i + 1) * size - pad_before).

    >>> runs(61, 31)
    [Run(start=0, size=31, tiles=1), Run(start=31, size=30, tiles=1)]
    >>> runs(6, 4, pad_before=1)
    [Run(start=0, size=3, tiles=2)]

    Raises:
        SlothError: `pad_before` is negative or more than all the padding.
    """
    count = -(-length // size)
    padding = count * size - length
    if not 0 <= pad_before <= padding:
        raise SlothError(
            f"{length} tokens in {count} tiles of {size} leave {padding} of padding, so {pad_before} cannot lie before"
        )
    found: list[Run] = []
    for tile in range(count):
        start = max(0, tile * size - pad_before)
        real = min(length, (tile + 1) * size - pad_before) - start
        if found and found[-1].size == real:
            found[-1] = found[-1]._replace(tiles=found[-1].tiles + 1)
        else:
            found.append(Run(start, real, 1))
    return found


def cut(video: Tensor, rows: Run, columns: Run) -> Tensor:
    """The tiles of one group: (B, F, h, w, *rest) -> (B, tiles, F * tokens per frame, *rest), all in row-major order.

    A tile is a column through all F frames.
    """
    region = video[:, :, rows.start : rows.stop, columns.start : columns.stop]
    bands = torch.unflatten(region, 2, (rows.tiles, rows.size))
    tiles = torch.unflatten(bands, 4, (columns.tiles, columns.size))  # (B, F, tiles, size, tiles, size, *rest)
    tiles = tiles.permute(0, 2, 4, 1, 3, 5, *range(6, tiles.ndim))
    # One reshape at the very end, because this is the only step that may have to copy.
    shape = rows.tiles * columns.tiles, video.shape[1] * rows.size * columns.size
    return tiles.reshape(video.shape[0], *shape, *video.shape[4:])


def paste(pieces: Sequence[Tensor], rows: Sequence[Run], columns: Sequence[Run], frames: int = 1) -> Tensor:
    """The inverse of `cut`, over all groups: the tiles of each, row runs outermost, -> (B, F, h, w, *rest)."""
    remaining = iter(pieces)
    bands = []
    for band in rows:
        parts = []
        for run in columns:
            piece = torch.unflatten(next(remaining), 2, (frames, band.size, run.size))
            tiles = torch.unflatten(piece, 1, (band.tiles, run.tiles))  # (B, tiles, tiles, F, size, size, *rest)
            tiles = tiles.permute(0, 3, 1, 4, 2, 5, *range(6, tiles.ndim))
            parts.append(tiles.flatten(4, 5).flatten(2, 3))
        bands.append(_join(parts, 3))
    return _join(bands, 2)


def _join(parts: list[Tensor], dim: int) -> Tensor:
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]  # cat would copy even a single part
