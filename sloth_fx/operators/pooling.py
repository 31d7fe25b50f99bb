"""Fewer keys and values: every n-th token, an average or maximum over each window, or a blend of the two.

Source: Slothful Attention nodes, releases of 2023-12-11 and 2023-12-16; Near-sighted Attention, 2023-12-16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sloth_fx.errors import SlothError
from sloth_fx.operators.layout import KeyLayout, Pooling, described, windows
from sloth_fx.operators.tiling import Run, cut

Window = tuple[int, int, int]


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

    Per axis (rows, columns, frames of a video) with window and stride n: `one` takes token i * n, `pool` the average or
    maximum of tokens i * n to (i + 1) * n - 1, and the result is (1 - blend) * one + blend * pool. Of `one` and `pool`,
    only what a blend needs is computed.

    Args:
        tokens: (B, N, C), N = `layout.tokens`: frame after frame, each row-major.
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
        raise SlothError(f"{tokens.shape[1]} tokens do not fit {described(layout)}")
    if layout.neutral:
        return tokens, tokens

    video = torch.unflatten(tokens, 1, (layout.frames, *layout.grid))
    parts = [_reduce_group(video, group, layout, pooling) for group in layout.groups()]
    if layout.samples:
        whole = video.flatten(2, 3).unsqueeze(2) if layout.flat else video
        window, stride = (layout.frame_window, *layout.sample_window), (layout.frame_window, *layout.samples)
        parts.append([x.flatten(1, 3) for x in _shrink(whole, window, stride, pooling)])
    reduced = [torch.cat(part, 1) if len(part) > 1 else part[0] for part in zip(*parts, strict=True)]
    return reduced[0], reduced[-1]


# Below, windows and strides are (frames, rows, columns).


def _reduce_group(video: Tensor, group: tuple[Run, Run], layout: KeyLayout, pooling: Pooling) -> list[Tensor]:
    """Equal tiles of (B, F, h, w, C) -> (B, tiles * tokens that each keeps, C), once for each distinct blend."""
    rows, columns = group
    tiles, window = rows.tiles * columns.tiles, (layout.frame_window, *layout.window)
    if tiles == 1 or not (layout.flat or rows.size % window[1] or columns.size % window[2]):
        # No window reaches over the edge of a tile: pool all tiles at once, in place, and permute the small result.
        region = video[:, :, rows.start : rows.stop, columns.start : columns.stop]
        region = region.flatten(2, 3).unsqueeze(2) if layout.flat else region
        pooled = _shrink(region, window, window, pooling)
        height, width = pooled[0].shape[2] // rows.tiles, pooled[0].shape[3] // columns.tiles
        kept = Run(0, height, rows.tiles), Run(0, width, columns.tiles)
        return [cut(x, *kept).flatten(1, 2) for x in pooled]
    size = (1, rows.size * columns.size) if layout.flat else (rows.size, columns.size)
    each = torch.unflatten(cut(video, rows, columns).flatten(0, 1), 1, (layout.frames, *size))
    pooled = [x.flatten(1, 3) for x in _shrink(each, window, window, pooling)]
    return [torch.unflatten(x, 0, (-1, tiles)).flatten(1, 2) for x in pooled]


def _shrink(video: Tensor, window: Window, stride: Window, pooling: Pooling) -> list[Tensor]:
    """(B, F, h, w, C) -> (B, F', h', w', C), once for each distinct blend."""
    size = video.shape[1:4]
    clipped = [min(*axis) for axis in zip(window, size, strict=True)]
    frames, rows, columns = (windows(*axis, pooling.border) for axis in zip(size, clipped, stride, strict=True))
    blends = dict.fromkeys((pooling.k_blend, pooling.v_blend))
    one = video[:, :: stride[0], :: stride[1], :: stride[2]][:, :frames, :rows, :columns]
    pool = one if clipped == [1, 1, 1] or not any(blends) else _pool(video, clipped, stride, pooling)
    return [_blend(one, pool, blend) for blend in blends]


def _blend(one: Tensor, pool: Tensor, blend: float) -> Tensor:
    if blend == 0 or pool is one:
        return one
    return pool if blend == 1 else torch.lerp(one, pool, blend)


def _pool(video: Tensor, window: Sequence[int], stride: Window, pooling: Pooling) -> Tensor:
    # The frames of a window show the same number of tokens each: pooling within frames and then over them is exact.
    # (B * F, h, w, C) seen as (B * F, C, h, w) is channels-last already, so nothing but the result is written.
    images = video.flatten(0, 1).permute(0, 3, 1, 2)
    pooled = _pool_images(images, (window[1], window[2]), stride[1:], pooling).permute(0, 2, 3, 1)
    pooled = torch.unflatten(pooled, 0, video.shape[:2])
    if window[0] == 1:
        return pooled
    lines = pooled.flatten(2).unsqueeze(1)  # (B, 1, F, h' * w' * C)
    over = _pool_images(lines, (window[0], 1), (stride[0], 1), pooling)
    return torch.unflatten(over.squeeze(1), 2, pooled.shape[2:])


def _pool_images(images: Tensor, window: tuple[int, int], stride: tuple[int, int], pooling: Pooling) -> Tensor:
    keep, peak = pooling.border == "keep", pooling.kind == "max"
    if window == (1, 1) and stride == (1, 1):
        return images
    if keep and (window[0] > stride[0] or window[1] > stride[1]):
        return _pool_overlapping(images, window, stride, peak)
    if peak:
        return F.max_pool2d(images, window, stride, ceil_mode=keep)
    return F.avg_pool2d(images, window, stride, ceil_mode=keep, count_include_pad=False)


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
