"""Attention that also returns its normaliser, so that two attentions of the same queries can be merged into one.

softmax over the keys of two sets = the two softmaxes, weighted by the sums of their exponentials. The fused kernels
compute the logarithm of that sum anyway; torch has no public function that returns it, so the private names live here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sloth_fx.operators.masks import additive

# The namespace raises for a name that a release does not have: None leads to the plain softmax.
_CPU = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention", None)
_EFFICIENT = getattr(torch.ops.aten, "_scaled_dot_product_efficient_attention", None)


def attention_with_lse(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scaled dot product attention and the log-sum-exp of its scores.

    out = softmax(s) v, lse = log(sum_m exp(s_m)), with s = scale * q k^T.

    Args:
        query: (B, H, N, D).
        key: (B, H, M, D).
        value: (B, H, M, Dv).
        scale: D ** -0.5 when None.
        mask: bool (False hides) or additive, broadcasts to (B, H, N, M) and has its four axes.

    Returns:
        out (B, H, N, Dv) in the dtype of the query, and lse (B, H, N) in float32 (float64 for float64). Without keys,
        because M = 0 or all are hidden, they are 0 and -inf.

    A fused kernel where there is one for the device, the dtype and the shapes; otherwise a plain softmax in float32.
    Also plain where a gradient is needed, because the kernels have none for lse.
    """
    bias = None if mask is None else additive(mask, query.dtype)
    out, lse = _attention(query, key, value, scale, bias)
    if bias is not None:  # kernels differ in what they give for a query that sees nothing
        blind = (bias == -torch.inf).all(-1).expand(lse.shape)
        out, lse = out.masked_fill(blind.unsqueeze(-1), 0), lse.masked_fill(blind, -torch.inf)
    return out, lse


def _attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    tensors = (query, key, value)
    fusable = (
        not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        and key.shape[2] > 0  # the CPU kernel divides by it
        and query.shape[1] == key.shape[1]
        and query.dtype.is_floating_point
    )
    if fusable and query.device.type == "cpu" and _CPU is not None and query.shape[-1] == value.shape[-1]:
        out, lse = _CPU(query, key, value, 0.0, False, attn_mask=bias, scale=scale)
        return out, lse
    if fusable and query.device.type == "cuda" and query.dtype != torch.float64:
        if _FLASH is not None and bias is None and _flash_fits(query, value):
            out, lse = _FLASH(query, key, value, 0.0, False, False, scale=scale)[:2]
            return out, lse[..., : query.shape[2]]  # some releases round the length up
        if _EFFICIENT is not None and _efficient_fits(query, value):
            bias = None if bias is None else _aligned(bias, query, key)
            out, lse = _EFFICIENT(query, key, value, bias, True, 0.0, False, scale=scale)[:2]
            return out, lse[..., : query.shape[2]]
    return _plain(query, key, value, scale, bias)


def merge_attention(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> Tensor:
    """The attention over two sets of keys, from the attention over each.

    (e^lse1 out1 + e^lse2 out2) / (e^lse1 + e^lse2) = out1 + sigmoid(lse2 - lse1) (out2 - out1).

    Args:
        out1: (B, H, N, Dv).
        lse1: (B, H, N); -inf stands for no keys, whose out has to be finite.
        out2: as out1.
        lse2: as lse1.

    Returns:
        (B, H, N, Dv) in the dtype of out1. No exponential can overflow; where both are -inf, the mean of the two.
    """
    weight = (lse2 - lse1).nan_to_num().sigmoid()
    return torch.lerp(out1, out2, weight.to(out1.dtype).unsqueeze(-1))


def _aligned(bias: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The efficient kernel wants rows that begin at multiples of 16 bytes, for all heads and queries."""
    keys = key.shape[2]
    rows = F.pad(bias.expand(*bias.shape[:3], keys), (0, -keys % 16))[..., :keys]
    return rows.expand(*query.shape[:3], keys)


def _plain(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(query.dtype, torch.float32)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query.to(dtype) * scale) @ key.to(dtype).mT
    if bias is not None:
        scores = scores + bias
    lse = scores.logsumexp(-1)
    # exp(scores - lse) is the softmax; of no keys at all it is an empty sum, so 0.
    return ((scores - lse.unsqueeze(-1)).exp() @ value.to(dtype)).to(query.dtype), lse


def _flash_fits(query: Tensor, value: Tensor) -> bool:
    size = query.shape[-1]
    half = query.dtype in (torch.float16, torch.bfloat16)
    return half and size == value.shape[-1] and size <= 256 and size % 8 == 0 and _ampere(query.device)


def _efficient_fits(query: Tensor, value: Tensor) -> bool:
    step = 4 if query.dtype == torch.float32 else 8  # rows of 16 bytes
    return query.shape[-1] % step == 0 and value.shape[-1] % step == 0


def _ampere(device: torch.device) -> bool:
    return torch.version.hip is not None or torch.cuda.get_device_properties(device).major >= 8
