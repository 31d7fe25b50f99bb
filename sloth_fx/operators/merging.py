"""Token merging: tokens that are alike become their mean, and all of them get its output.

Source: Token Merging for Stable Diffusion (tomesd). Unlike there, the grid may be of any size, the destinations are
chosen by a hash instead of a random generator, and frames are merged each by itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sloth_fx.errors import SlothError
from sloth_fx.operators.hashing import hashed


class MergeMap(NamedTuple):
    """Which tokens become one.

    Attributes:
        target: (B, N), for each token the merged one that it is part of, 0..M - 1.
        chosen: (B, M), for each merged token the one that stands for it: itself, or the destination.
        merged: (B, R), the tokens that are merged away.
    """

    target: Tensor
    chosen: Tensor
    merged: Tensor


def merged_tokens(grid: tuple[int, int], cell: tuple[int, int], ratio: float) -> int:
    """How many tokens of a frame are merged away: the whole part of ratio * h * w, at most all but one of each cell."""
    tokens, cells = grid[0] * grid[1], -(-grid[0] // cell[0]) * -(-grid[1] // cell[1])
    return min(int(ratio * tokens), tokens - cells)


def merge_map(
    metric: Tensor,
    grid: tuple[int, int],
    cell: tuple[int, int] = (2, 2),
    ratio: float = 0.5,
    seed: int | Tensor = 0,
    frames: int = 1,
) -> MergeMap:
    """Bipartite soft matching: each source goes with the destination that is most like it (cosine of `metric`), and the
    `merged_tokens(...)` sources with the greatest similarity are merged.

    Each cell of the grid has one destination, all other tokens are sources; where the grid cuts a cell off, it is
    smaller. Nothing is random: which token of a cell is its destination is a hash of the seed, the cell and the frame.

    Args:
        metric: (B, N, C), N = frames * h * w, frame after frame, each row-major.
        grid: (h, w).
        cell: (rows, columns) of a cell.
        ratio: share of the tokens to merge away, 0..1.
        seed: an int, or a tensor of one integer, so that another seed is no new graph.
        frames: frames, of which each is matched by itself.

    Returns:
        The map; merged tokens are frame after frame, in each the sources that are left and then the destinations.

    Raises:
        SlothError: N does not fit, a cell has no tokens, or the ratio is not in 0..1.
    """
    tokens = grid[0] * grid[1]
    if metric.shape[1] != frames * tokens:
        raise SlothError(f"{metric.shape[1]} tokens do not fit {frames} x {grid}, which has {frames * tokens}")
    if min(cell) < 1 or not 0 <= ratio <= 1:
        raise SlothError(f"cells have at least one token and a ratio lies in 0..1, not {cell} and {ratio}")
    away = merged_tokens(grid, cell, ratio)
    destinations = _destinations(grid, cell, seed, frames, metric.device)
    count = destinations.shape[1]
    is_source = torch.ones(frames, tokens, dtype=torch.int64, device=metric.device).scatter(1, destinations, 0)
    sources = is_source.argsort(dim=1, descending=True, stable=True)[:, : tokens - count]

    batch = metric.shape[0]
    sources, destinations = (x.repeat(batch, 1) for x in (sources, destinations))  # (B * F, n)
    line = F.normalize(torch.unflatten(metric, 1, (frames, tokens)).flatten(0, 1), dim=-1)
    likeness, nearest = (_pick(line, sources) @ _pick(line, destinations).mT).max(-1)
    order = likeness.argsort(dim=1, descending=True, stable=True)
    kept = tokens - count - away
    rank = torch.zeros_like(order).scatter(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    # The sources that are left come first, in the order of their likeness; then the destinations.
    of_source = torch.where(rank < away, kept + nearest, rank - away)
    of_destination = torch.arange(kept, kept + count, device=metric.device).expand_as(destinations)
    target = torch.empty_like(is_source).repeat(batch, 1).scatter(1, sources, of_source)
    target = target.scatter(1, destinations, of_destination)
    chosen = torch.cat([sources.gather(1, order[:, away:]), destinations], 1)
    merged = sources.gather(1, order[:, :away])
    return MergeMap(
        _of_all(target, frames, kept + count), _of_all(chosen, frames, tokens), _of_all(merged, frames, tokens)
    )


def merge(x: Tensor, mapping: MergeMap) -> Tensor:
    """(B, N, C) -> (B, M, C): the mean of the tokens that become one."""
    # Only the tokens that are merged away are added to what stays: less to move than a reduction over all.
    into = mapping.target.gather(1, mapping.merged)
    tokens = _pick(x, mapping.chosen)
    rows = _rows(into, tokens.shape[1])
    away = _pick(x, mapping.merged).flatten(0, 1)
    summed = tokens.flatten(0, 1).scatter_add(0, rows.unsqueeze(-1).expand_as(away), away)
    count = torch.ones_like(rows, dtype=x.dtype)
    parts = torch.ones(summed.shape[0], dtype=x.dtype, device=x.device).index_add(0, rows, count)
    return torch.unflatten(summed / parts.unsqueeze(-1), 0, tokens.shape[:2])


def choose(x: Tensor, mapping: MergeMap) -> Tensor:
    """(B, N, C) -> (B, M, C): the token that stands for those that become one."""
    return _pick(x, mapping.chosen)


def unmerge(x: Tensor, mapping: MergeMap) -> Tensor:
    """(B, M, C) -> (B, N, C): to each token what became of the one it is part of."""
    return _pick(x, mapping.target)


def _destinations(
    grid: tuple[int, int], cell: tuple[int, int], seed: int | Tensor, frames: int, device: torch.device
) -> Tensor:
    """(F, cells) the token of each cell that others may be merged into."""
    counts = [-(-size // part) for size, part in zip(grid, cell, strict=True)]
    rows, columns = (torch.arange(count, device=device) for count in counts)
    height = (grid[0] - rows * cell[0]).clamp(max=cell[0]).unsqueeze(1)
    width = (grid[1] - columns * cell[1]).clamp(max=cell[1])
    number = torch.arange(frames * counts[0] * counts[1], device=device).view(frames, *counts)
    place = hashed(number, seed) % (height * width)
    row, column = rows.unsqueeze(1) * cell[0] + place // width, columns * cell[1] + place % width
    return (row * grid[1] + column).flatten(1)


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """(B, N, C), (B, M) -> (B, M, C). By whole rows: gather would take an index for each channel."""
    return torch.unflatten(x.flatten(0, 1).index_select(0, _rows(index, x.shape[1])), 0, index.shape)


def _rows(index: Tensor, size: int) -> Tensor:
    """(B, M) indices within samples of `size` tokens -> (B * M,) within all of them."""
    return (index + torch.arange(index.shape[0], device=index.device).unsqueeze(1) * size).flatten()


def _of_all(index: Tensor, frames: int, size: int) -> Tensor:
    """(B * F, n) indices within each frame -> (B, F * n) within the sequence, of whose frames each has `size`."""
    start = torch.arange(frames, device=index.device).unsqueeze(1) * size
    return (torch.unflatten(index, 0, (-1, frames)) + start).flatten(1)
