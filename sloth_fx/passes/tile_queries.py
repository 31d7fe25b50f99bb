"""Replace the attention core by one whose queries attend within their tile and to samples of the whole image.

    out = attend(query, key, value)     ->     out = self.sloth_tile_0(query, key, value)

What the host asked of its attention besides (a scale, dropout) goes along.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sloth_fx.operators import KeyLayout, near_sighted_attention
from sloth_fx.passes.core import Attend, AttentionCore, check_tokens

_MERGING_IS_FASTER = ("cpu",)  # docs/benchmarks.md; GPUs are not measured yet


class TiledAttention(nn.Module):
    """Near-sighted attention over ``layout``; the host's own attention where the layout has no tiles.

    Takes query, key and value (B, H, N, D), or (B*H, N, D) with ``folded_heads`` = H. ``site`` is named in
    errors.
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
    ) -> None:
        super().__init__()
        self.site = site
        self.attend = attend
        self.layout = layout
        self.folded_heads = folded_heads
        self.concat_local = concat_local
        self.concat_global = concat_global
        self.halves = 1

    def set_layout(self, layout: KeyLayout, halves: int) -> None:
        self.layout, self.halves = layout, halves

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        layout = self.layout
        if layout.tile is None:
            return self.attend(query, key, value, **options)
        check_tokens(self.site, query, layout)
        if self.folded_heads is not None:
            query, key, value = (torch.unflatten(each, 0, (-1, self.folded_heads)) for each in (query, key, value))
        merge = "lse" if self.folded_heads is None and self._merges(query, key, value, options) else "concat"
        out = near_sighted_attention(
            query,
            key,
            value,
            layout,
            gathered=layout.window != (1, 1),
            attend=partial(self.attend if self.folded_heads is None else self._attend_folded, **options),
            merge=merge,
            halves=self.halves,
            concat_local=self.concat_local,
            concat_global=self.concat_global,
        )
        return out if self.folded_heads is None else out.flatten(0, 1)

    def _merges(self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> bool:
        """Whether to merge two attentions instead of copying the samples for every tile: where that was measured to be
        faster, where it computes what the host asked for, and where no gradient is needed (it has none)."""
        if query.device.type not in _MERGING_IS_FASTER or self.attend is not F.scaled_dot_product_attention or options:
            return False
        return not (torch.is_grad_enabled() and any(each.requires_grad for each in (query, key, value)))

    def _attend_folded(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        out = self.attend(query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), **options)
        return torch.unflatten(out, 0, (-1, query.shape[1]))

    def extra_repr(self) -> str:
        return str(self.layout)


def tile_queries(graph: fx.Graph, core: AttentionCore, name: str) -> str:
    """Replace ``core`` by a call of ``self.<name>``, a :class:`TiledAttention`, and return where that is."""
    with graph.inserting_before(core.node):
        given = {**dict(zip(("query", "key", "value"), core.node.args, strict=False)), **core.node.kwargs}
        tiled = graph.call_module(name, (given["query"], given["key"], given["value"]), core.options)
    core.node.replace_all_uses_with(tiled)
    graph.erase_node(core.node)
    graph.lint()
    return "in place of the attention"
