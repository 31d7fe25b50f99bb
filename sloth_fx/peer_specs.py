"""Specs of methods by others: ToDo, HyperTile and Token Merging. They have no schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from sloth_fx.checks import FLAG, Limits, accepting, between, one_of, require
from sloth_fx.spec_base import SEED, BaseSpec
from sloth_fx.where import Where

FACTOR = between(1, 64, whole=True)
LEVEL = between(0, 63, whole=True)
MAX_LEVEL = between(0, 7, whole=True)
LENGTH = between(1, 2**31, whole=True)
MOST_LEVELS = 8


def _factors(fewest: int, most: int) -> Limits:
    """Field metadata for a tuple of factors."""
    count = f"{fewest} to {most}" if fewest < most else f"{most}"
    return accepting(
        f"{count} whole numbers from 1 to 64, as a tuple",
        lambda value: isinstance(value, tuple) and fewest <= len(value) <= most and all(map(_is_factor, value)),
    )


def _is_factor(value: Any) -> bool:
    return FACTOR["accepts"].holds(value)


@dataclass(frozen=True, kw_only=True)
class TokenDownsample(BaseSpec):
    """Self-attention over every n-th row and column of the keys and values; queries stay.

    factors: n at each attention level, counted from the shallowest (depth 1, 2, 4, ...), 1 to 8 whole numbers, 1..64
        each; levels beyond are left alone, and so are those with n = 1.
    where: which of the sites (`sloth_fx.where.Where`), None for all.

    Raises SlothError for a value of the wrong type or out of range. Source: Token Downsampling (ToDo), nearest.
    """

    factors: tuple[int, ...] = field(default=(2,), metadata=_factors(1, MOST_LEVELS))
    where: Where = field(default=None, hash=False)

    def factor(self, level: int) -> int:
        """n at an attention level, 0 for the shallowest; 1 where it is left alone."""
        require("level", level, LEVEL)
        return self.factors[level] if level < len(self.factors) else 1

    @classmethod
    def at_resolution(
        cls, pixels: int | tuple[int, int], *, pixels_per_token: int = 8, where: Where = None
    ) -> TokenDownsample:
        """The published choice for an image: about 64 x 64 keys at the shallowest level, the others left alone.

        pixels: edge of the image, or (height, width), 1..65536. 1024 gives 2, 1536 gives 3, 2048 gives 4, and 512 gives
        1, which changes nothing. pixels_per_token: of one edge at the shallowest attention level, 1..4096: 8 for SD1.5,
        16 for SDXL, which has as many tokens at 1024 as SD1.5 at 512. Raises SlothError out of range.
        """
        edges = pixels if isinstance(pixels, tuple) and len(pixels) == 2 else (pixels, pixels)
        for edge in edges:
            require("pixels", edge, between(1, 65536, whole=True))
        require("pixels_per_token", pixels_per_token, between(1, 4096, whole=True))
        tokens = math.sqrt(edges[0] * edges[1]) / pixels_per_token
        return cls(factors=(min(max(math.floor(tokens / 64 + 0.5), 1), 64),), where=where)


@dataclass(frozen=True, kw_only=True)
class HyperTile(BaseSpec):
    """Self-attention within tiles, whose size may change from step to step.

    The two that matter:

    tile_size: smallest edge of a tile, whole, 1..8192, in pixels of an image with 8 pixels per token: a tile has at
        least max(32, tile_size) // 8 tokens of the site along each axis that is so long.
    max_depth: deepest level that is tiled, whole, 0..7; 0 is the shallowest attention level only.

    The rest:

    swap_size: among how many sizes of tile to choose per axis and moment, whole, 1..16: those with the most tiles.
    scale_depth: multiply the smallest edge by 2^level.
    seed: whole, 0 or more; with the timestep and the level, it makes the choice, the same at all sites of a level.
    where: which of the sites (`sloth_fx.where.Where`), None for all.

    Raises SlothError for a value of the wrong type or out of range. Source: HyperTile (tfernd). There, levels count
    from the latent, so that its defaults never act on SDXL, and tiles have to divide the grid; neither is so here.
    """

    tile_size: int = field(default=256, metadata=between(1, 8192, whole=True))
    swap_size: int = field(default=2, metadata=between(1, 16, whole=True))
    max_depth: int = field(default=0, metadata=MAX_LEVEL)
    scale_depth: bool = field(default=True, metadata=FLAG)
    seed: int = field(default=0, metadata=SEED)
    where: Where = field(default=None, hash=False)

    def tiles(self, level: int) -> bool:
        """Whether sites of an attention level, 0 for the shallowest, are tiled: level <= max_depth."""
        require("level", level, LEVEL)
        return level <= self.max_depth

    def choices(self, length: int, level: int) -> list[int]:
        """The sizes of tile to choose from, in tokens, for an axis of `length` tokens at an attention level.

        They are ceil(length / n) for the `swap_size` largest n where that is no smaller than the smallest edge allowed,
        smallest first: n tiles, of which the last may be smaller. An axis that is too short gives [length].
        """
        require("length", length, LENGTH)
        require("level", level, LEVEL)
        least = max(32, self.tile_size) // 8 * (2**level if self.scale_depth else 1)
        most_tiles = max(1, (length - 1) // (least - 1))  # the largest n with ceil(length / n) >= least
        sizes = dict.fromkeys(-(-length // tiles) for tiles in range(most_tiles, 0, -1))
        return list(sizes)[: self.swap_size]


@dataclass(frozen=True, kw_only=True)
class TokenMerging(BaseSpec):
    """Self-attention over merged tokens: the most similar ones become their mean, and all of them get its output.

    Each cell of the grid has one destination, chosen at random; all other tokens are sources. Each source goes with the
    destination that it is most similar to (cosine); those with the greatest similarity are merged.

    The two that matter:

    ratio: share of all tokens that are merged away, 0..1; never more than there are sources: 3/4 of the tokens with
        cells of 2 x 2.
    max_depth: deepest level at which tokens are merged, whole, 0..7; 0 is the shallowest attention level only.

    The rest:

    cell: (rows, columns) of a cell, whole, 1..64 each; larger cells have fewer destinations.
    tokens: "all" merges queries, keys and values; "q" queries only, "kv" keys and values only. Where another spec
        pools, downsamples or tiles the keys, only queries are merged.
    seed: whole, 0 or more; with the timestep and the site, it chooses the destinations.
    where: which of the sites (`sloth_fx.where.Where`), None for all.

    Raises SlothError for a value of the wrong type or out of range. Source: Token Merging for Stable Diffusion
    (tomesd), and ComfyUI's node for "q". There, levels count from the latent, so that the defaults never act on SDXL.
    """

    ratio: float = field(default=0.5, metadata=between(0, 1))
    cell: tuple[int, int] = field(default=(2, 2), metadata=_factors(2, 2))
    max_depth: int = field(default=0, metadata=MAX_LEVEL)
    tokens: Literal["all", "kv", "q"] = field(default="all", metadata=one_of("all", "kv", "q"))
    seed: int = field(default=0, metadata=SEED)
    where: Where = field(default=None, hash=False)

    def merges(self, level: int) -> bool:
        """Whether tokens are merged at sites of an attention level, 0 for the shallowest: level <= max_depth."""
        require("level", level, LEVEL)
        return level <= self.max_depth

    def merged(self, tokens: int, sources: int) -> int:
        """How many tokens of `tokens` are merged away: the whole part of ratio * tokens, at most all `sources`."""
        require("tokens", tokens, LENGTH)
        require("sources", sources, between(0, tokens, whole=True))
        return min(sources, int(self.ratio * tokens))
