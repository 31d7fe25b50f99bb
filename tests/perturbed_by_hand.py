"""Guidance by perturbed attention once more, by brute force and in float64.

The unpatched model runs twice: as it is, and for the guided rows alone with torch's attention exchanged at some of its
calls. Nothing is shared with the library.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

Attention = Callable[..., Tensor]
_ATTEND = F.scaled_dot_product_attention


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Attention written out."""
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ value


def itself(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    return value


def itself_and_others(first: int, tokens: int) -> Attention:
    """Joint attention in which tokens of the image from ``first`` on see themselves and the others."""

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        sees = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool)
        sees[first : first + tokens, first : first + tokens] = torch.eye(tokens, dtype=torch.bool)
        if attn_mask is not None:
            bias = torch.zeros(attn_mask.shape, dtype=query.dtype)
            bias = bias.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else attn_mask
            return attend(query, key, value, bias.masked_fill(~sees, -torch.inf))
        return attend(query, key, value, sees)

    return attention


def mean_queries(first: int = 0, tokens: int | None = None, frames: int = 1) -> Attention:
    """Attention in which each query of the image is the mean of all of its frame."""

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        query = query.clone()
        for image in query[:, :, first : None if tokens is None else first + tokens].chunk(frames, 2):
            image[:] = image.mean(2, keepdim=True)
        return attend(query, key, value, attn_mask)

    return attention


@contextmanager
def exchanged(sites: Collection[int], attention: Attention, seen: list[int] | None = None) -> Iterator[None]:
    """Torch's attention is ``attention`` at these of its calls."""
    calls = iter(range(10**6))

    def attend_or(*args: Any, **kwargs: Any) -> Tensor:
        number = next(calls)
        if number not in sites:
            return _ATTEND(*args, **kwargs)
        if seen is not None:
            seen.append(number)
        return attention(*args, **kwargs)

    with mock.patch.object(F, "scaled_dot_product_attention", attend_or):
        yield


def rows_of(value: Any, batch: int, rows: Sequence[int]) -> Any:
    """Arguments of some rows of the batch."""
    if isinstance(value, Tensor):
        return value[list(rows)] if value.ndim and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {name: rows_of(each, batch, rows) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(rows_of(each, batch, rows) for each in value)
    return value


def two_calls(
    model: nn.Module,
    call: dict[str, Any],
    sites: Collection[int],
    attention: Attention,
    *,
    batch: int,
    rows: Sequence[int],
    run: Callable[[nn.Module, dict[str, Any]], Any],
) -> tuple[Any, Any]:
    """What the model predicts, and what it predicts for ``rows`` with other attention at ``sites``."""
    seen: list[int] = []
    with torch.no_grad():
        prediction = run(model, call)
        with exchanged(sites, attention, seen):
            perturbed = run(model, rows_of(call, batch, rows))
    assert len(seen) == len(sites)
    return prediction, perturbed


def operations(function: Callable[[], Any]) -> int:
    """Of products of matrices, convolutions and attention, two for each multiplication."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function()
    found: int = counter.get_total_flops()
    return found
