"""The whole Slothful family once more, from its formulas: float64, explicit softmax, explicit sets of tokens, masks.

`predict` runs a float64 copy of a plain model in which each self-attention is computed from scratch. Nothing here is
shared with the package: of a spec it reads the public fields, of a site only its path.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from tests import models


def predict(
    model: nn.Module,
    specs: Sequence[Any],
    inputs: dict[str, Any],
    *,
    progress: float,
    sigma: float | None = None,
    halves: int = 1,
    pad: tuple[int, int] = (0, 0),
) -> Tensor:
    """What ``model`` predicts, in float64, with ``specs`` at work.

    ``pad``: how much of the padding to whole tiles lies above and to the left (capped at what there is).
    """
    double = copy.deepcopy(model).double()
    latent = inputs["sample"].shape[-2:]
    sites = _sites(double, latent)
    for site in sites:
        keys = _keys(site, sites, specs, progress, sigma, pad)
        double.get_submodule(site.path).set_processor(_Explicit(keys, halves))
    return models.run(double, models.cast(inputs, torch.float64))


def sigma_at(timestep: float, beta_start: float = 0.00085, beta_end: float = 0.012, power: float = 0.5) -> float:
    """Noise level of a training timestep; ln sigma is linear in between. Default: Stable Diffusion's schedule."""
    signal, logs = 1.0, []
    for step in range(1000):
        share = step / 999
        signal *= 1 - (beta_start**power * (1 - share) + beta_end**power * share) ** (1 / power)
        logs.append(math.log(math.sqrt((1 - signal) / signal)))
    timestep = min(max(timestep, 0), 999)
    below = min(int(timestep), 998)
    return math.exp(logs[below] + (timestep - below) * (logs[below + 1] - logs[below]))


@dataclass(frozen=True)
class Site:
    """A self-attention: ``downscale`` latent rows, nominally, for each of its rows."""

    path: str
    stage: str
    downscale: int
    grid: tuple[int, int]


@dataclass(frozen=True)
class Key:
    """A key made of the tokens ``members``, whose first is its sample; seen by one tile, or (``None``) by all."""

    members: tuple[int, ...]
    tile: int | None


@dataclass(frozen=True)
class Keys:
    """All keys of a site, and in which tile each of its tokens lies as a query."""

    found: list[Key]
    tile_of: list[int]
    peak: bool = False
    k_blend: float = 0.0
    v_blend: float = 0.0
    meet_local: bool = False
    meet_global: bool = False


def _sites(model: nn.Module, latent: Sequence[int]) -> list[Site]:
    levels = len(model.config.block_out_channels)
    found = []
    for path, module in model.named_modules():
        if not hasattr(module, "set_processor") or not hasattr(module, "to_k") or path.endswith("attn2"):
            continue
        block, number = path.split(".")[:2]
        halvings = int(number) if block == "down_blocks" else levels - 1
        if block == "up_blocks":
            halvings -= int(number)
        rows, columns = latent
        for _ in range(halvings):
            rows, columns = (rows + 1) // 2, (columns + 1) // 2
        stage = {"down_blocks": "in", "mid_block": "middle", "up_blocks": "out"}[block]
        found.append(Site(path, stage, 2**halvings, (rows, columns)))
    return found


