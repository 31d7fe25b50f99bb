"""A batch in groups of conditioning, of which some are guided."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sloth_fx.branching import Groups
from sloth_fx.errors import SlothError
from sloth_fx.guidance_specs import NAG
from sloth_fx.operators import normalized_guidance


def groups(tensor: Tensor, rows: Groups, site: str) -> Sequence[Tensor]:
    """The batch of ``tensor`` in as many equal parts as there are ``rows``."""
    if tensor.shape[0] % len(rows):
        raise SlothError(
            f"{site}: a batch of {tensor.shape[0]} rows cannot be divided into {len(rows)} groups of conditioning; "
            "say which there are with rows of the context"
        )
    return tensor.chunk(len(rows))


def picked(tensor: Tensor, rows: Groups, batch: int) -> Tensor:
    """The guided groups of a tensor, as far as it has the rows of the batch."""
    if all(rows) or tensor.shape[0] != batch:
        return tensor
    return torch.cat([tensor.chunk(len(rows))[index] for index in guided_groups(rows)])


def guided_by(positive: Tensor, negative: Tensor, guidance: NAG, folded_heads: int | None) -> Tensor:
    """The guided result of attention, (B, H, N, D); (B * H, N, D) where the heads are folded into the batch."""
    if folded_heads is not None:
        positive, negative = (torch.unflatten(each, 0, (-1, folded_heads)) for each in (positive, negative))
    guided = normalized_guidance(
        positive,
        negative,
        scale=guidance.scale,
        tau=guidance.tau,
        alpha=guidance.alpha,
        norm=guidance.norm,
        channels=(1, 3),
    )
    return guided if folded_heads is None else guided.flatten(0, 1)


def guided_groups(rows: Groups) -> list[int]:
    return [index for index, taken in enumerate(rows) if taken]


def with_image(row: Tensor, image: Tensor, start: int) -> Tensor:
    """``row`` with other tokens from ``start`` on."""
    end = start + image.shape[-2]
    if start == 0 and end == row.shape[-2]:
        return image
    return torch.cat([row[..., :start, :], image, row[..., end:, :]], dim=-2)
