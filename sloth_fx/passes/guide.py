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
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from sloth_fx.branching import Branched, attend_branches
from sloth_fx.errors import SlothError
from sloth_fx.guidance_specs import NAG
from sloth_fx.operators import Attend, KeyLayout, normalized_guidance
from sloth_fx.passes.causal import causal_name, causal_of
from sloth_fx.passes.core import AttentionCore
from sloth_fx.site import Place

Rows = tuple[bool, ...]
"""For each group of conditioning in the batch, one after another, whether it is guided."""


class GuidedAttention(nn.Module):
    """Attention to the text, guided by attention to a negative text of which keys and values are at hand."""

    def __init__(
        self, site: str, attend: Attend, guidance: NAG, layout: KeyLayout, *, folded_heads: int | None
    ) -> None:
        super().__init__()
        self.site = site
        self.attend = attend
        self.guidance = guidance
        self.layout = layout
        self.folded_heads = folded_heads
        self.rows: Rows = (True,)
        self.key: Tensor | None = None  # of the negative text, a row for each of the batch; no state of the model
        self.value: Tensor | None = None
        self.mask: Tensor | None = None

    def set_layout(self, layout: KeyLayout, halves: int) -> None:
        self.layout = layout

    def set_rows(self, rows: Rows) -> None:
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
        out = self.attend(query, key, value, *([] if mask is None else [mask]), **options)
        if not self.layout.guided or not any(self.rows):
            return out
        if self.key is None or self.value is None:
            raise SlothError(f"{self.site}: the negative text is not known; call set_negative of the context first")
        rows = groups(out, self.rows, self.site)
        masks = [] if self.mask is None else [picked(self.mask, self.rows, out.shape[0])]
        negative = self.attend(
            picked(query, self.rows, out.shape[0]),
            picked(self.key, self.rows, out.shape[0]),
            picked(self.value, self.rows, out.shape[0]),
            *masks,
            **options,
        )
        guided = guided_by(picked(out, self.rows, out.shape[0]), negative, self.guidance, self.folded_heads)
        if all(self.rows):
            return guided
        parts = iter(guided.chunk(sum(self.rows)))
        return torch.cat([next(parts) if taken else row for row, taken in zip(rows, self.rows, strict=True)])

    def extra_repr(self) -> str:
        return str(self.guidance)


class BranchedAttention(nn.Module):
    """The host's attention, which attends only once what both texts have in common."""

    def __init__(self, attend: Attend, layout: KeyLayout) -> None:
        super().__init__()
        self.attend = attend
        self.layout = layout

    def set_layout(self, layout: KeyLayout, halves: int) -> None:
        self.layout = layout

    def forward(
        self, query: Any, key: Any, value: Any, mask: Any = None, causal: bool = False, **options: Any
    ) -> Tensor | Branched:
        if causal:
            options[causal_name(self.attend)] = True
        return attend_branches(self.attend, query, key, value, mask, **options)


