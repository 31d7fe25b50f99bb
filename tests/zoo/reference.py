"""What operators have to come to, by explicit sets of tokens: a bias on the scores of the unpatched model's attention.

A key that is not to be seen has a bias of minus infinity, one that is to be seen twice has one of log 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sloth_fx import NearSightedTile, Reduction, SlothfulAttention
from sloth_fx.schedule import Moment
from tests.zoo.count import Attention
from tests.zoo.expected import Expected, Grid, Site

_RATE = 6.0
_TILE = 5
_GLOBAL_RATIO = 0.5


@dataclass(frozen=True)
class Between:
    """Everything while the run is between two moments, and nothing outside."""

    start: float
    end: float
    clock = "progress"

    def ratio(self, moment: Moment) -> float:
        return 1.0 if self.start <= moment.progress < self.end else 0.0


REDUCING, NEUTRAL, TILING = 0.1, 0.5, 0.9  # moments
_EVERYWHERE = Reduction(rate=_RATE, depth_decay=0.0)
REDUCE = SlothfulAttention(in_=_EVERYWHERE, out=_EVERYWHERE, schedule=Between(0.0, 0.3), keep_middle=False)
TILE = NearSightedTile(
    tile_size=4096, peak_tile_size=_TILE, global_ratio=_GLOBAL_RATIO, max_depth=8, schedule=Between(0.7, 1.1)
)


@dataclass(frozen=True)
class Reduced:
    """Of the image, every third row and second column is left, of a sequence every sixth token; the rest whole."""

    expected: Expected

    def __call__(self, attention: Attention) -> Tensor | None:
        site = self.expected[attention.index]
        if site.grid is None or site.image is None:
            return None
        down = min(3, site.grid[1])
        across = min(math.ceil(_RATE / down), site.grid[2])
        _, rows, columns = _coordinates(site.grid)
        seen = torch.ones(attention.key.shape[-2])
        seen[_image(site)] = ((rows % down == 0) & (columns % across == 0)).float()
        return seen.log()


@dataclass(frozen=True)
class Tiled:
    """A query of the image sees the image tokens of its tile in every frame, samples of all, and all other tokens."""

    expected: Expected

    def __call__(self, attention: Attention) -> Tensor | None:
        site = self.expected[attention.index]
        if site.grid is None or site.image is None:
            return None
        tiles = [math.ceil(size / _TILE) for size in site.grid[1:]]
        if math.prod(tiles) == 1:
            return None
        height, width = (math.ceil(size / count) for size, count in zip(site.grid[1:], tiles, strict=True))
        _, rows, columns = _coordinates(site.grid)
        tile = rows // height * site.grid[2] + columns // width
        stride = math.prod(tiles) / _GLOBAL_RATIO
        across = min(math.ceil(math.sqrt(stride)), site.grid[2])
        down = min(math.ceil(stride / across), site.grid[1])
        sample = (rows % down == 0) & (columns % across == 0)

        queries, keys = attention.query.shape[-2], attention.key.shape[-2]
        own = slice(0, math.prod(site.grid)) if queries != keys else _image(site)
        seen = torch.ones(keys, queries)
        seen[_image(site), own] = (tile[:, None] == tile).float() + sample[:, None]
        return seen.T.log()


def resized(expected: Expected, before: tuple[int, int], after: tuple[int, int]) -> Expected:
    """The same sites for a grid of ``after`` instead of ``before`` rows and columns at the first level."""
    return [site._replace(grid=_resized(site.grid, before, after)) if site.grid else site for site in expected]


def _resized(grid: Grid, before: tuple[int, int], after: tuple[int, int]) -> Grid:
    frames, rows, columns = grid
    if rows == 1:  # a sequence, as long as the grid has tokens, or shorter by one
        shorter = math.prod(before) - columns == 1
        return 1, 1, _level(columns + shorter, math.prod(before), math.prod(after)) - shorter
    return frames, _level(rows, before[0], after[0]), _level(columns, before[1], after[1])


def _level(size: int, before: int, after: int) -> int:
    scales = (4.0, 2.0, 1.0, 0.5)
    return {math.ceil(before * scale): math.ceil(after * scale) for scale in scales}.get(size, size)


def _image(site: Site) -> slice:
    assert site.image is not None
    assert site.grid is not None
    return slice(site.image, site.image + math.prod(site.grid))


def _coordinates(grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    frames, rows, columns = torch.cartesian_prod(*map(torch.arange, grid)).T
    return frames, rows, columns
