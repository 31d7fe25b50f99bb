"""The operator module that lets an attention work on merged tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sloth_fx.branching import each_row
from sloth_fx.errors import SlothError
from sloth_fx.operators import KeyLayout, both_masks, causal_mask, join_image, split_image
from sloth_fx.operators.merging import MergeMap, choose, merge, merge_map, merged_tokens, unmerge
from sloth_fx.passes.causal import causal_name
from sloth_fx.passes.core import Attend
from sloth_fx.site import Place


class Merging(NamedTuple):
    """``ratio``: the share of tokens that is merged away. ``cell``: (rows, columns) with one destination each.
    ``tokens``: "all", "q" (queries only) or "kv" (keys and values only)."""

    ratio: float = 0.5
    cell: tuple[int, int] = (2, 2)
    tokens: str = "all"


class MergedAttention(nn.Module):
    """Attention over merged image tokens; the host's own where none is merged.

    Takes query, key and value (B, H, N, D), or (B*H, N, D) with ``folded_heads`` = H, and the host's mask. Tokens are
    alike as their ``metric`` (B, N, C) is, by default the keys, or the queries where these alone are merged. Where
    queries and keys are ``rotated``, merged ones are those of their destination, because two places have no mean;
    values are always the mean. ``site`` is named in errors. A new seed is no new graph.
    """

    def __init__(
        self,
        site: str,
        attend: Attend,
        layout: KeyLayout,
        merging: Merging,
        *,
        folded_heads: int | None = None,
        query_place: Place | None = None,
        key_place: Place | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.site = site
        self.attend = attend
        self.layout = layout
        self.merging = merging
        self.folded_heads = folded_heads
        self.query_place = query_place or Place()
        self.key_place = key_place or Place()
        self.seed = torch.tensor(seed)  # of one number, which goes with tensors of any device; no state of the model
        self.tokens = _MergeTokens(self)
        self.unmerged = _Unmerge()

    def set_layout(self, layout: KeyLayout, halves: int) -> None:
        self.layout = layout

    def set_seed(self, seed: int) -> None:
        """Choose other destinations from now on."""
        self.seed.fill_(seed)

    @property
    def acts(self) -> bool:
        return merged_tokens(self.layout.grid, self.merging.cell, self.merging.ratio) > 0

    def map_of(self, metric: Tensor) -> MergeMap:
        """The map of (B, N, C) image tokens, by how alike they are."""
        layout = self.layout
        if metric.shape[1] != layout.tokens:
            raise SlothError(
                f"{self.site}: {metric.shape[1]} tokens do not fit {layout.frames} x {layout.grid}, which this latent "
                "should give; give transform example_inputs of this size"
            )
        return merge_map(metric, layout.grid, self.merging.cell, self.merging.ratio, self.seed, layout.frames)

    @each_row
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
        *,
        metric: Tensor | None = None,
        rotated: bool = False,
        **options: Any,
    ) -> Tensor:
        if not self.acts:
            told = {causal_name(self.attend): True} if causal else {}
            return self.attend(query, key, value, *([] if mask is None else [mask]), **told, **options)
        if causal:
            mask = both_masks(mask, causal_mask(query.shape[-2], key.shape[-2], query.device))
        attend = partial(self.attend, **options)
        if self.folded_heads is None:
            return self._merged(query, key, value, mask, attend, metric, rotated)
        query, key, value = (torch.unflatten(each, 0, (-1, self.folded_heads)) for each in (query, key, value))
        if mask is not None and mask.ndim == 3 and mask.shape[0] > 1:
            mask = torch.unflatten(mask, 0, (-1, self.folded_heads))
        return self._merged(query, key, value, mask, partial(_folded, attend), metric, rotated).flatten(0, 1)

    def _merged(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        attend: Attend,
        metric: Tensor | None,
        rotated: bool,
    ) -> Tensor:
        tokens = self.layout.tokens
        before, image, after = split_image(query, self.query_place, tokens, 2)
        mapping = self.map_of(self._metric(metric, image, key))
        if mask is not None:
            mask = mask[(None,) * (4 - mask.ndim)]
        if self.merging.tokens != "kv":
            query = join_image(before, _of_heads(choose if rotated else merge, image, mapping), after, 2)
            if mask is not None and mask.shape[2] > 1:
                mask = self._of_mask(mask, 2, mapping, self.query_place)
        if self.merging.tokens != "q":
            key, value = (
                join_image(first, _of_heads(how, part, mapping), last, 2)
                for how, (first, part, last) in (
                    (choose if rotated else merge, split_image(key, self.key_place, tokens, 2)),
                    (merge, split_image(value, self.key_place, tokens, 2)),
                )
            )
            if mask is not None and mask.shape[3] > 1:
                mask = self._of_mask(mask, 3, mapping, self.key_place)
        out = attend(query, key, value, *([] if mask is None else [mask]))
        if self.merging.tokens == "kv":
            return out
        before, merged, after = split_image(out, self.query_place, mapping.chosen.shape[1], 2)
        return join_image(before, _of_heads(unmerge, merged, mapping), after, 2)

    def _metric(self, metric: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
        tokens = self.layout.tokens
        if metric is not None and metric.shape[0] == query.shape[0]:  # else the host attends to one sample at a time
            return metric if metric.shape[1] == tokens else split_image(metric, self.key_place, tokens, 1)[1]
        keys_too = self.merging.tokens != "q"
        return _line(split_image(key, self.key_place, tokens, 2)[1] if keys_too else query)

    def _of_mask(self, mask: Tensor, dim: int, mapping: MergeMap, place: Place) -> Tensor:
        """The mask of merged tokens: of a query that of its destination; a key is seen while one of its tokens is."""
        line = mask.expand(mapping.chosen.shape[0], -1, -1, -1).movedim(dim, 1)
        before, image, after = split_image(line, place, self.layout.tokens, 1)
        rest = image.shape[2:]
        image = (choose if dim == 2 else _greatest)(image.flatten(2), mapping)
        return join_image(before, torch.unflatten(image, 2, rest), after, 1).movedim(1, dim)

    def extra_repr(self) -> str:
        return f"{self.merging}, {self.layout}"


class _MergeTokens(nn.Module):
    """Tokens (B, N, C), merged by their own likeness, and the map back; both as they are where none is merged."""

    def __init__(self, merged: MergedAttention) -> None:
        super().__init__()
        self._merged = (merged,)  # in a tuple, for a child cannot be its own parent

    @each_row
    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        (merged,) = self._merged
        if not merged.acts:
            return tokens, None
        mapping = merged.map_of(tokens)
        return merge(tokens, mapping), mapping.target


class _Unmerge(nn.Module):
    """Gives the result (..., M, D) of merged tokens to all that they were."""

    @each_row
    def forward(self, out: Tensor, target: Tensor | None) -> Tensor:
        if target is None:
            return out
        batch, tokens = target.shape
        line = torch.unflatten(out, 0, (batch, -1)) if out.ndim == 3 else out
        index = target.view(batch, 1, tokens, 1).expand(-1, line.shape[1], -1, line.shape[3])
        back = line.gather(2, index)
        return back.flatten(0, 1) if out.ndim == 3 else back


def with_merged_queries(
    attend: Attend, size: tuple[int, int], merging: Merging, seed: int | Tensor, rotated: bool
) -> Attend:
    """``attend`` for tiles of (rows, columns) ``size``, a batch of them, whose queries are merged in each tile."""
    if merged_tokens(size, merging.cell, merging.ratio) == 0:
        return attend

    def merged(query: Tensor, key: Tensor, value: Tensor, *masks: Tensor, **options: Any) -> Tensor:
        frames = query.shape[2] // (size[0] * size[1])
        mapping = merge_map(_line(query), size, merging.cell, merging.ratio, seed, frames)
        rows = [
            mask if mask.shape[2] == 1 else _of_heads(choose, mask.expand(query.shape[0], -1, -1, -1), mapping)
            for mask in masks
        ]
        out = attend(_of_heads(choose if rotated else merge, query, mapping), key, value, *rows, **options)
        return _of_heads(unmerge, out, mapping)

    return merged


def _line(tensor: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, N, H * D)."""
    return tensor.transpose(1, 2).flatten(2)


def _of_heads(how: Callable[[Tensor, MergeMap], Tensor], tensor: Tensor, mapping: MergeMap) -> Tensor:
    """``how`` on (B, H, N, D)."""
    return torch.unflatten(how(_line(tensor), mapping), 2, (tensor.shape[1], -1)).transpose(1, 2)


def _greatest(line: Tensor, mapping: MergeMap) -> Tensor:
    """(B, N, C) -> (B, M, C): any() of a bool mask, the maximum of what is added."""
    number = line.to(torch.uint8) if line.dtype == torch.bool else line
    low = 0 if line.dtype == torch.bool else -torch.inf
    start = number.new_full((line.shape[0], mapping.chosen.shape[1], line.shape[2]), low)
    target = mapping.target.unsqueeze(-1).expand_as(number)
    return start.scatter_reduce(1, target, number, "amax").to(line.dtype)


def _folded(attend: Attend, query: Tensor, key: Tensor, value: Tensor, *masks: Tensor) -> Tensor:
    heads = query.shape[1]
    folded = [mask.expand(-1, heads, -1, -1).flatten(0, 1) for mask in masks]
    out = attend(query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), *folded)
    return torch.unflatten(out, 0, (-1, heads))