def _keys(
    site: Site, sites: list[Site], specs: Sequence[Any], progress: float, sigma: float | None, pad: tuple[int, int]
) -> Keys:
    pooling, tiling = None, None
    for spec in specs:
        name = type(spec).__name__
        if not _selected(spec.where, site) or (getattr(spec, "keep_middle", False) and site.stage == "middle"):
            continue
        if name != "NearSightedTile":
            pooling = spec
        if name != "SlothfulAttention":
            tiling = spec

    reduction = None
    stride = 1.0
    if pooling is not None:
        reduction = pooling.out if site.stage == "out" else pooling.in_
        stride = _stride(pooling.schedule, reduction, site, sites, progress, sigma)

    height, width = site.grid
    tile = None
    if tiling is not None and site.downscale <= 2 ** (tiling.max_depth - 1):
        time = _time(tiling.schedule, progress, sigma)
        base, peak, ratio, peak_ratio = _tile_parameters(tiling)
        edge = round(base + (peak - base) * time)
        ratio += (peak_ratio - ratio) * time
        down, across = math.ceil(height / edge), math.ceil(width / edge)
        if down * across > 1:
            tile = math.ceil(height / down), math.ceil(width / across)

    everywhere = list(range(height)), list(range(width))
    if tile is None:
        areas, tile_of = [everywhere], [0] * (height * width)
    else:
        areas, tile_of = _tiles(site.grid, (down, across), tile, pad)

    keys: list[Key] = []
    flat = reduction is not None and reduction.mode[:2] == "1d"
    axis = reduction.long_axis if reduction is not None else "y"
    border = reduction.border if reduction is not None else "keep"
    limit = tile or site.grid
    for number, (rows, columns) in enumerate(areas):
        step = _windows(stride, limit, flat, axis)
        keys += [Key(members, number) for members in _boxes(site.grid, rows, columns, step, step, flat, border)]

    if tile is not None and ratio > 0:
        apart = max(1.0, stride) * down * across / ratio
        if stride <= 1 and type(tiling).__name__ == "NearSightedTile":
            flat, axis = tiling.mode == "1d", tiling.long_axis
        window = _windows(stride, site.grid, flat, axis)
        step = _windows(apart, site.grid, flat, axis)
        keys += [Key(members, None) for members in _boxes(site.grid, *everywhere, window, step, flat, border)]

    found = Keys(keys, tile_of)
    if reduction is not None:
        found = Keys(keys, tile_of, reduction.mode[3:] == "max", reduction.k_blend, reduction.v_blend)
    if tile is not None:
        meet = {"meet_local": tiling.concat_local, "meet_global": tiling.concat_global}
        found = Keys(**{**found.__dict__, **meet})
    return found


def _selected(where: Any, site: Site) -> bool:
    if where is None:
        return True
    if where in ("in", "middle", "out"):
        return bool(site.stage == where)
    return fnmatchcase(site.path, where)


def _time(schedule: Any, progress: float, sigma: float | None) -> float:
    name = type(schedule).__name__
    if name == "Constant":
        return 1.0
    if schedule.time_decay <= 0:
        return 1.0
    if name == "PeakDecay":
        return math.exp(-((progress - schedule.peak_time) ** 2) * schedule.time_decay**2)
    assert name == "StepDecay"
    assert sigma is not None
    return min(max((math.log(sigma) + 2.2) / 5, 0.0), 1.0) ** schedule.time_decay


def _stride(
    schedule: Any, reduction: Any, site: Site, sites: list[Site], progress: float, sigma: float | None
) -> float:
    first = min(sites, key=lambda each: each.downscale)
    deepest = max(each.downscale for each in sites) / first.downscale
    decay = reduction.depth_decay
    if type(schedule).__name__ == "StepDecay":  # by the number of tokens
        tokens = math.prod(site.grid) / math.prod(first.grid)
        factor = tokens ** (decay / 2) if decay >= 0 else (1 / tokens / deepest**2) ** (-decay / 2)
    else:  # by levels
        depth = site.downscale / first.downscale
        factor = (1 / depth) ** decay if decay >= 0 else (depth / deepest) ** -decay
    return float(reduction.rate * _time(schedule, progress, sigma) * factor)


def _tile_parameters(spec: Any) -> tuple[float, float, float, float]:
    if type(spec).__name__ == "NearSightedAttention":
        return spec.base_tile_size, spec.peak_tile_size, spec.base_global_ratio, spec.peak_global_ratio
    peak = spec.tile_size if spec.peak_tile_size is None else spec.peak_tile_size
    peak_ratio = spec.global_ratio if spec.peak_global_ratio is None else spec.peak_global_ratio
    return spec.tile_size, peak, spec.global_ratio, peak_ratio


def _windows(stride: float, size: tuple[int, int], flat: bool, axis: str) -> tuple[int, int]:
    """Rows and columns of a window; along the line of tokens where ``flat``."""
    if stride <= 1:
        return 1, 1
    if flat:
        return 1, min(math.ceil(stride), size[0] * size[1])
    rows, columns = size
    if axis == "y":
        a = min(math.ceil(math.sqrt(stride)), rows)
        return a, min(math.ceil(stride / a), columns)
    a = min(math.ceil(math.sqrt(stride)), columns)
    return min(math.ceil(stride / a), rows), a


