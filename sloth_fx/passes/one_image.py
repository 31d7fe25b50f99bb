"""Operators for a negative text that passes the model in a branch of its own: there is one image for both branches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sloth_fx.branching import Branched, Groups, Length, Read, Tokens, attend_branches, positive_of
from sloth_fx.errors import SlothError
from sloth_fx.guidance_specs import NAG
from sloth_fx.operators import Attend, KeyLayout
from sloth_fx.passes.causal import causal_name
from sloth_fx.passes.conditioned import groups, guided_by, guided_groups, with_image
from sloth_fx.site import Place


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


class BesideText(NamedTuple):
    """Where the image lies, counted from the side where there were so many tokens of ``text`` when it was located."""

    place: Place
    text: int


class _Branches(nn.Module):
    """Knows which rows of a batch belong to the negative text, and where the image lies in its tokens.

    With ``shares`` that text has no rows: it comes as :class:`sloth_fx.branching.Branched` values. While it is
    ``alone``, the batch has no rows but those that are guided: those of a perturbed call. ``others`` tells whether all
    that lies before the image, and all that lies after it, goes with it: reference images, but no text. Where the place
    of the image is not known at other sizes, ``beside`` tells it by how much ``longer`` the text is.
    """

    def __init__(
        self,
        site: str,
        layout: KeyLayout,
        *,
        query_place: Place,
        key_place: Place | None,
        others: tuple[bool, bool] = (False, False),
        beside: BesideText | None = None,
    ) -> None:
        super().__init__()
        self.site = site
        self.layout = layout
        self.query_place = query_place
        self.key_place = key_place
        self.others = others
        self.beside = beside
        self.longer: Any = None  # than the text was when the image was located; None: nobody knows
        self.rows: Groups = (True,)
        self.alone = False
        self.shares = False

    def set_layout(self, layout: KeyLayout, halves: int) -> None:
        self.layout = layout

    def set_rows(self, rows: Groups) -> None:
        self.rows = rows

    @property
    def taken(self) -> Groups:
        """Which groups of the present call are guided."""
        return (True,) if self.alone else self.rows

    def split(self, tensor: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The groups of the batch, and those of the negative text, one for each guided group."""
        taken = self.taken
        parts = groups(tensor, (*taken, *(True,) * sum(taken)), self.site)
        return parts[: len(taken)], parts[len(taken) :]

    def image(self, tensor: Any, place: Place, tokens: int) -> tuple[int, int]:
        """The first token of the image, and how many it has with all that goes with it."""
        place, total = self.known(place), tensor.shape[-2]
        tokens = total if place.alone else tokens
        if isinstance(total, Length) and place.others is not None:
            raise SlothError(
                f"{self.site}: where the image lies among {total!r} tokens is not known, as the text and the negative "
                "text have different lengths: pad them to the same length"
            )
        return self._with_others(place.start(total, tokens), tokens, total)

    def known(self, place: Place) -> Place:
        """``place``, counted from the side of the text where that tells more."""
        if self.beside is None or self.longer is None or place.others is None:
            return place
        return self.beside.place._replace(offset=self.beside.place.offset + self.longer)

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
        beside: BesideText | None = None,
        border: str = "keep",
    ) -> None:
        super().__init__(site, layout, query_place=query_place, key_place=key_place, others=others, beside=beside)
        self.border = border

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not self.layout.guided or not any(self.rows):
            return query, key, value
        query = self._shared(query, self.query_place, self.layout.tokens)
        if self.key_place is None:
            return query, key, value
        key, value = (self._shared(each, self.key_place, self._keys_of_image()) for each in (key, value))
        return query, key, value

    def _keys_of_image(self) -> int:
        """How many there are, which is fewer where they are pooled."""
        return self.layout.gathered_tokens(self.border) if self.layout.pooled else self.layout.tokens

    def _shared(self, tensor: Any, place: Place, tokens: int) -> Any:
        if self.shares and (
            isinstance(tensor, Tensor) or (self.known(place).others is not None and _has_one_image(tensor, tokens))
        ):
            return tensor
        start, tokens = self.image(tensor, place, tokens)
        if self.shares:
            parts = [tensor[..., :start, :], tensor[..., start : start + tokens, :], tensor[..., start + tokens :, :]]
            image = parts[1].parts if isinstance(parts[1], Tokens) else [parts[1]]
            same = [isinstance(part, Tensor) for part in image]
            if all(same):
                return tensor
            if any(same):
                raise SlothError(
                    f"{self.site}: what was the image's among its tokens holds text as well: transform the model with "
                    "example_inputs like these"
                )
            parts[1] = positive_of(parts[1])
            kept = [part for part in parts if part.shape[-2] > 0]
            return kept[0] if len(kept) == 1 else torch.cat(kept, dim=-2)
        rows, negative = self.split(tensor)
        guided = [row for row, taken in zip(rows, self.taken, strict=True) if taken]
        images = [row.narrow(-2, start, tokens) for row in guided]
        return torch.cat([*rows, *(with_image(row, image, start) for row, image in zip(negative, images, strict=True))])


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
        beside: BesideText | None = None,
    ) -> None:
        super().__init__(site, layout, query_place=query_place, key_place=None, others=others, beside=beside)
        self.guidance = guidance
        self.folded_heads = folded_heads

    def forward(self, out: Any) -> Any:
        if not self.layout.guided or not any(self.rows):
            return out
        if self.shares:
            start, tokens = self._image_read(out)
            return self._guided(out, start, start + tokens)
        start, tokens = self.image(out, self.query_place, self.layout.tokens)
        rows, negative = self.split(out)
        found = list(rows)
        for index, row in zip(guided_groups(self.taken), negative, strict=True):
            image = rows[index].narrow(-2, start, tokens)
            if self.guidance is not None:
                image = guided_by(image, row.narrow(-2, start, tokens), self.guidance, self.folded_heads)
                found[index] = with_image(rows[index], image, start)
            found.append(with_image(row, image, start))
        return torch.cat(found)

    def image_in_branches(self, out: Any) -> list[tuple[Tensor, Tensor]]:
        """What the image has read in the one branch and in the other, for each guided group of rows, or for all."""
        if self.shares:
            start, tokens = self._image_read(out)
            both = out[..., start : start + tokens, :]
            return [(both.positive, both.negative)] if isinstance(both, Branched) else []
        start, tokens = self.image(out, self.query_place, self.layout.tokens)
        rows, negative = self.split(out)
        pairs = zip(guided_groups(self.taken), negative, strict=True)
        return [(rows[index].narrow(-2, start, tokens), row.narrow(-2, start, tokens)) for index, row in pairs]

    def _image_read(self, out: Any) -> tuple[int, int]:
        """First token and number of the image's. Where its place is not known with texts of another length, it is what
        was read by queries that both branches share, with reference images and all."""
        if self.known(self.query_place).others is None or not any(self.others):
            return self.image(out, self.query_place, self.layout.tokens)
        sizes = out.sizes if isinstance(out, Tokens) else []
        read = [isinstance(part, Read) for part in out.parts] if isinstance(out, Tokens) else []
        if sorted(read, reverse=self.others[0]) != read or all(read) or not any(read):
            return self.image(out, self.query_place, self.layout.tokens)
        text = sum(size for size, image in zip(sizes, read, strict=True) if not image)
        return (0 if self.others[0] else text), sum(sizes) - text

    def _guided(self, out: Any, start: int, stop: int) -> Any:
        if not isinstance(out, Branched):
            return out
        both = out[..., start:stop, :]
        if not isinstance(both, Branched):
            return out
        image = both.positive
        if self.guidance is not None:
            pairs = zip(*(groups(each, self.taken, self.site) for each in (image, both.negative)), strict=True)
            found = [
                guided_by(positive, negative, self.guidance, self.folded_heads) if taken else positive
                for (positive, negative), taken in zip(pairs, self.taken, strict=True)
            ]
            image = found[0] if len(found) == 1 else torch.cat(found)
        parts = [out[..., :start, :], image, out[..., stop:, :]]
        kept = [part for part in parts if part.shape[-2] > 0]
        return image if len(kept) == 1 else torch.cat(kept, dim=-2)

    def extra_repr(self) -> str:
        return str(self.guidance)


def _has_one_image(sequence: Any, tokens: int) -> bool:
    """Whether there are as many ``tokens`` as the image has that are the same in both branches: then they are those of
    the image, with others that go with it."""
    if not isinstance(sequence, Tokens):
        return False
    return sum(part.shape[sequence.axis] for part in sequence.parts if isinstance(part, Tensor)) >= tokens
