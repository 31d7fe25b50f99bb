"""The operator modules that reduce keys and values: parameter-free children of an owner, steered by a layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sloth_fx.branching import each_row
from sloth_fx.errors import SlothError
from sloth_fx.operators import KeyLayout, Pooling, causal_mask, join_image, reduce_mask, reduce_tokens, split_image
from sloth_fx.operators.masks import both_masks
from sloth_fx.operators.rotary import rotation_of_reduced
from sloth_fx.site import Place


class _Reduction(nn.Module):
    """What all parts share. ``place`` says where the image lies in a sequence with others; a sequence of no more than
    the image's tokens is the image alone."""

    def __init__(self, site: str, pooling: Pooling, layout: KeyLayout, place: Place) -> None:
        super().__init__()
        self.site = site
        self.pooling = pooling
        self.layout = layout
        self.place = place

    @property
    def acts(self) -> bool:
        """Whether anything is pooled; cutting tiles out is left to the tiled attention."""
        return self.layout.pooled

    def place_in(self, total: int) -> Place:
        """The place of the image in a sequence of ``total`` tokens. Raises :class:`SlothError` where it has none."""
        tokens = self.layout.tokens
        if total == tokens:
            return Place()
        start = self.place.start(total, tokens)
        if self.place.alone or start < 0 or start + tokens > total:
            rows, columns = self.layout.grid
            frames = f"{self.layout.frames} x " if self.layout.frames > 1 else ""
            raise SlothError(
                f"{self.site}: {total} tokens do not fit a grid of {frames}{rows} x {columns}, which this latent "
                "should give; give transform example_inputs of this size"
            )
        return self.place

    def reduced(self, tokens: Tensor, axis: int, pooling: Pooling) -> tuple[Tensor, Tensor]:
        """The tokens that lie along ``axis`` (1 or more), reduced for keys and for values; others stay."""
        line = tokens if axis == 1 else tokens.movedim(axis, 1)
        rest = line.shape[2:]
        before, image, after = split_image(line.flatten(2), self.place_in(line.shape[1]), self.layout.tokens, 1)

        def whole(part: Tensor) -> Tensor:
            joined = torch.unflatten(join_image(before, part, after, 1), 2, rest)
            return joined if axis == 1 else joined.movedim(1, axis)

        keys, values = reduce_tokens(image, self.layout, pooling)
        as_keys = whole(keys)
        return as_keys, as_keys if keys is values else whole(values)


class KeyValueReduction(_Reduction):
    """Reduces the tokens that become keys and values to those that ``layout`` leaves.

    Takes what both projections take (B, N, C), or keys or values (B, H, N, D) or (B*H, N, D); the tokens lie along
    ``axis``, by default the last but one. Returns what becomes of them as keys and as values; that is one tensor where
    both are reduced alike. ``site`` is named in errors.

    Its children are the parts that a graph may need besides: ``unrotated``, ``rotation`` and ``blend`` where the keys
    have a rotary embedding, ``picked`` where it is not recognised, ``mask`` and ``causal`` where keys are masked.
    """

    def __init__(self, site: str, pooling: Pooling, layout: KeyLayout, place: Place | None = None) -> None:
        place = place or Place()
        super().__init__(site, pooling, layout, place)
        picking = pooling._replace(k_blend=0.0, v_blend=0.0)
        self.unrotated = UnrotatedReduction(site, pooling, layout, place)
        self.rotation = RotationReduction(site, pooling, layout, place)
        self.blend = KeyBlend(site, pooling, layout, place)
        self.picked = PickedKeys(site, picking, layout, place)
        self.mask = MaskReduction(site, pooling, layout, place)
        self.picked_mask = MaskReduction(site, picking, layout, place)

    def set_layout(self, layout: KeyLayout, halves: int) -> None:
        for part in self.modules():
            part.layout = layout  # type: ignore[assignment]

    @each_row
    def forward(self, tokens: Tensor, axis: int = -2) -> tuple[Tensor, Tensor]:
        if not self.acts:
            return tokens, tokens
        return self.reduced(tokens, axis % tokens.ndim, self.pooling)

    def extra_repr(self) -> str:
        return f"{self.pooling}, {self.layout}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"  # its children say nothing more


class PickedKeys(_Reduction):
    """Keys, of which the first of each window stays: what is right whatever was done to them."""

    @each_row
    def forward(self, tokens: Tensor) -> Tensor:
        return self.reduced(tokens, tokens.ndim - 2, self.pooling)[0] if self.acts else tokens


class UnrotatedReduction(_Reduction):
    """As :class:`KeyValueReduction`, for keys that are rotated afterwards.

    Where keys are a blend, the picked tokens and the pooled ones follow each other in the place of the image: they are
    rotated each at a place of its own, and blended then (:class:`KeyBlend`).
    """

    @each_row
    def forward(self, tokens: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        pooling = self.pooling
        if not self.acts or pooling.k_blend in (0, 1):
            return self.reduced(tokens, axis, pooling) if self.acts else (tokens, tokens)
        one, pool = self.reduced(tokens, axis, pooling._replace(k_blend=0.0, v_blend=1.0))
        values = one if pooling.v_blend == 0 else pool if pooling.v_blend == 1 else one.lerp(pool, pooling.v_blend)
        kept = self.layout.gathered_tokens(pooling.border)
        place = self.place_in(tokens.shape[axis])
        before, picked, after = split_image(one, place, kept, axis)
        both = torch.cat([picked, split_image(pool, place, kept, axis)[1]], axis)
        return join_image(before, both, after, axis), values


class RotationReduction(_Reduction):
    """The factors of a rotation, for the keys that :class:`UnrotatedReduction` leaves."""

    @each_row
    def forward(self, *factors: Tensor, kind: str, axis: int) -> Sequence[Tensor]:
        if not self.acts:
            return factors
        place = self.place_in(factors[0].shape[axis])
        return rotation_of_reduced(factors, kind, self.layout, self.pooling, place, axis)


class KeyBlend(_Reduction):
    """(1 - k_blend) * picked + k_blend * pooled, of rotated keys (..., M, D)."""

    @each_row
    def forward(self, keys: Tensor) -> Tensor:
        if not self.acts or self.pooling.k_blend in (0, 1):
            return keys
        kept = self.layout.gathered_tokens(self.pooling.border)
        before, both, after = split_image(keys, self.place, 2 * kept, -2)
        one, pool = torch.split(both, kept, -2)
        return join_image(before, one.lerp(pool, self.pooling.k_blend), after, -2)


class MaskReduction(_Reduction):
    """The mask of the keys that are left, and whether the host still has to hide later keys by itself.

    With ``causal`` the order of the keys hides some, which a mask has to say once there are fewer. ``query``
    (..., N, D) and ``key`` (..., M, D), after their reduction, tell the numbers.
    """

    @each_row
    def forward(self, mask: Tensor | None, query: Tensor, key: Tensor, causal: bool) -> tuple[Tensor | None, bool]:
        if not self.acts:
            return mask, causal
        if causal:
            gone = self.layout.tokens - self.layout.gathered_tokens(self.pooling.border)
            mask = both_masks(mask, causal_mask(query.shape[-2], key.shape[-2] + gone, query.device))
        if mask is not None and mask.shape[-1] > 1:
            mask = reduce_mask(mask, self.layout, self.pooling, self.place_in(mask.shape[-1]))
        return mask, False
