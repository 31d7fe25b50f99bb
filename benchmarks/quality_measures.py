"""What is measured of an image: whether it shows what its prompt says, and four properties of its pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from sloth_fx.cli.judge import Judge

Floats = NDArray[np.float64]

MEASURES = ("right", "extra", "contrast", "hardness", "detail", "noise")
"""The columns of :func:`measured`."""

LUMA = (0.299, 0.587, 0.114)
FLAT = 0.25  # of every picture of the lab at least so much is flat, whatever its texture


def measured(images: Sequence[Any], prompts: Sequence[str], judge: Judge) -> Floats:
    """(N, len(MEASURES)) of PIL images.

    right: 1 where the judge sees all that the prompt promises and nothing else, else 0.
    extra: how many labels the judge sees that were not promised.
    The others are those of :func:`properties`.
    """
    expected = [judge.promised(prompt) for prompt in prompts]
    promised = np.array([[label in each for label in judge.labels] for each in expected])
    shown = judge.scores(images) > 0.5
    right = (shown == promised).all(axis=1)
    extra = (shown & ~promised).sum(axis=1)
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return np.column_stack([right, extra, properties(pixels)])


def properties(pixels: NDArray[np.uint8]) -> Floats:
    """(N, 4) of images (N, H, W, 3), all in units of luminance, 0..255.

    contrast: standard deviation over the image.
    hardness: the 95 % quantile of the length of the gradient (central differences): how steep the edges are.
    detail: the mean of the absolute Laplacian (four neighbours).
    noise: the standard deviation within a window of 3 x 3 pixels, at its 25 % quantile over the image; that is within
        flat colour in every picture of the lab, so edges and textures do not count.
    """
    grey = pixels.astype(np.float64) @ LUMA
    inner = grey[:, 1:-1, 1:-1]
    up, down, left, right = grey[:, :-2, 1:-1], grey[:, 2:, 1:-1], grey[:, 1:-1, :-2], grey[:, 1:-1, 2:]
    slope = np.hypot(right - left, down - up) / 2
    laplacian = np.abs(up + down + left + right - 4 * inner)
    roughness = sliding_window_view(grey, (3, 3), axis=(1, 2)).std(axis=(-2, -1))
    return np.column_stack(
        [
            grey.std(axis=(1, 2)),
            np.quantile(slope, 0.95, axis=(1, 2)),
            laplacian.mean(axis=(1, 2)),
            np.quantile(roughness, FLAT, axis=(1, 2)),
        ]
    )
