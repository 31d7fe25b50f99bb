"""Replace the attention core by one whose queries attend within their tile and to samples of the whole image.

    out = attend(query, key, value, mask)     ->     out = self.sloth_tile_0(query, key, value, mask, causal)

What the host asked of its attention besides (a scale, dropout) goes along.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sloth_fx.branching import each_row
from sloth_fx.operators import KeyLayout, both_masks, causal_mask, near_sighted_attention
from sloth_fx.passes.causal import causal_name, causal_of
from sloth_fx.passes.core import Attend, AttentionCore, check_tokens
from sloth_fx.passes.merging import Merging, with_merged_queries
from sloth_fx.site import Place

_MERGING_IS_FASTER = ("cpu",)  # docs/benchmarks.md; GPUs are not measured yet


class TiledAttention(nn.Module):
    """Near-sighted attention over ``layout``; the host's own attention where the layout has no tiles.

    Takes query, key and value (B, H, N, D), or (B*H, N, D) with ``folded_heads`` = H, and the host's mask, which
    broadcasts to (B, H, N, M) or (B*H, N, M). ``query_place`` and ``key_place`` tell where the image lies in sequences
    with other tokens, ``border`` how its keys were pooled. With ``merging``, the queries are merged in each tile, or in
    the whole grid where there are none. ``site`` is named in errors.
    """

    def __init__(
        self,
        site: str,
        attend: Attend,
        layout: KeyLayout,
        *,
        folded_heads: int | None,
        concat_local: bool,
        concat_global: bool,
        query_place: Place | None = None,
        key_place: Place | None = None,
        border: str = "keep",
        merging: Merging | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.site = site
        self.attend = attend
        self.layout = layout
        self.folded_heads = folded_heads
        self.concat_local = concat_local
        self.concat_global = concat_global
        self.query_place = query_place or Place()
        self.key_place = key_place or Place()
        self.border = border
        self.merging = merging
        self.seed = torch.tensor(seed)  # of one number, which goes with tensors of any device; no state of the model
        self.halves = 1

    def set_layout(self, layout: KeyLayout, halves: int) -> None:
        self.layout, self.halves = layout, halves

    def set_seed(self, seed: int) -> None:
        """Choose other destinations from now on, where queries are merged."""
        self.seed.fill_(seed)

    @each_row
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
        rotated: bool = False,
        **options: Any,
    ) -> Tensor:
        layout = self.layout
        if layout.tile is None and self.merging is None:
            if causal:
                options[causal_name(self.attend)] = True
            return self.attend(query, key, value, *([] if mask is None else [mask]), **options)
        if self.query_place.alone:
            check_tokens(self.site, query, layout)
        if causal:
            mask = both_masks(mask, causal_mask(query.shape[-2], key.shape[-2], query.device))
        if self.folded_heads is not None:
            query, key, value = (torch.unflatten(each, 0, (-1, self.folded_heads)) for each in (query, key, value))
        merge = "lse" if self._merges(query, key, value, mask, options) else "concat"
        out = near_sighted_attention(
            query,
            key,
            value,
            layout,
            gathered=layout.pooled,
            border=self.border,
            mask=None if mask is None else self._with_heads(mask),
            query_place=self.query_place,
            key_place=self.key_place,
            attend=partial(self.attend if self.folded_heads is None else self._attend_folded, **options),
            within=None if self.merging is None else partial(self._with_merged_queries, rotated=rotated),
            merge=merge,
            halves=self.halves,
            concat_local=self.concat_local,
            concat_global=self.concat_global,
        )
        return out if self.folded_heads is None else out.flatten(0, 1)

    def _merges(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]) -> bool:
        """Whether to merge two attentions instead of copying the samples for every tile: where that was measured to be
        faster, where it computes what the host asked for, and where no gradient is needed (it has none)."""
        if query.device.type not in _MERGING_IS_FASTER or self.attend is not F.scaled_dot_product_attention:
            return False
        if mask is not None or options or self.folded_heads is not None or self.merging is not None:
            return False
        return not (torch.is_grad_enabled() and any(each.requires_grad for each in (query, key, value)))

    def _with_merged_queries(self, attend: Attend, size: tuple[int, int], rotated: bool) -> Attend:
        assert self.merging is not None
        return with_merged_queries(attend, size, self.merging, self.seed, rotated)

    def _with_heads(self, mask: Tensor) -> Tensor:
        """(B, H, N, M), as far as the mask has these axes."""
        if self.folded_heads is not None and mask.ndim == 3 and mask.shape[0] > 1:
            mask = torch.unflatten(mask, 0, (-1, self.folded_heads))
        return mask[(None,) * (4 - mask.ndim)]

    def _attend_folded(self, query: Tensor, key: Tensor, value: Tensor, *masks: Tensor, **options: Any) -> Tensor:
        heads = query.shape[1]
        folded = [mask.expand(-1, heads, -1, -1).flatten(0, 1) for mask in masks]
        out = self.attend(query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), *folded, **options)
        return torch.unflatten(out, 0, (-1, heads))

    def extra_repr(self) -> str:
        return str(self.layout)


def tile_queries(graph: fx.Graph, core: AttentionCore, name: str, *, rotated: bool = False) -> str:
    """Replace ``core`` by a call of ``self.<name>``, a :class:`TiledAttention`, and return where that is.

    ``rotated`` tells it that its queries have a rotary embedding, so that merged ones have no mean.
    """
    causal = causal_of(core)
    masks = (core.mask, causal) if causal is not False else (core.mask,) if core.mask is not None else ()
    options = {**core.options, **({"rotated": True} if rotated else {})}
    with graph.inserting_before(core.node):
        tiled = graph.call_module(name, (core.query, core.key, core.value, *masks), options)
    core.node.replace_all_uses_with(tiled)
    graph.erase_node(core.node)
    graph.lint()
    return "in place of the attention"