def _tiles(
    grid: tuple[int, int], count: tuple[int, int], tile: tuple[int, int], pad: tuple[int, int]
) -> tuple[list[tuple[list[int], list[int]]], list[int]]:
    """The real rows and columns of each tile, and the tile of each token."""
    spans = []
    for length, number, size, before in zip(grid, count, tile, pad, strict=True):
        before = min(before, number * size - length)
        spans.append([[x for x in range(length) if (x + before) // size == i] for i in range(number)])
    areas = [(rows, columns) for rows in spans[0] for columns in spans[1]]
    tile_of = [0] * (grid[0] * grid[1])
    for number, (rows, columns) in enumerate(areas):
        for row in rows:
            for column in columns:
                tile_of[row * grid[1] + column] = number
    return areas, tile_of


def _boxes(
    grid: tuple[int, int],
    rows: list[int],
    columns: list[int],
    window: tuple[int, int],
    step: tuple[int, int],
    flat: bool,
    border: str,
) -> list[tuple[int, ...]]:
    """The tokens in each window over rows x columns of the grid."""
    if flat:
        line = [row * grid[1] + column for row in rows for column in columns]
        return [tuple(box) for box in _spans(line, window[1], step[1], border)]
    down, across = _spans(rows, window[0], step[0], border), _spans(columns, window[1], step[1], border)
    return [tuple(row * grid[1] + column for row in some for column in others) for some in down for others in across]


def _spans(line: list[int], window: int, step: int, border: str) -> list[list[int]]:
    window = min(window, len(line))
    spans = [line[start : start + window] for start in range(0, len(line), step)]
    return [span for span in spans if border == "keep" or len(span) == window]


class _Explicit:
    """An attention processor that computes softmax(q k^T / sqrt(d) + mask) v of all queries and all keys at once."""

    def __init__(self, keys: Keys, halves: int) -> None:
        self.keys = keys
        self.halves = halves

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, temb: Any = None, **others: Any
    ) -> Tensor:
        assert encoder_hidden_states is None
        residual = hidden_states
        tokens = residual.flatten(2).mT if residual.ndim == 4 else residual
        if attn.group_norm is not None:
            tokens = attn.group_norm(tokens.mT).mT
        keys = self.keys
        query = self._split(attn, attn.to_q(tokens))
        key = self._split(attn, attn.to_k(self._pooled(tokens, keys.k_blend)))
        value = self._split(attn, attn.to_v(self._pooled(tokens, keys.v_blend)))

        # Query n of image i, key m of image j.
        scores = torch.einsum("ihnd,jhmd->ihnjm", query, key) / math.sqrt(query.shape[-1])
        scores = scores.masked_fill(~self._seen(len(tokens)).unsqueeze(1), -math.inf)
        weights = scores.flatten(3).softmax(-1).unflatten(3, scores.shape[3:])
        out = torch.einsum("ihnjm,jhmd->inhd", weights, value).flatten(2)
        out = attn.to_out[0](out)
        if residual.ndim == 4:
            out = out.mT.reshape(residual.shape)
        if attn.residual_connection:
            out = out + residual
        return out / attn.rescale_output_factor

    def _split(self, attn: Any, tokens: Tensor) -> Tensor:
        return tokens.unflatten(2, (attn.heads, -1)).transpose(1, 2)

    def _pooled(self, tokens: Tensor, blend: float) -> Tensor:
        found = self.keys.found
        pooled = torch.empty(len(tokens), len(found), tokens.shape[2], dtype=tokens.dtype)
        for size in {len(key.members) for key in found}:
            numbers = [number for number, key in enumerate(found) if len(key.members) == size]
            members = tokens[:, [found[number].members for number in numbers]]
            pool = members.amax(2) if self.keys.peak else members.mean(2)
            pooled[:, numbers] = (1 - blend) * members[:, :, 0] + blend * pool
        return pooled

    def _seen(self, images: int) -> Tensor:
        """(i, n, j, m): whether query n of image i sees key m of image j."""
        keys = self.keys
        tiles = torch.tensor([-1 if key.tile is None else key.tile for key in keys.found])
        everyone = tiles == -1
        own = (torch.tensor(keys.tile_of).unsqueeze(1) == tiles) | everyone
        half = torch.arange(images) * self.halves // images
        same_half = (half.unsqueeze(1) == half).view(images, 1, images, 1)
        itself = torch.eye(images, dtype=torch.bool).view(images, 1, images, 1)
        meets = torch.where(everyone, torch.tensor(keys.meet_global), torch.tensor(keys.meet_local))
        return own.unsqueeze(1) & (itself | (same_half & meets))
