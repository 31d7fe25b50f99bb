"""Fewer keys and values: every n-th token, an average or maximum over each window, or a blend of the two.

Source: Slothful Attention nodes, releases of 2023-12-11 and 2023-12-16; Near-sighted Attention, 2023-12-16.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sloth_fx.errors import SlothError
from sloth_fx.operators.layout import KeyLayout, Pooling, windows
from sloth_fx.operators.tiling import Run, cut


def axis_strides(stride: float, grid: tuple[int, int], long_axis: str) -> tuple[int, int]:
    """Splits a reduction factor over the two axes of a grid.

    a = ceil(sqrt(stride)) goes to the long axis and b = ceil(stride / a) to the other, each clipped to 1..size of its
    axis, and b is computed from the clipped a.

    Args:
        stride: reduction factor; at most 1 means none.
        grid: (rows, columns) of tokens.
        long_axis: "y" gives a to the rows (Slothful Attention, 2023-12-16), "x" to the columns (2023-12-11, and the
            global samples of Near-sighted Tile).

    Returns:
        Strides (rows, columns).

    Raises:
        SlothError: `long_axis` is neither "x" nor "y".
    """
    if long_axis not in ("x", "y"):
        raise SlothError(f"long_axis is 'x' or 'y', not {long_axis!r}")
    rows, columns = grid
    long, short = (rows, columns) if long_axis == "y" else (columns, rows)
    a = _clip(math.ceil(math.sqrt(max(stride, 0.0))), long)
    b = _clip(math.ceil(stride / a), short)
    return (a, b) if long_axis == "y" else (b, a)


def flat_stride(stride: float, tokens: int) -> tuple[int, int]:
    """(1, ceil(stride)), clipped to 1..tokens: the reduction along the flattened tokens of the nodes' 1D modes."""
    return 1, _clip(math.ceil(stride), tokens)


def reduce_tokens(tokens: Tensor, layout: KeyLayout, pooling: Pooling) -> tuple[Tensor, Tensor]:
    """The tokens that a site's keys, and its values, are made of.

    Per axis with window and stride n: `one` takes token i * n, `pool` the average or maximum of tokens i * n to
    (i + 1) * n - 1, and the result is (1 - blend) * one + blend * pool. Of `one` and `pool`, only what a blend needs is
    computed.

    Args:
        tokens: (B, N, C), N = rows * columns of `layout.grid`, row-major.
        layout: window, tiles and global samples.
        pooling: kind, blends (0..1) and border.

    Returns:
        Key tokens and value tokens, (B, M, C) each, M = `layout.gathered_tokens(pooling.border)`: the pooled tokens of
        each tile, tile after tile and group after group, then the global samples. They are one tensor where the blends
        are equal, and `tokens` itself where the layout is neutral.

    Raises:
        SlothError: N does not fit the grid, or `pooling` has a kind or border that does not exist.

    Source: Slothful Attention and Near-sighted Attention nodes, release of 2023-12-16.
    """
    if pooling.kind not in ("avg", "max") or pooling.border not in ("keep", "crop"):
        raise SlothError(f"pooling is 'avg' or 'max' with border 'keep' or 'crop', not {pooling}")
    if tokens.shape[1] != layout.tokens:
        raise SlothError(f"{tokens.shape[1]} tokens do not fit a grid of {layout.grid}, which has {layout.tokens}")
    if layout.neutral:
        return tokens, tokens

    grid = torch.unflatten(tokens, 1, layout.grid)
    parts = [_reduce_group(grid, group, layout, pooling) for group in layout.groups()]
    if layout.samples:
        whole = grid.flatten(1, 2).unsqueeze(1) if layout.flat else grid
        parts.append([x.flatten(1, 2) for x in _shrink(whole, layout.sample_window, layout.samples, pooling)])
    reduced = [torch.cat(part, 1) if len(part) > 1 else part[0] for part in zip(*parts, strict=True)]
    return reduced[0], reduced[-1]


