"""Whether an image of the lab has the background that its prompt promises.

The judge is not asked for backgrounds. They are simple enough to be read from the pixels: every background there is, in
every phase, is compared with what is to be seen of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import product

import numpy as np
from numpy.typing import NDArray
from quality_store import evaluate  # noqa: F401  (makes the lab's files known)
from scenes import BACKGROUNDS, PLACES, SIZE, TEXTURES, Scene, draw

Floats = NDArray[np.float64]

REACH = 17  # pixels: no thing is farther than that, across or down, from the middle of its place
GREY = 128.0  # is taken off, so that sums of squares are small
_STEPS = tuple(step / 16 for step in range(16))  # of a phase: a pixel of stripes and checks, half a pixel of dots
_PHASES = {"plain": ((0.0, 0.0),), "striped": tuple(product(_STEPS, (0.0,)))}


def backgrounds(pixels: NDArray[np.uint8], captions: Sequence[str]) -> Floats:
    """(N, 2) of images (N, 64, 64, 3) and their full captions, of what nothing at the caption's places can hide.

    right: 1 where the nearest of all backgrounds has the colour and the texture of the caption, else 0.
    fault: the root mean square distance to the nearest background of that colour and texture, in levels of 0..255.
    """
    kinds, drawn = _all()
    seen = [_free(tuple(place for place in PLACES if place in caption)) for caption in captions]
    images = (pixels.astype(np.float32) - GREY) * np.stack(seen)[..., None]
    products = drawn @ images.reshape(len(images), -1).T
    found = []
    for image, free, product_, caption in zip(images, seen, products.T, captions, strict=True):
        distances = _squares(free.tobytes()) - 2 * product_ + (image**2).sum()
        asked = [kind == promised(caption) for kind in kinds]
        least = max(0.0, float(distances[asked].min()))
        found.append((asked[int(distances.argmin())], np.sqrt(least / (3 * free.sum()))))
    return np.array(found, np.float64).reshape(-1, 2)


def promised(caption: str) -> tuple[str, str]:
    """Colour and texture of the background in a full caption."""
    *_, texture, colour, _ = caption.split()
    return colour, texture if texture in TEXTURES else "plain"


@cache
def _all() -> tuple[list[tuple[str, str]], NDArray[np.float32]]:
    """Colour and texture of every background, and (K, 64 * 64 * 3) what it looks like, less GREY."""
    made = [
        (colour, texture, phase)
        for colour, texture in product(BACKGROUNDS, TEXTURES)
        for phase in _PHASES.get(texture, tuple(product(_STEPS, _STEPS)))
    ]
    drawn = np.stack([draw(Scene((), *each)).astype(np.float32).ravel() - GREY for each in made])
    return [(colour, texture) for colour, texture, _ in made], drawn


def _free(places: tuple[str, ...]) -> NDArray[np.bool_]:
    """(64, 64): what nothing at these places can hide."""
    y, x = np.mgrid[:SIZE, :SIZE]
    far = [np.maximum(abs(x - across), abs(y - down)) > REACH for across, down in (PLACES[each] for each in places)]
    return np.logical_and.reduce(far)


@cache
def _squares(free: bytes) -> NDArray[np.float32]:
    """(K,): the sum of squares of every background over the free pixels."""
    _, drawn = _all()
    inside = np.repeat(np.frombuffer(free, np.bool_), 3).astype(np.float32)
    return np.asarray(drawn**2 @ inside, np.float32)
