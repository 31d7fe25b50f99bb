"""Let a negative text guide what an attention reads.

Where the negative text's keys and values are known (they do not depend on the latent), they are attended besides:

    out = attend(query, key, value)      ->     out = self.sloth_guide_0(query, key, value)

Otherwise the negative text passes the model in a branch of its own. The image is the same in both branches, and both go
on with the guided result. Where the branches are rows of one batch, a row of the negative text takes queries, keys and
values of the image from the row that it guides.

    out = attend(query, key, value)      ->     shared = self.sloth_share_0(query, key, value)
                                                out = self.sloth_guide_0(self.sloth_attend_0(*shared))
"""

from __future__ import annotations

import operator
from functools import partial

import torch
from torch import Tensor, fx, nn

from sloth_fx.branching import Groups, apart, by_rows, rows_in
from sloth_fx.errors import SlothError
from sloth_fx.guidance_specs import NAG
from sloth_fx.operators import Attend, KeyLayout
from sloth_fx.passes.causal import causal_name, causal_of
from sloth_fx.passes.conditioned import groups, guided_by, picked
from sloth_fx.passes.core import AttentionCore


class GuidedAttention(nn.Module):
    """Attention to the text, guided by attention to a negative text of which keys and values are at hand.

    While it is ``alone``, the batch has no rows but those that are guided: those of a perturbed call.
    """

    def __init__(
        self, site: str, attend: Attend, guidance: NAG, layout: KeyLayout, *, folded_heads: int | None
    ) -> None:
        super().__init__()
        self.site = site
        self.attend = attend
        self.guidance = guidance
        self.layout = layout
        self.folded_heads = folded_heads
        self.rows: Groups = (True,)
        self.alone = False
        self.key: Tensor | None = None  # of the negative text, a row for each of the batch; no state of the model
        self.value: Tensor | None = None
        self.mask: Tensor | None = None

    def set_layout(self, layout: KeyLayout, halves: int) -> None:
        self.layout = layout

    def set_rows(self, rows: Groups) -> None:
        self.rows = rows

    def set_negative(self, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
        self.key, self.value, self.mask = key, value, mask

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
        **options: object,
    ) -> Tensor:
        if causal:
            options[causal_name(self.attend)] = True
        given = (query, key, value, mask, options)
        everywhere = partial(self._guided, self.rows)
        if self.alone:
            return self._guided((True,), *given)
        if not any(each.parted for each in rows_in(given)):
            return by_rows(everywhere, *given)  # type: ignore[no-any-return]
        return apart(everywhere, partial(self._guided, (True,)), *given)  # type: ignore[no-any-return]

    def _guided(
        self, taken: Groups, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, object]
    ) -> Tensor:
        """The result for rows of which some groups are guided: for all of the batch, or for those alone that are."""
        out = self.attend(query, key, value, *([] if mask is None else [mask]), **options)
        if not self.layout.guided or not any(self.rows):
            return out
        if self.key is None or self.value is None:
            raise SlothError(f"{self.site}: the negative text is not known; call set_negative of the context first")
        batch = out.shape[0] * len(self.rows) // (sum(self.rows) if all(taken) else len(self.rows))
        rows = groups(out, taken, self.site)
        masks = [] if self.mask is None else [picked(self.mask, self.rows, batch)]
        negative = self.attend(
            picked(query, taken, out.shape[0]),
            picked(self.key, self.rows, batch),
            picked(self.value, self.rows, batch),
            *masks,
            **options,
        )
        guided = guided_by(picked(out, taken, out.shape[0]), negative, self.guidance, self.folded_heads)
        if all(taken):
            return guided
        parts = iter(guided.chunk(sum(taken)))
        return torch.cat([next(parts) if guides else row for row, guides in zip(rows, taken, strict=True)])

    def extra_repr(self) -> str:
        return str(self.guidance)


def guide(graph: fx.Graph, core: AttentionCore, name: str) -> str:
    """Replace ``core`` by a call of ``self.<name>``, a :class:`GuidedAttention`, and say what was done."""
    _replace(graph, core, name)
    graph.lint()
    return "guided by a negative text, whose keys and values are computed once"


def branch(graph: fx.Graph, core: AttentionCore, share: str, result: str, attend: str | None = None) -> AttentionCore:
    """Put ``self.<share>``, a :class:`SharedImage`, before ``core``, and ``self.<result>``, a :class:`GuidedResult`,
    after it; and ``self.<attend>``, a :class:`BranchedAttention`, in its place, if it is given."""
    with graph.inserting_before(core.node):
        shared = graph.call_module(share, (core.query, core.key, core.value))
        query, key, value = (graph.call_function(operator.getitem, (shared, index)) for index in range(3))
        for new, old in ((query, core.query), (key, core.key), (value, core.value)):
            if "hint" in old.meta:  # not what another pass has just put there
                new.meta["hint"] = old.meta["hint"]
    core = core.replace(query=query, key=key, value=value)
    with graph.inserting_after(core.node):
        guided = graph.call_module(result, (core.node,))
    core.node.replace_all_uses_with(guided, delete_user_cb=lambda user: user is not guided)
    if attend is not None:
        _replace(graph, core, attend)
    graph.lint()
    return core


def _replace(graph: fx.Graph, core: AttentionCore, name: str) -> None:
    causal = causal_of(core)
    masks = (core.mask, causal) if causal is not False else (core.mask,) if core.mask is not None else ()
    with graph.inserting_before(core.node):
        new = graph.call_module(name, (core.query, core.key, core.value, *masks), core.options)
    core.node.replace_all_uses_with(new)
    graph.erase_node(core.node)
