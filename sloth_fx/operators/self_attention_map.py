"""How much the tokens of an image are attended to: column sums of an attention map that is never held."""

from __future__ import annotations

import torch
from torch import Tensor

from sloth_fx.operators.masks import additive

_SCORES = 1 << 24
"""Scores that are held at a time, of one sample, all heads: 64 MiB in float32."""


def attention_received(query: Tensor, key: Tensor, scale: float | None = None, mask: Tensor | None = None) -> Tensor:
    """For each key, the mean over heads of the sum over queries of softmax(scale * q k^T).

    Args:
        query: (B, H, N, D).
        key: (B, Hkv, M, D), H a multiple of Hkv.
        scale: D ** -0.5 when None.
        mask: (1 or B, 1 or H, 1 or N, M): added to the scores, or True where a key is seen.

    Returns:
        (B, M) in float32 (float64 for float64); N / M on average. Queries are worked on in parts, one sample after the
        other, so that no more than some 16 million scores exist at a time. Source: Self-Attention Guidance (arXiv
        2210.00939), section 4.2.
    """
    heads, length, size = query.shape[1:]
    precision = torch.promote_types(query.dtype, torch.float32)
    scale = size**-0.5 if scale is None else scale
    if key.shape[1] != heads:
        key = key.repeat_interleave(heads // key.shape[1], dim=1)
    part = max(1, min(length, _SCORES // max(1, heads * key.shape[2])))
    found = []
    for row, (own, keys) in enumerate(zip(query, key, strict=True)):
        turned = keys.mT.to(precision) * scale
        added = None if mask is None else additive(mask[row if mask.shape[0] > 1 else 0], precision)
        sums = []
        for start in range(0, length, part):
            scores = own[:, start : start + part].to(precision) @ turned
            if added is not None:
                scores = scores + (added if added.shape[1] == 1 else added[:, start : start + part])
            sums.append(scores.softmax(-1).sum(1))
        found.append(torch.stack(sums).sum(0).mean(0))
    return torch.stack(found)
