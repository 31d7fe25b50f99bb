"""Attention whose queries see their own tile, and a thin sample of everything else.

Source: Near-sighted Tile and Near-sighted Attention nodes, release of 2023-12-16, and the author's later node for
`concat_local` and `concat_global`. Unlike the nodes, no query attends to padding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sloth_fx.errors import SlothError
from sloth_fx.operators.layout import KeyLayout
from sloth_fx.operators.lse import attention_with_lse, merge_attention
from sloth_fx.operators.tiling import cut, paste

Attend = Callable[..., Tensor]
"""(B', H, n, D) x (B', H, m, D) x (B', H, m, Dv) -> (B', H, n, Dv), and `scale=` where the caller passes one."""


def near_sighted_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: KeyLayout,
    *,
    gathered: bool,
    attend: Attend = F.scaled_dot_product_attention,
    merge: str = "concat",
    scale: float | None = None,
    halves: int = 1,
    concat_local: bool = False,
    concat_global: bool = False,
) -> Tensor:
    """Attention in tiles: softmax(scale * q [K_tile ; K_samples]^T) [V_tile ; V_samples] for each q of a tile.

    Args:
        query: (B, H, N, D), the whole grid, N = `layout.tokens`.
        key: (B, H, M, D), see `gathered`.
        value: (B, H, M, Dv).
        layout: tiles and global samples.
        gathered: True: key and value come from `reduce_tokens` with this layout, M = `layout.gathered_tokens(...)` of
            either border. False: they are whole, M = N, and are cut and sampled here; the window is then (1, 1).
        attend: the attention of one group of tiles, which become its batch.
        merge: "concat" attends once to both sets of keys. "lse" attends to each and merges the two by their
            log-sum-exp, without a copy of the samples for each tile; it ignores `attend`, and has no gradient.
        scale: D ** -0.5 when None.
        halves: parts of the batch (CFG), outermost in it, whose images never meet.
        concat_local: the tiles at one place of all images of a half see each other's own keys.
        concat_global: all images of a half see each other's global samples.

    Returns:
        (B, H, N, Dv), as a view of (B, N, H, Dv).

    Raises:
        SlothError: B is not a multiple of `halves`, the number of tokens does not fit the layout, `merge` does not
            exist, or "lse" meets a tensor that needs a gradient.

    Source: Near-sighted Attention node, release of 2023-12-16, without its padding.
    """
    batch = query.shape[0]
    if halves < 1 or batch % halves:
        raise SlothError(f"a batch of {batch} cannot be divided into {halves} halves")
    if merge not in ("concat", "lse"):
        raise SlothError(f"merge is 'concat' or 'lse', not {merge!r}")
    if merge == "lse" and torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        raise SlothError("merge='lse' has no gradient; use merge='concat', or torch.no_grad()")
    border = _border(query, key, value, layout, gathered)

    rows, columns = layout.runs()
    grid = torch.unflatten(query.transpose(1, 2), 1, layout.grid)
    queries = [cut(grid, *group) for group in layout.groups()]
    sets = [_gathered(x, layout, border) if gathered else _whole(x, layout) for x in (key, value)]
    local = [[_meet(x, halves) if concat_local else x for x in tiles] for tiles, _ in sets]
    samples = [_meet(x, halves) if concat_global else x for _, x in sets if x is not None]
    # Where the images of a half see the same keys, their queries share a row of the batch: no copies of the keys.
    together = concat_local and (concat_global or not samples)
    far = [_repeat(x, halves if together else batch) for x in samples]
    out = []
    for q, *own in zip(queries, *local, strict=True):
        q = _meet(q, halves) if together else q
        own = [_repeat(x, q.shape[0]) for x in own]
        if far and merge == "lse":
            result = _attend_merged(q, own, far, scale)
        else:
            result = _attend_joined(q, own, far, attend, scale)
        out.append(_part(result, batch) if together else result)
    return paste(out, rows, columns).flatten(1, 2).transpose(1, 2)


# Below, tokens are (B, T, n, H, D): T tiles of n tokens, heads beside channels so that a token is one run of memory.
# Samples of the whole grid have T = 1.


def _border(query: Tensor, key: Tensor, value: Tensor, layout: KeyLayout, gathered: bool) -> str:
    """Checks the numbers of tokens, and tells from them which border the keys were pooled with."""
    if query.shape[2] != layout.tokens:
        raise SlothError(f"{query.shape[2]} queries do not fit a grid of {layout.grid}, which has {layout.tokens}")
    if not gathered and layout.window != (1, 1):
        raise SlothError(f"a window of {layout.window} needs gathered keys; whole keys are only cut and sampled")
    # "crop" drops whole windows, so the two totals are equal only where every single count is.
    fits = {layout.gathered_tokens(b): b for b in ("crop", "keep")} if gathered else {layout.tokens: "keep"}
    for name, tokens in (("keys", key.shape[2]), ("values", value.shape[2])):
        if tokens not in fits:
            raise SlothError(f"{tokens} {name} do not fit {layout}, which takes {' or '.join(map(str, fits))}")
    return fits[key.shape[2]]


def _gathered(tokens: Tensor, layout: KeyLayout, border: str) -> tuple[list[Tensor], Tensor | None]:
    groups = layout.groups()
    tiles = [band.tiles * run.tiles for band, run in groups]
    kept = [layout.local_tokens(group, border) for group in groups]
    sizes = [t * m for t, m in zip(tiles, kept, strict=True)]
    *local, samples = torch.split(tokens.transpose(1, 2), [*sizes, layout.sample_tokens(border)], 1)
    cut_up = [torch.unflatten(x, 1, (t, m)) for x, t, m in zip(local, tiles, kept, strict=True)]
    return cut_up, samples.unsqueeze(1) if layout.samples else None


def _whole(tokens: Tensor, layout: KeyLayout) -> tuple[list[Tensor], Tensor | None]:
    line = tokens.transpose(1, 2)
    grid = torch.unflatten(line, 1, layout.grid)
    local = [cut(grid, *group) for group in layout.groups()]
    if layout.samples is None:
        return local, None
    rows, columns = layout.samples
    samples = line[:, ::columns] if layout.flat else grid[:, ::rows, ::columns].flatten(1, 2)
    return local, samples.unsqueeze(1)


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


def _attend_joined(q: Tensor, own: list[Tensor], far: list[Tensor], attend: Attend, scale: float | None) -> Tensor:
    if far:
        tiles = q.shape[1]
        own = [torch.cat([x, y.expand(-1, tiles, -1, -1, -1)], 2) for x, y in zip(own, far, strict=True)]
    options = {} if scale is None else {"scale": scale}
    out = attend(_rows(q), *map(_rows, own), **options)
    return torch.unflatten(out.transpose(1, 2), 0, q.shape[:2])


def _attend_merged(q: Tensor, own: list[Tensor], far: list[Tensor], scale: float | None) -> Tensor:
    near, near_lse = attention_with_lse(_rows(q), _rows(own[0]), _rows(own[1]), scale)
    # All tiles see the same samples: one attention for all of them, and no copy of the samples for each.
    everyone = _rows(q.flatten(1, 2).unsqueeze(1))
    wide = attention_with_lse(everyone, _rows(far[0]), _rows(far[1]), scale)
    far_out, far_lse = (torch.unflatten(x, 2, (q.shape[1], -1)).transpose(1, 2).flatten(0, 1) for x in wide)
    out = merge_attention(near, near_lse, far_out, far_lse)
    return torch.unflatten(out.transpose(1, 2), 0, q.shape[:2])
