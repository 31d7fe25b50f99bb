"""Attention whose queries see their own tile, and a thin sample of everything else.

Source: Near-sighted Tile and Near-sighted Attention nodes, release of 2023-12-16, and the author's later node for
`concat_local` and `concat_global`. Unlike the nodes, no query attends to padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sloth_fx.errors import SlothError
from sloth_fx.operators.layout import KeyLayout, described
from sloth_fx.operators.lse import attention_with_lse, merge_attention
from sloth_fx.operators.masks import tile_mask
from sloth_fx.operators.sequence import image_start, join_image, split_image
from sloth_fx.operators.tiling import cut, paste
from sloth_fx.site import Place

Attend = Callable[..., Tensor]
"""(B', H, n, D) x (B', H, m, D) x (B', H, m, Dv) -> (B', H, n, Dv): called with query, key and value, a mask as the
fourth where there is one, and `scale=` where the caller passes one."""

_ALONE = Place()


def near_sighted_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: KeyLayout,
    *,
    gathered: bool,
    border: str | None = None,
    mask: Tensor | None = None,
    query_place: Place = _ALONE,
    key_place: Place = _ALONE,
    attend: Attend = F.scaled_dot_product_attention,
    within: Callable[[Attend, tuple[int, int]], Attend] | None = None,
    merge: str = "concat",
    scale: float | None = None,
    halves: int = 1,
    concat_local: bool = False,
    concat_global: bool = False,
) -> Tensor:
    """Attention in tiles: softmax(scale * q [K_tile ; K_samples]^T) [V_tile ; V_samples] for each q of a tile.

    In a joint sequence only the image is cut into tiles. Every tile sees the keys of the other tokens too, and their
    queries see all keys (but not the samples: those are keys that they see already).

    Args:
        query: (B, H, N, D), the `layout.tokens` of the whole grid and the others around them.
        key: (B, H, M, D), see `gathered`.
        value: (B, H, M, Dv).
        layout: tiles and global samples.
        gathered: True: the image's keys and values come from `reduce_tokens` with this layout, so they are
            `layout.gathered_tokens(...)` of either border. False: they are whole, `layout.tokens`, and are cut and
            sampled here; the window is then (1, 1).
        border: which one they were gathered with. None tells it from their number, and where others lie around them it
            is "keep".
        mask: bool (False hides) or additive, broadcastable to (B, H, N, M).
        query_place: where the image tokens lie among the queries.
        key_place: where they lie among the keys, which may hold others than the queries do.
        attend: the attention of one group of tiles, which become its batch.
        within: makes of `attend` the attention of the tiles of (rows, columns).
        merge: "concat" attends once to both sets of keys. "lse" attends to each and merges the two by their
            log-sum-exp, without a copy of the samples for each tile; it ignores `attend`, takes no mask, and has no
            gradient.
        scale: D ** -0.5 when None.
        halves: parts of the batch (CFG), outermost in it, whose images never meet.
        concat_local: the tiles at one place of all images of a half see each other's own keys.
        concat_global: all images of a half see each other's global samples.

    Returns:
        (B, H, N, Dv), as a view of (B, N, H, Dv).

    Raises:
        SlothError: B is not a multiple of `halves`, the number of tokens does not fit the layout, `merge` does not
            exist, "lse" meets a tensor that needs a gradient or a mask, or images that see each other have a mask.

    Source: Near-sighted Attention node, release of 2023-12-16, without its padding.
    """
    batch = query.shape[0]
    _check(query, key, value, mask, merge, halves, concat_local or concat_global)
    border = _border(key, value, layout, gathered, border, key_place)
    if query_place.alone and query.shape[2] != layout.tokens:
        raise SlothError(f"{query.shape[2]} queries do not fit {described(layout)}")
    queries = _parts(query.transpose(1, 2), layout._replace(samples=None), query_place, None)
    sets = [_parts(x.transpose(1, 2), layout, key_place, border) for x in (key, value)]
    masks = _Masks(mask, batch, layout, (query.shape[2], query_place), (key.shape[2], key_place), border)

    local = [[_meet(x, halves) if concat_local else x for x in each.tiles] for each in sets]
    samples = [_meet(x, halves) if concat_global else x for x in _present([each.samples for each in sets])]
    others = _present([each.others for each in sets])
    # Where the images of a half see the same keys, their queries share a row of the batch: no copies of the keys.
    together = concat_local and not others and (concat_global or not samples)
    far = _beside([[_repeat(x, halves if together else batch) for x in each] for each in (samples, others)])
    out = []
    for group, (q, *own) in enumerate(zip(queries.tiles, *local, strict=True)):
        rows, columns = layout.groups()[group]
        here = attend if within is None else within(attend, (rows.size, columns.size))
        q = _meet(q, halves) if together else q
        own = [_repeat(x, q.shape[0]) for x in own]
        if far and merge == "lse":
            result = _attend_merged(q, own, far, scale)
        else:
            result = _attend_joined(q, own, far, here, scale, masks.of_tiles(group))
        out.append(_part(result, batch) if together else result)
    image = paste(out, *layout.runs(), layout.frames).flatten(1, 3)
    if queries.others is None:
        return image.transpose(1, 2)
    everything = [_without_samples(x, layout, key_place, border, 2).transpose(1, 2).unsqueeze(1) for x in (key, value)]
    rest = _attend_joined(queries.others, everything, [], attend, scale, masks.of_others())[:, 0]
    before = image_start(query_place, query.shape[2], layout.tokens)
    return join_image(rest[:, :before], image, rest[:, before:], 1).transpose(1, 2)


# Below, tokens are (B, T, n, H, D): T tiles of n tokens, heads beside channels so that a token is one run of memory.


class _Parts(NamedTuple):
    """A sequence taken apart: the tiles of each group, samples of the whole grid and other tokens (both T = 1)."""

    tiles: list[Tensor]
    samples: Tensor | None
    others: Tensor | None


def _parts(line: Tensor, layout: KeyLayout, place: Place, border: str | None) -> _Parts:
    """Takes (B, n, H, D) apart. Its image is whole, or with a border gathered by `reduce_tokens`."""
    tokens = layout.tokens if border is None else layout.gathered_tokens(border)
    before, image, after = split_image(line, place, tokens, 1)
    tiles, samples = _whole(image, layout) if border is None else _gathered(image, layout, border)
    others = [x for x in (before, after) if x.shape[1] > 0]
    joined = torch.cat(others, 1) if len(others) > 1 else others[0] if others else None
    return _Parts(tiles, samples, joined.unsqueeze(1) if joined is not None else None)


def _gathered(line: Tensor, layout: KeyLayout, border: str) -> tuple[list[Tensor], Tensor | None]:
    groups = layout.groups()
    tiles = [band.tiles * run.tiles for band, run in groups]
    kept = [layout.local_tokens(group, border) for group in groups]
    sizes = [t * m for t, m in zip(tiles, kept, strict=True)]
    *local, samples = torch.split(line, [*sizes, layout.sample_tokens(border)], 1)
    cut_up = [torch.unflatten(x, 1, (t, m)) for x, t, m in zip(local, tiles, kept, strict=True)]
    return cut_up, samples.unsqueeze(1) if layout.samples else None


def _whole(line: Tensor, layout: KeyLayout) -> tuple[list[Tensor], Tensor | None]:
    video = torch.unflatten(line, 1, (layout.frames, *layout.grid))
    local = [cut(video, *group) for group in layout.groups()]
    if layout.samples is None:
        return local, None
    rows, columns = layout.samples
    samples = video.flatten(2, 3)[:, :, ::columns] if layout.flat else video[:, :, ::rows, ::columns].flatten(2, 3)
    return local, samples.flatten(1, 2).unsqueeze(1)


def _without_samples(tokens: Tensor, layout: KeyLayout, place: Place, border: str | None, dim: int) -> Tensor:
    if border is None or layout.samples is None:
        return tokens
    before, image, after = split_image(tokens, place, layout.gathered_tokens(border), dim)
    own = image.narrow(dim, 0, image.shape[dim] - layout.sample_tokens(border))
    return join_image(before, own, after, dim)


def _present(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    return [x for x in tensors if x is not None]


class _Masks:
    """What a mask (B, H, N, M) leaves for each group of tiles, and for the queries of other tokens."""

    def __init__(
        self,
        mask: Tensor | None,
        batch: int,
        layout: KeyLayout,
        queries: tuple[int, Place],
        keys: tuple[int, Place],
        border: str | None,
    ) -> None:
        self.mask, self.batch = mask, batch
        if mask is None:
            return
        # The positions of tokens go the way of the tokens themselves.
        self.rows = _parts(_positions(queries[0], mask), layout._replace(samples=None), queries[1], None)
        self.columns = _parts(_positions(keys[0], mask), layout, keys[1], border)
        self.all_columns = _without_samples(_positions(keys[0], mask), layout, keys[1], border, 1).flatten(1)

    def of_tiles(self, group: int) -> Tensor | None:
        if self.mask is None:
            return None
        rows, own = self.rows.tiles[group], self.columns.tiles[group]
        far = [x.expand(-1, own.shape[1], -1, -1, -1) for x in _present(self.columns[1:])]
        columns = torch.cat([own, *far], 2) if far else own
        return tile_mask(self.mask, self.batch, rows.flatten(2)[0], columns.flatten(2)[0])

    def of_others(self) -> Tensor | None:
        if self.mask is None or self.rows.others is None:
            return None
        return tile_mask(self.mask, self.batch, self.rows.others.flatten(2)[0], self.all_columns)


def _positions(tokens: int, mask: Tensor) -> Tensor:
    return torch.arange(tokens, device=mask.device).view(1, -1, 1, 1)


def _beside(sets: list[list[Tensor]]) -> list[Tensor]:
    """Keys and values of several sets -> those of all of them."""
    filled = [each for each in sets if each]
    return [torch.cat(parts, 2) if len(parts) > 1 else parts[0] for parts in zip(*filled, strict=True)]


def _check(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, merge: str, halves: int, meeting: bool
) -> None:
    if halves < 1 or query.shape[0] % halves:
        raise SlothError(f"a batch of {query.shape[0]} cannot be divided into {halves} halves")
    if merge not in ("concat", "lse"):
        raise SlothError(f"merge is 'concat' or 'lse', not {merge!r}")
    if merge == "lse" and torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        raise SlothError("merge='lse' has no gradient; use merge='concat', or torch.no_grad()")
    if merge == "lse" and mask is not None:
        raise SlothError("merge='lse' takes no mask; use merge='concat'")
    if meeting and mask is not None:
        raise SlothError("concat_local and concat_global take no mask: it says nothing about other images' keys")


def _border(
    key: Tensor, value: Tensor, layout: KeyLayout, gathered: bool, border: str | None, place: Place
) -> str | None:
    """Checks the numbers of tokens, and tells which border the keys were pooled with; None where they are whole."""
    if not gathered:
        if layout.pooled:
            raise SlothError(f"a window of {layout.window} needs gathered keys; whole keys are only cut and sampled")
        fits: dict[int, str | None] = {layout.tokens: None}
    else:
        # "crop" drops whole windows, so the two totals are equal only where every single count is.
        fits = {layout.gathered_tokens(b): b for b in ((border,) if border else ("crop", "keep"))}
    for name, tokens in (("keys", key.shape[2]), ("values", value.shape[2])):
        if place.alone and tokens not in fits:
            raise SlothError(f"{tokens} {name} do not fit {layout}, which takes {' or '.join(map(str, fits))}")
    if place.alone:
        return fits[key.shape[2]]
    return border or fits[max(fits)] if gathered else None


def _meet(tokens: Tensor, halves: int) -> Tensor:
    """(halves * images, T, n, H, D) -> (halves, T, images * n, H, D)."""
    return torch.unflatten(tokens, 0, (halves, -1)).transpose(1, 2).flatten(2, 3)


def _part(tokens: Tensor, batch: int) -> Tensor:
    """The inverse of `_meet`."""
    return torch.unflatten(tokens, 2, (batch // tokens.shape[0], -1)).transpose(1, 2).flatten(0, 1)


def _repeat(tokens: Tensor, batch: int) -> Tensor:
    return tokens if tokens.shape[0] == batch else tokens.repeat_interleave(batch // tokens.shape[0], 0)


def _rows(tokens: Tensor) -> Tensor:
    """(B, T, n, H, D) -> (B * T, H, n, D)."""
    return tokens.flatten(0, 1).transpose(1, 2)


def _attend_joined(
    q: Tensor, own: list[Tensor], far: list[Tensor], attend: Attend, scale: float | None, mask: Tensor | None
) -> Tensor:
    if far:
        tiles = q.shape[1]
        own = [torch.cat([x, y.expand(-1, tiles, -1, -1, -1)], 2) for x, y in zip(own, far, strict=True)]
    options = {} if scale is None else {"scale": scale}
    masks = () if mask is None else (mask,)
    out = attend(_rows(q), *map(_rows, own), *masks, **options)
    return torch.unflatten(out.transpose(1, 2), 0, q.shape[:2])


def _attend_merged(q: Tensor, own: list[Tensor], far: list[Tensor], scale: float | None) -> Tensor:
    near, near_lse = attention_with_lse(_rows(q), _rows(own[0]), _rows(own[1]), scale)
    # All tiles see the same samples: one attention for all of them, and no copy of the samples for each.
    everyone = _rows(q.flatten(1, 2).unsqueeze(1))
    wide = attention_with_lse(everyone, _rows(far[0]), _rows(far[1]), scale)
    far_out, far_lse = (torch.unflatten(x, 2, (q.shape[1], -1)).transpose(1, 2).flatten(0, 1) for x in wide)
    out = merge_attention(near, near_lse, far_out, far_lse)
    return torch.unflatten(out.transpose(1, 2), 0, q.shape[:2])