class _Branches(nn.Module):
    """Knows which rows of a batch belong to the negative text, and where the image lies in its tokens.

    With ``shares`` that text has no rows: it comes as :class:`sloth_fx.branching.Branched` values. ``others`` tells
    whether all that lies before the image, and all that lies after it, goes with it: reference images, but no text.
    """

    def __init__(
        self,
        site: str,
        layout: KeyLayout,
        *,
        query_place: Place,
        key_place: Place | None,
        others: tuple[bool, bool] = (False, False),
    ) -> None:
        super().__init__()
        self.site = site
        self.layout = layout
        self.query_place = query_place
        self.key_place = key_place
        self.others = others
        self.rows: Rows = (True,)
        self.shares = False

    def set_layout(self, layout: KeyLayout, halves: int) -> None:
        self.layout = layout

    def set_rows(self, rows: Rows) -> None:
        self.rows = rows

    def split(self, tensor: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The groups of the batch, and those of the negative text, one for each guided group."""
        guided = sum(self.rows)
        parts = groups(tensor, (*self.rows, *(True,) * guided), self.site)
        return parts[: len(self.rows)], parts[len(self.rows) :]

    def image_of_queries(self, tensor: Tensor) -> tuple[int, int]:
        total = tensor.shape[-2]
        tokens = total if self.query_place.alone else self.layout.tokens
        return self._with_others(self.query_place.start(total, tokens), tokens, total)

    def _with_others(self, start: int, tokens: int, total: int) -> tuple[int, int]:
        first, last = 0 if self.others[0] else start, total if self.others[1] else start + tokens
        return first, last - first


class SharedImage(_Branches):
    """Gives rows of the negative text the image of the rows that they guide: (query, key, value) as they come in.

    ``key_place`` tells where the image lies in the keys, ``None`` that these are of text alone. ``border`` is that of
    the pooling, which tells how many keys of the image there are.
    """

    def __init__(
        self,
        site: str,
        layout: KeyLayout,
        *,
        query_place: Place,
        key_place: Place | None,
        others: tuple[bool, bool] = (False, False),
        border: str = "keep",
    ) -> None:
        super().__init__(site, layout, query_place=query_place, key_place=key_place, others=others)
        self.border = border

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not self.layout.guided or not any(self.rows) or self.shares:
            return query, key, value
        query = self._shared(query, *self.image_of_queries(query))
        if self.key_place is None:
            return query, key, value
        total = key.shape[-2]
        tokens = total if self.key_place.alone else self._keys_of_image()
        start, tokens = self._with_others(self.key_place.start(total, tokens), tokens, total)
        return query, self._shared(key, start, tokens), self._shared(value, start, tokens)

    def _keys_of_image(self) -> int:
        """How many there are, which is fewer where they are pooled."""
        return self.layout.gathered_tokens(self.border) if self.layout.pooled else self.layout.tokens

    def _shared(self, tensor: Tensor, start: int, tokens: int) -> Tensor:
        rows, negative = self.split(tensor)
        guided = [row for row, taken in zip(rows, self.rows, strict=True) if taken]
        images = [row.narrow(-2, start, tokens) for row in guided]
        return torch.cat([*rows, *(_with(row, image, start) for row, image in zip(negative, images, strict=True))])


class GuidedResult(_Branches):
    """Guides the image of an attention's result, and lets the branch of the negative text go on with it as well.

    Without ``guidance`` it goes on with what the other read.
    """

    def __init__(
        self,
        site: str,
        guidance: NAG | None,
        layout: KeyLayout,
        *,
        query_place: Place,
        folded_heads: int | None,
        others: tuple[bool, bool] = (False, False),
    ) -> None:
        super().__init__(site, layout, query_place=query_place, key_place=None, others=others)
        self.guidance = guidance
        self.folded_heads = folded_heads

    def forward(self, out: Any) -> Any:
        if not self.layout.guided or not any(self.rows):
            return out
        start, tokens = self.image_of_queries(out)
        if self.shares:
            return self._guided(out, start, start + tokens)
        rows, negative = self.split(out)
        found = list(rows)
        for index, row in zip(_guided(self.rows), negative, strict=True):
            image = rows[index].narrow(-2, start, tokens)
            if self.guidance is not None:
                image = guided_by(image, row.narrow(-2, start, tokens), self.guidance, self.folded_heads)
                found[index] = _with(rows[index], image, start)
            found.append(_with(row, image, start))
        return torch.cat(found)

    def _guided(self, out: Any, start: int, stop: int) -> Any:
        if not isinstance(out, Branched):
            return out
        both = out[..., start:stop, :]
        if not isinstance(both, Branched):
            return out
        image = both.positive
        if self.guidance is not None:
            pairs = zip(*(groups(each, self.rows, self.site) for each in (image, both.negative)), strict=True)
            found = [
                guided_by(positive, negative, self.guidance, self.folded_heads) if taken else positive
                for (positive, negative), taken in zip(pairs, self.rows, strict=True)
            ]
            image = found[0] if len(found) == 1 else torch.cat(found)
        parts = [out[..., :start, :], image, out[..., stop:, :]]
        kept = [part for part in parts if part.shape[-2] > 0]
        return image if len(kept) == 1 else torch.cat(kept, dim=-2)

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


def groups(tensor: Tensor, rows: Rows, site: str) -> Sequence[Tensor]:
    """The batch of ``tensor`` in as many equal parts as there are ``rows``."""
    if tensor.shape[0] % len(rows):
        raise SlothError(
            f"{site}: a batch of {tensor.shape[0]} rows cannot be divided into {len(rows)} groups of conditioning; "
            "say which there are with rows of the context"
        )
    return tensor.chunk(len(rows))


def picked(tensor: Tensor, rows: Rows, batch: int) -> Tensor:
    """The guided groups of a tensor, as far as it has the rows of the batch."""
    if all(rows) or tensor.shape[0] != batch:
        return tensor
    return torch.cat([tensor.chunk(len(rows))[index] for index in _guided(rows)])


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


def _guided(rows: Rows) -> list[int]:
    return [index for index, taken in enumerate(rows) if taken]


def _with(row: Tensor, image: Tensor, start: int) -> Tensor:
    """``row`` with other tokens from ``start`` on."""
    end = start + image.shape[-2]
    if start == 0 and end == row.shape[-2]:
        return image
    return torch.cat([row[..., :start, :], image, row[..., end:, :]], dim=-2)
