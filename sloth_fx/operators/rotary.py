"""Rotary position embeddings of pooled keys: a pooled key stands at the centre of its window.

A rotation of channel pairs comes as real factors (cosine and sine), as complex numbers e^{i angle}, or as matrices
(..., 2, 2). The angle of the centre is not known, but it is the mean of the angles of the tokens around it, and
e^{ia} + e^{ib} = 2 cos((a - b) / 2) e^{i (a + b) / 2}: the mean of their factors, brought back to its length, is the
factor of the centre. That is exact where each channel turns with one axis (frame, row or column).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sloth_fx.operators.layout import KeyLayout, Pooling
from sloth_fx.operators.pooling import reduce_tokens
from sloth_fx.operators.sequence import join_image, split_image
from sloth_fx.site import Place

_LENGTHS: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {
    "pair": lambda factors: torch.hypot(factors[0], factors[1]),
    "complex": lambda factors: factors[0].abs(),
    "matrix": lambda factors: factors[0].norm(dim=-2, keepdim=True),  # of its columns
}


def centre_rotation(
    factors: Sequence[Tensor], kind: str, layout: KeyLayout, place: Place, dim: int, border: str = "keep"
) -> list[Tensor]:
    """Rotation factors at the centre of each window.

    The centre is the middle token of a window, or between the two middle ones of each axis where its size is even; of
    a window that the grid cuts off, the middle of the tokens that it has. Windows along flattened tokens
    (`layout.flat`) are centred along them.

    Args:
        factors: those of one rotation, with the tokens along `dim`: cosine and sine (in any order), or one tensor.
        kind: "pair" of real factors, "complex", or "matrix" (..., 2, 2).
        layout: window, tiles and global samples.
        place: where the image tokens lie along `dim`; the factors of others stay as they are.
        dim: axis of the tokens.
        border: as in `Pooling`.

    Returns:
        As many factors, for the keys that `reduce_tokens` leaves, in its order.
    """
    return [
        join_image(before, centre, after, dim)
        for (before, _, after), centre in zip(
            (split_image(x, place, layout.tokens, dim) for x in factors),
            _centres(factors, kind, layout, place, dim, border),
            strict=True,
        )
    ]


def rotation_of_reduced(
    factors: Sequence[Tensor], kind: str, layout: KeyLayout, pooling: Pooling, place: Place, dim: int
) -> list[Tensor]:
    """Rotation factors of the keys that come from `key_parts`: at the token picked, at the centre, or one after the
    other.

    Args and returns as of `centre_rotation`.
    """
    if pooling.k_blend == 1:
        return centre_rotation(factors, kind, layout, place, dim, pooling.border)
    picked = token_indices(layout, pooling.border, factors[0].device)
    parts = [split_image(x, place, layout.tokens, dim) for x in factors]
    images = [image.index_select(dim, picked) for _, image, _ in parts]
    if pooling.k_blend > 0:
        centres = _centres(factors, kind, layout, place, dim, pooling.border)
        images = [torch.cat(both, dim) for both in zip(images, centres, strict=True)]
    return [join_image(before, x, after, dim) for (before, _, after), x in zip(parts, images, strict=True)]


def token_indices(layout: KeyLayout, border: str, device: torch.device) -> Tensor:
    """(M,) the first token of each window, in the order of `reduce_tokens`."""
    positions = torch.arange(layout.tokens, device=device).view(1, -1, 1)
    return reduce_tokens(positions, layout, Pooling("avg", 0.0, 0.0, border))[0].flatten()


def _centres(
    factors: Sequence[Tensor], kind: str, layout: KeyLayout, place: Place, dim: int, border: str
) -> list[Tensor]:
    length = _LENGTHS[kind]
    images = [_precise(split_image(x, place, layout.tokens, dim)[1]) for x in factors]
    around = [[x.index_select(dim, i) for x in images] for i in _middles(layout, border, images[0].device)]
    mean = [torch.stack(each).mean(0) for each in zip(*around, strict=True)]
    # A host may scale its rotation: the length is that of the tokens around, which as a rule is 1.
    scale = torch.stack([length(each) for each in around]).mean(0) / length(mean).clamp_min(1e-12)
    return [(each * scale).to(factor.dtype) for each, factor in zip(mean, factors, strict=True)]


def _precise(factor: Tensor) -> Tensor:
    return factor if factor.is_complex() else factor.to(torch.promote_types(factor.dtype, torch.float32))


def _middles(layout: KeyLayout, border: str, device: torch.device) -> list[Tensor]:
    """The tokens around the centre of each window, (M,) each: 2 along every axis that is pooled, equal where odd."""
    rows, columns = (1, layout.grid[0] * layout.grid[1]) if layout.flat else layout.grid
    sizes = layout.frames, rows, columns
    axes = (torch.arange(size, device=device, dtype=torch.float32) for size in sizes)
    positions = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(1, -1, 3)
    last, first = reduce_tokens(positions, layout, Pooling("max", 1.0, 0.0, border))
    both = (first + last)[0].long()
    pooled = layout.frame_window > 1, *(max(pair) > 1 for pair in zip(layout.window, layout.sample_window, strict=True))
    found = []
    for upper in itertools.product(*([0, 1] if axis else [0] for axis in pooled)):
        frame, row, column = ((both[:, axis] + more) // 2 for axis, more in enumerate(upper))
        found.append((frame * rows + row) * columns + column)
    return found
