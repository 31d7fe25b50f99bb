"""Normalized attention guidance once more, by brute force and in float64.

The model runs with a row for the negative text behind each row that it guides. At every attention to text the image
tokens of such a row are made those of the row that it guides, before attention and after it. Nothing is shared with the
library: torch's attention is exchanged while the unpatched model runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Barrier, local
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sloth_fx
from tests.zoo.count import attend


@dataclass(frozen=True)
class ReadsText:
    """An attention of image tokens to text. ``queries`` and ``keys`` are the image's among the tokens: ``None`` stands
    for all queries, and for no key. ``guided`` tells whether a spec selects it, and ``attend`` what takes the place of
    attention there."""

    queries: slice | None = None
    keys: slice | None = None
    guided: bool = True
    attend: Callable[..., Tensor] = attend


CROSS = ReadsText()
Sites = Callable[[Tensor, Tensor], ReadsText | None]
"""What an attention of query and key is; ``None`` where no image token reads text. It is asked once for each."""


def joint(first: int, tokens: int, *, guided: bool = True, attend: Callable[..., Tensor] = attend) -> ReadsText:
    """Attention over a sequence in which the image lies from ``first`` on."""
    image = slice(first, first + tokens)
    return ReadsText(image, image, guided, attend)


def in_order(sites: Iterable[ReadsText | None]) -> Sites:
    left = iter(sites)
    return lambda query, key: next(left)


def guide(positive: Tensor, negative: Tensor, spec: sloth_fx.NAG) -> Tensor:
    """(B, H, N, D), of which all heads of a token have one norm."""
    plus, minus = (each.double().transpose(1, 2).flatten(2).numpy() for each in (positive, negative))
    moved = plus + (spec.scale - 1) * (plus - minus)
    before, after = (np.linalg.norm(each, {"l1": 1, "l2": 2}[spec.norm], axis=-1) for each in (plus, moved))
    held = after > spec.tau * before
    moved[held] *= (spec.tau * before[held] / after[held])[:, None]
    found = torch.from_numpy(plus + spec.alpha * (moved - plus))
    return found.unflatten(2, (positive.shape[1], -1)).transpose(1, 2).to(positive.dtype)


def two_branches(
    model: nn.Module,
    call: dict[str, Any],
    negative: dict[str, Any],
    spec: sloth_fx.NAG,
    sites: Sites,
    *,
    batch: int,
    run: Callable[[nn.Module, dict[str, Any]], Any],
    rows: Sequence[int] | None = None,
    lengths: tuple[int, int] | None = None,
) -> Any:
    """What ``run(model, call)`` gives with guidance by the ``negative`` arguments, one row for each that is guided.

    ``rows`` are those of the ``batch`` that are guided (default: all). ``lengths`` are those of the text and of the
    negative text where they differ; what is given is then padded to the longer one.
    """
    guided = list(range(batch)) if rows is None else list(rows)
    given = {name: _wide(value, negative.get(name), batch, guided) for name, value in call.items()}
    with _guiding(spec, sites, batch, guided, lengths):
        return run(model, given)


def _wide(value: Any, negative: Any, batch: int, guided: list[int]) -> Any:
    """``value`` with rows behind it: of ``negative`` where that is given, else of its own."""
    if isinstance(value, Tensor) and value.ndim and value.shape[0] == batch:
        return torch.cat([value, value[guided] if negative is None else negative])
    if isinstance(value, dict):
        return {key: _wide(item, (negative or {}).get(key), batch, guided) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and len(value) == batch and all(isinstance(each, Tensor) for each in value):
        return [*value, *([value[row] for row in guided] if negative is None else negative)]
    if isinstance(value, (list, tuple)):
        others = [None] * len(value) if negative is None else negative
        return [_wide(item, other, batch, guided) for item, other in zip(value, others, strict=True)]
    return value


@contextmanager
def _guiding(
    spec: sloth_fx.NAG, sites: Sites, batch: int, guided: list[int], lengths: tuple[int, int] | None
) -> Iterator[None]:
    def stand_in(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        options = {**dict(zip(("attn_mask", "dropout_p", "is_causal"), args, strict=False)), **kwargs}
        site = sites(query, key)
        if site is None:
            return attend(query, key, value, **options)
        query, key, value = query.clone(), key.clone(), value.clone()
        image = slice(0, query.shape[-2]) if site.queries is None else site.queries
        query[batch:, :, image] = query[guided][:, :, image]
        for each in (key, value) if site.keys is not None else ():
            each[batch:, :, site.keys] = each[guided][:, :, site.keys]
        if lengths is None:
            out = site.attend(query, key, value, **options)
        else:
            assert options.get("attn_mask") is None
            cut = ((slice(0, batch), lengths[0]), (slice(batch, None), lengths[1]))
            out = torch.cat([site.attend(query[of], key[of, :, :n], value[of, :, :n], **options) for of, n in cut])
        new = out[guided][:, :, image]
        if site.guided:
            new = guide(new, out[batch:, :, image], spec)
        out[guided, :, image] = out[batch:, :, image] = new
        return out

    with mock.patch.object(F, "scaled_dot_product_attention", stand_in):
        yield


def in_step(
    model: nn.Module,
    calls: tuple[dict[str, Any], dict[str, Any]],
    spec: sloth_fx.NAG,
    sites: tuple[Sites, Sites],
    *,
    run: Callable[[nn.Module, dict[str, Any]], Any],
    rows: Sequence[int] | None = None,
) -> Any:
    """What ``run(model, calls[0])`` gives with guidance by the text of ``calls[1]``, of any length: two separate calls
    of the model, in two threads, of which the second takes the image of the first at each attention to text.

    ``sites`` are those of each call; ``rows`` of the batch are guided (default: all).
    """
    meet, given, read = Barrier(2, timeout=60), [None, None], [None, None]
    branch = local()

    def stand_in(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        options = {**dict(zip(("attn_mask", "dropout_p", "is_causal"), args, strict=False)), **kwargs}
        mine = branch.number
        site = sites[mine](query, key)
        if site is None:
            return attend(query, key, value, **options)
        given[mine] = site, query, key, value
        meet.wait()
        if mine:
            query, key, value = query.clone(), key.clone(), value.clone()
            theirs, *image = given[0]
            query[..., _all(site.queries), :] = image[0][..., _all(theirs.queries), :]
            for each, other in zip((key, value), image[1:], strict=True) if site.keys is not None else ():
                each[..., site.keys, :] = other[..., theirs.keys, :]
        out = site.attend(query, key, value, **options)
        read[mine] = out[..., _all(site.queries), :].clone()
        meet.wait()
        image, negative = read
        meet.wait()
        if site.guided:
            guided = guide(image, negative, spec)
            image = guided if rows is None else image.index_copy(0, torch.tensor(rows), guided[list(rows)])
        out[..., _all(site.queries), :] = image
        return out

    def call(number: int) -> Any:
        branch.number = number
        try:
            return run(model, calls[number])
        except BaseException:
            meet.abort()
            raise

    with mock.patch.object(F, "scaled_dot_product_attention", stand_in), ThreadPoolExecutor(2) as pool:
        result, _ = pool.map(call, range(2))
    return result


def _all(tokens: slice | None) -> slice:
    return slice(None) if tokens is None else tokens
