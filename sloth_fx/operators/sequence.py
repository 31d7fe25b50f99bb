"""Where the image tokens lie in a sequence with others, and taking the two apart."""

from __future__ import annotations

import torch
from torch import Tensor

from sloth_fx.errors import SlothError
from sloth_fx.site import Place


def split_image(tensor: Tensor, place: Place, tokens: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """(before, image, after): the sequence along `dim` cut into `tokens` image tokens and the others around them.

    Views; before and after may be empty.

    Raises:
        SlothError: the sequence has others though `place.alone`, or is too short.
    """
    total = tensor.shape[dim]
    start = image_start(place, total, tokens)
    before, image, after = torch.split(tensor, [start, tokens, total - start - tokens], dim)
    return before, image, after


def join_image(before: Tensor, image: Tensor, after: Tensor, dim: int) -> Tensor:
    """The inverse of `split_image`, for an image that may be of another length now. Empty parts are not copied."""
    parts = [part for part in (before, image, after) if part.shape[dim] > 0]
    return torch.cat(parts, dim) if len(parts) > 1 else image


def image_start(place: Place, total: int, tokens: int) -> int:
    """The first of `tokens` image tokens in a sequence of `total`; raises `SlothError` where they do not fit."""
    start = place.start(total, tokens)
    if (place.alone and total != tokens) or start < 0 or start + tokens > total:
        others = "no others" if place.alone else f"{place.offset} {'after' if place.from_end else 'before'} them"
        raise SlothError(f"{total} tokens do not hold {tokens} image tokens and {others}")
    return start
