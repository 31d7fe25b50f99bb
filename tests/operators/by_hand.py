"""The formulas of the operators once more: numpy, float64, one window and one query at a time, by membership."""

from itertools import groupby

import numpy as np


def windows(cells, window, stride, border):
    """The members of each window over a sequence of cells; the first member is its `one`."""
    found = []
    for first in range(0, len(cells), stride):
        members = [cell for index, cell in enumerate(cells) if first <= index < first + window]
        if border == "keep" or len(members) == min(window, len(cells)):
            found.append(members)
    return found


def samples(image, rows, columns, window, stride, pooling, blend, flat):
    """Pooled tokens (n, C) of the region rows × columns of an image (h, w, C)."""
    if flat:
        boxes = windows([(r, c) for r in rows for c in columns], window[1], stride[1], pooling.border)
    else:
        down = windows(rows, window[0], stride[0], pooling.border)
        across = windows(columns, window[1], stride[1], pooling.border)
        boxes = [[(r, c) for r in rs for c in cs] for rs in down for cs in across]
    tokens = []
    for box in boxes:
        members = np.stack([image[cell] for cell in box])
        pool = members.mean(0) if pooling.kind == "avg" else members.max(0)
        tokens.append((1 - blend) * image[box[0]] + blend * pool)
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


def reduce(tokens, layout, pooling, blend):
    """(B, N, C) -> (B, M, C) in the gathered order."""
    reduced = []
    for image in tokens.reshape(len(tokens), *layout.grid, -1):
        kept = [
            samples(image, *tile, layout.window, layout.window, pooling, blend, layout.flat) for tile in tiles(layout)
        ]
        if layout.samples:
            whole = everything(layout)
            kept.append(samples(image, *whole, layout.sample_window, layout.samples, pooling, blend, layout.flat))
        reduced.append(np.concatenate(kept))
    return np.stack(reduced)


def attention(query, key, value):
    """(n, D), (m, D), (m, Dv) -> (n, Dv)."""
    scores = query @ key.T / np.sqrt(query.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights @ value / weights.sum(-1, keepdims=True)


def near_sighted(tokens, project, layout, pooling, halves=1, concat_local=False, concat_global=False):
    """(B, N, C) -> (B, N, Cv), one head: each query against the keys of its tile and the samples, all projected."""
    images = tokens.reshape(len(tokens), *layout.grid, -1)
    per_half = len(tokens) // halves
    out = np.full((len(tokens), *layout.grid, project["v"].shape[1]), np.nan)
    for b in range(len(tokens)):
        half = [i for i in range(len(tokens)) if i // per_half == b // per_half]
        for rows, columns in tiles(layout):
            seen = {}
            for name, blend in (("k", pooling.k_blend), ("v", pooling.v_blend)):
                sets = [
                    samples(images[i], rows, columns, layout.window, layout.window, pooling, blend, layout.flat)
                    for i in (half if concat_local else [b])
                ]
                if layout.samples:
                    whole = everything(layout)
                    sets += [
                        samples(images[i], *whole, layout.sample_window, layout.samples, pooling, blend, layout.flat)
                        for i in (half if concat_global else [b])
                    ]
                seen[name] = np.concatenate(sets) @ project[name]
            for r in rows:
                for c in columns:
                    out[b, r, c] = attention(images[b, r, c][None] @ project["q"], seen["k"], seen["v"])[0]
    return out.reshape(len(tokens), layout.tokens, -1)
