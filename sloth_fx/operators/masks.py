"""Attention masks that follow the keys: reduced where they are pooled, cut where they are tiled.

A mask is bool (False hides) or additive, and broadcasts to (B, H, N, M). An axis of one token stays one: a mask of key
padding (B, 1, 1, M) is never expanded to all queries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sloth_fx.operators.layout import KeyLayout, Pooling
from sloth_fx.operators.pooling import reduce_tokens
from sloth_fx.operators.sequence import join_image, split_image
from sloth_fx.site import Place


def reduce_mask(mask: Tensor, layout: KeyLayout, pooling: Pooling, place: Place) -> Tensor:
    """The mask of the keys that `reduce_tokens` leaves.

    Where keys are picked (`k_blend` 0) it is that of the token picked. Where they are pooled, a window is seen as long
    as one of its tokens is: any(), or the maximum of what is added.

    Args:
        mask: (B, H, N, M), bool or additive, M the image tokens of `layout` and the others of `place`, or 1.
        layout: window, tiles and global samples.
        pooling: how the keys are pooled; its kind does not matter.
        place: where the image tokens lie among the keys.

    Returns:
        (B, H, N, M') of the same dtype, M' = `layout.gathered_tokens(...)` and the others; `mask` itself where M is 1.
    """
    if mask.shape[-1] == 1 or layout.neutral:
        return mask
    before, image, after = split_image(mask, place, layout.tokens, -1)
    blend = 1.0 if pooling.k_blend else 0.0
    as_tokens = image.flatten(0, -2).unsqueeze(-1)
    if blend and mask.dtype == torch.bool:
        as_tokens = as_tokens.to(torch.float32)
    reduced, _ = reduce_tokens(as_tokens, layout, Pooling("max", blend, blend, pooling.border))
    return join_image(before, torch.unflatten(reduced.squeeze(-1), 0, image.shape[:-1]).to(mask.dtype), after, -1)


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """(1, 1, N, M) bool: query n sees keys 0 to n, as `is_causal` of `scaled_dot_product_attention` has it."""
    return torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device).tril()


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """``mask`` as what is added to scores: of the same shape in ``dtype``, -inf where a bool one hides."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)


def both_masks(mask: Tensor | None, other: Tensor) -> Tensor:
    """`mask` with all that the bool mask `other` hides hidden as well."""
    if mask is None:
        return other
    if mask.dtype == torch.bool:
        return mask & other
    return mask.masked_fill(~other, -torch.inf)


def tile_mask(mask: Tensor, batch: int, rows: Tensor, columns: Tensor) -> Tensor:
    """The mask of one group of tiles, which become its batch.

    Args:
        mask: broadcastable to (B, H, N, M), with four axes.
        batch: B.
        rows: (T, n), the queries of each tile.
        columns: (T, m), the keys that each tile sees.

    Returns:
        (B * T, H, n, m), an axis that was broadcast still 1.
    """
    rows, columns = (
        index if size > 1 else torch.zeros_like(index[:, :1])
        for index, size in zip((rows, columns), mask.shape[2:], strict=True)
    )
    tiles = mask[:, :, rows.unsqueeze(2), columns.unsqueeze(1)].transpose(1, 2)  # (B, T, H, n, m)
    return tiles.expand(batch, -1, -1, -1, -1).flatten(0, 1)
