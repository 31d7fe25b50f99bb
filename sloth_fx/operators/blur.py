"""Gaussian blur of a grid, one axis after the other."""

from __future__ import annotations

import torch
from torch import Tensor


def blur_grid(x: Tensor, sigma: float, radius: tuple[int, int]) -> Tensor:
    """Blur the last two axes of ``x`` (..., rows, columns) by a Gaussian of ``sigma``, above 0, in cells.

    ``radius`` (for rows, for columns) is how far the kernel reaches, at most the side less 1; the border is reflected,
    its outermost cells not doubled. In the dtype of ``x``.
    """
    rows, columns = (
        _matrix(size, sigma, min(reach, size - 1), x) for size, reach in zip(x.shape[-2:], radius, strict=True)
    )
    return rows @ x @ columns.mT


def _matrix(size: int, sigma: float, radius: int, like: Tensor) -> Tensor:
    """(size, size) what each cell takes of each. As matrices, because a convolution would copy the grid to pad it, and
    fails on half precision in some places."""
    precision = torch.promote_types(like.dtype, torch.float32)
    offset = torch.arange(-radius, radius + 1, device=like.device)
    weight = torch.exp(-0.5 * (offset.to(precision) / sigma) ** 2)
    place = (torch.arange(size, device=like.device).unsqueeze(1) + offset).abs()
    place = size - 1 - (size - 1 - place).abs()
    share = (weight / weight.sum()).expand(size, -1)
    return torch.zeros(size, size, dtype=precision, device=like.device).scatter_add(1, place, share).to(like.dtype)
