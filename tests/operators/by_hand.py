"""The formulas of the operators once more: numpy, float64, one window and one query at a time, by membership."""

from itertools import groupby, product

import numpy as np

from sloth_fx.operators import Pooling


def windows(cells, window, stride, border):
    """The members of each window over a sequence of cells; the first member is its `one`."""
    found = []
    for first in range(0, len(cells), stride):
        members = [cell for index, cell in enumerate(cells) if first <= index < first + window]
        if border == "keep" or len(members) == min(window, len(cells)):
            found.append(members)
    return found


def samples(video, rows, columns, window, stride, pooling, blend, flat, frame_window=1):
    """Pooled tokens (n, C) of the region rows × columns of a video (F, h, w, C)."""
    if flat:
        boxes = windows([(r, c) for r in rows for c in columns], window[1], stride[1], pooling.border)
    else:
        down = windows(rows, window[0], stride[0], pooling.border)
        across = windows(columns, window[1], stride[1], pooling.border)
        boxes = [[(r, c) for r in rs for c in cs] for rs in down for cs in across]
    times = windows(list(range(len(video))), frame_window, frame_window, pooling.border)
    tokens = []
    for box in ([(f, r, c) for f in time for r, c in box] for time in times for box in boxes):
        members = np.stack([video[cell] for cell in box])
        pool = members.mean(0) if pooling.kind == "avg" else members.max(0)
        tokens.append((1 - blend) * video[box[0]] + blend * pool)
    return np.stack(tokens)


def axis_tiles(length, size, pad):
    """The real tokens of each tile along one axis of the padded grid."""
    count = -(-length // size)
    padded = [position - pad if 0 <= position - pad < length else None for position in range(count * size)]
    return [[t for t in padded[i * size : (i + 1) * size] if t is not None] for i in range(count)]


def tiles(layout):
    """(rows, columns) of each tile, in the order of `reduce_tokens`: by runs of equal tiles, row-major within."""
    sizes = layout.tile or layout.grid
    down, across = (axis_tiles(n, size, pad) for n, size, pad in zip(layout.grid, sizes, layout.pad, strict=True))
    bands = [list(run) for _, run in groupby(down, len)]
    strips = [list(run) for _, run in groupby(across, len)]
    return [(rows, columns) for band in bands for strip in strips for rows in band for columns in strip]


def everything(layout):
    return list(range(layout.grid[0])), list(range(layout.grid[1]))


def own_tokens(video, tile, layout, pooling, blend):
    return samples(video, *tile, layout.window, layout.window, pooling, blend, layout.flat, layout.frame_window)


def far_tokens(video, layout, pooling, blend):
    strides = layout.sample_window, layout.samples
    return samples(video, *everything(layout), *strides, pooling, blend, layout.flat, layout.frame_window)


def videos(tokens, layout):
    return tokens.reshape(len(tokens), layout.frames, *layout.grid, -1)


def reduce(tokens, layout, pooling, blend):
    """(B, N, C) -> (B, M, C) in the gathered order."""
    reduced = []
    for video in videos(tokens, layout):
        kept = [own_tokens(video, tile, layout, pooling, blend) for tile in tiles(layout)]
        if layout.samples:
            kept.append(far_tokens(video, layout, pooling, blend))
        reduced.append(np.concatenate(kept))
    return np.stack(reduced)


def times_seen(layout, queries, keys, gathered):
    """(N, M): how often each query of a joint sequence sees each key. `queries` and `keys` are the numbers of other
    tokens (before, after) the image's; `gathered` is the border that the keys were reduced with, or None."""
    n, t = layout.tokens, tiles(layout)
    tile_of = np.empty((layout.frames, *layout.grid), int)
    for i, (rows, columns) in enumerate(t):
        tile_of[:, np.array(rows)[:, None], columns] = i
    if gathered is None:
        whose, sampled = tile_of.flatten(), np.zeros((layout.frames, *layout.grid), int)
        if layout.samples and layout.flat:
            sampled.reshape(layout.frames, -1)[:, :: layout.samples[1]] = 1
        elif layout.samples:
            sampled[:, :: layout.samples[0], :: layout.samples[1]] = 1
        sampled = sampled.flatten()
    else:
        empty, pooling = np.zeros((layout.frames, *layout.grid, 1)), Pooling(border=gathered)
        whose = np.repeat(range(len(t)), [len(own_tokens(empty, tile, layout, pooling, 0)) for tile in t])
        far = len(far_tokens(empty, layout, pooling, 0)) if layout.samples else 0
        whose, sampled = np.append(whose, [-1] * far), np.repeat([0, 1], [len(whose), far])
    seen = np.ones((sum(queries) + n, sum(keys) + len(whose)), int)
    image = slice(keys[0], keys[0] + len(whose))
    seen[:, image] = whose >= 0
    seen[queries[0] : queries[0] + n, image] = (tile_of.flatten()[:, None] == whose) + sampled
    return seen


def dense_attention(query, key, value, seen, mask=0.0):
    """(B, H, N, D): every key weighs as often as it is seen; `mask` is added to the scores."""
    scores = query @ key.transpose(0, 1, 3, 2) / np.sqrt(query.shape[-1]) + mask
    weights = seen * np.exp(scores - scores.max(-1, keepdims=True))
    return weights @ value / weights.sum(-1, keepdims=True)


def attention(query, key, value):
    """(n, D), (m, D), (m, Dv) -> (n, Dv)."""
    scores = query @ key.T / np.sqrt(query.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights @ value / weights.sum(-1, keepdims=True)


def near_sighted(tokens, project, layout, pooling, halves=1, concat_local=False, concat_global=False):
    """(B, N, C) -> (B, N, Cv), one head: each query against the keys of its tile and the samples, all projected."""
    images = videos(tokens, layout)
    per_half = len(tokens) // halves
    out = np.full((*images.shape[:4], project["v"].shape[1]), np.nan)
    for b in range(len(tokens)):
        half = [i for i in range(len(tokens)) if i // per_half == b // per_half]
        for tile in tiles(layout):
            seen = {}
            for name, blend in (("k", pooling.k_blend), ("v", pooling.v_blend)):
                sets = [own_tokens(images[i], tile, layout, pooling, blend) for i in (half if concat_local else [b])]
                if layout.samples:
                    sets += [far_tokens(images[i], layout, pooling, blend) for i in (half if concat_global else [b])]
                seen[name] = np.concatenate(sets) @ project[name]
            for f, r, c in product(range(layout.frames), *tile):
                out[b, f, r, c] = attention(images[b, f, r, c][None] @ project["q"], seen["k"], seen["v"])[0]
    return out.reshape(len(tokens), layout.tokens, -1)