def _reduce_group(grid: Tensor, group: tuple[Run, Run], layout: KeyLayout, pooling: Pooling) -> list[Tensor]:
    """Equal tiles of (B, h, w, C) -> (B, tiles * tokens that each keeps, C), once for each distinct blend."""
    rows, columns = group
    tiles, size, window = rows.tiles * columns.tiles, (rows.size, columns.size), layout.window
    if tiles == 1 or not (layout.flat or rows.size % window[0] or columns.size % window[1]):
        # No window reaches over the edge of a tile: pool all tiles at once, in place, and permute the small result.
        region = grid[:, rows.start : rows.stop, columns.start : columns.stop]
        region = region.flatten(1, 2).unsqueeze(1) if layout.flat else region
        pooled = _shrink(region, window, window, pooling)
        height, width = pooled[0].shape[1] // rows.tiles, pooled[0].shape[2] // columns.tiles
        kept = Run(0, height, rows.tiles), Run(0, width, columns.tiles)
        return [cut(x, *kept).flatten(1, 2) for x in pooled]
    each = torch.unflatten(cut(grid, rows, columns).flatten(0, 1), 1, (1, -1) if layout.flat else size)
    pooled = [x.flatten(1, 2) for x in _shrink(each, window, window, pooling)]
    return [torch.unflatten(x, 0, (-1, tiles)).flatten(1, 2) for x in pooled]


def _shrink(grid: Tensor, window: tuple[int, int], stride: tuple[int, int], pooling: Pooling) -> list[Tensor]:
    """(B, h, w, C) -> (B, h', w', C), once for each distinct blend."""
    size = (grid.shape[1], grid.shape[2])
    window = (min(window[0], size[0]), min(window[1], size[1]))
    rows, columns = (windows(*axis, pooling.border) for axis in zip(size, window, stride, strict=True))
    blends = dict.fromkeys((pooling.k_blend, pooling.v_blend))
    one = grid[:, :: stride[0], :: stride[1]][:, :rows, :columns]
    pool = one if window == (1, 1) or not any(blends) else _pool(grid, window, stride, pooling)
    return [_blend(one, pool, blend) for blend in blends]


def _blend(one: Tensor, pool: Tensor, blend: float) -> Tensor:
    if blend == 0 or pool is one:
        return one
    return pool if blend == 1 else torch.lerp(one, pool, blend)


def _pool(grid: Tensor, window: tuple[int, int], stride: tuple[int, int], pooling: Pooling) -> Tensor:
    # (B, h, w, C) seen as (B, C, h, w) is channels-last already, so nothing but the result is written.
    image, keep, peak = grid.permute(0, 3, 1, 2), pooling.border == "keep", pooling.kind == "max"
    if keep and (window[0] > stride[0] or window[1] > stride[1]):
        pooled = _pool_overlapping(image, window, stride, peak)
    elif peak:
        pooled = F.max_pool2d(image, window, stride, ceil_mode=keep)
    else:
        pooled = F.avg_pool2d(image, window, stride, ceil_mode=keep, count_include_pad=False)
    return pooled.permute(0, 2, 3, 1)


def _pool_overlapping(image: Tensor, window: tuple[int, int], stride: tuple[int, int], peak: bool) -> Tensor:
    # ceil_mode ends with the first window that reaches the edge, "keep" with the last that starts before it. Only
    # global samples denser than their window come here, so a padded copy is acceptable.
    axes = zip(image.shape[2:], window, stride, strict=True)
    below, right = (max(0, (windows(n, size, step, "keep") - 1) * step + size - n) for n, size, step in axes)
    if peak:
        return F.max_pool2d(F.pad(image, (0, right, 0, below), value=-math.inf), window, stride)
    share = F.avg_pool2d(F.pad(torch.ones_like(image[:1, :1]), (0, right, 0, below)), window, stride)
    return F.avg_pool2d(F.pad(image, (0, right, 0, below)), window, stride) / share


def _clip(value: int, size: int) -> int:
    return max(1, min(value, size))
