"""Guidance of an attention's result by that of another text."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

_ORDERS = {"l1": 1, "l2": 2}


def normalized_guidance(
    positive: Tensor,
    negative: Tensor,
    *,
    scale: float,
    tau: float,
    alpha: float,
    norm: Literal["l1", "l2"] = "l1",
    channels: tuple[int, ...] = (-1,),
) -> Tensor:
    """Z of :class:`sloth_fx.guidance_specs.NAG`, of the shape and dtype of ``positive``.

    Args:
        positive, negative: Z+ and Z-, of one shape.
        scale, tau, alpha: as in NAG, a factor each.
        norm: of the ``channels``, the axes along which a token lies. Norms are taken in float32 at least.

    With ``scale`` 1 the result is ``positive``, bit for bit. A token of zeros stays what it is, if ``tau`` is finite.
    Source: Normalized Attention Guidance (arXiv 2505.21179).
    """
    guided = torch.lerp(negative, positive, scale)
    if tau == math.inf:  # which is no factor: times a norm of 0 it is not a number
        return torch.lerp(positive, guided, alpha)
    order, precision = _ORDERS[norm], torch.promote_types(positive.dtype, torch.float32)
    before, after = (
        torch.linalg.vector_norm(each, order, channels, keepdim=True, dtype=precision) for each in (positive, guided)
    )
    # min(R, tau) / R, without the quotient R: nothing is divided by a norm that is 0
    smallest = torch.finfo(precision).tiny
    factor = (tau * before / after.clamp(min=smallest)).clamp(max=1).to(positive.dtype)
    return torch.lerp(positive, guided * factor, alpha)
