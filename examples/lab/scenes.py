"""Scenes of the lab: one or two things on a background, drawn at 64x64, with captions from a small grammar.

    caption     thing ["and" thing] ["on" background]
    thing       "a" [size] [fill] colour shape [place]       a small outlined red circle on the left
    background  "a" [texture] colour "background"            a striped grey background

Everything is drawn from a :class:`numpy.random.Generator`, so that a seed names an endless series of scenes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

SIZE = 64  # pixels of an edge
COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (222, 44, 44),
    "green": (44, 168, 64),
    "blue": (48, 84, 224),
    "yellow": (240, 212, 48),
    "purple": (156, 56, 196),
    "cyan": (56, 204, 212),
}
BACKGROUNDS: Mapping[str, tuple[int, int, int]] = {
    "white": (236, 236, 232),
    "grey": (136, 136, 140),
    "black": (28, 28, 32),
    "brown": (128, 84, 52),
}
SHAPES = ("circle", "square", "triangle", "cross")
PLACES: Mapping[str, tuple[int, int]] = {  # middle of the thing: x, y
    "on the left": (16, 32),
    "on the right": (48, 32),
    "at the top": (32, 16),
    "at the bottom": (32, 48),
    "in the middle": (32, 32),
}
OPPOSITE = (("on the left", "on the right"), ("at the top", "at the bottom"))
RADII: Mapping[str, tuple[float, float]] = {"small": (6.0, 8.0), "large": (10.0, 13.0)}
FILLS = ("filled", "outlined")
TEXTURES = ("plain", "striped", "checkered", "dotted")
STROKE = 2.6  # pixels, of what is outlined

LABELS = tuple(" ".join(words) for words in product(COLOURS, SHAPES, PLACES))  # what the judge tells apart


@dataclass(frozen=True)
class Thing:
    """One object. ``centre`` and ``radius`` in pixels."""

    colour: str
    shape: str
    place: str
    size: str
    fill: str
    centre: tuple[float, float]
    radius: float

    @property
    def label(self) -> str:
        return f"{self.colour} {self.shape} {self.place}"


@dataclass(frozen=True)
class Scene:
    """One or two things before a background. ``phase`` (0..1) shifts the texture."""

    things: tuple[Thing, ...]
    background: str
    texture: str
    phase: tuple[float, float]

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(thing.label for thing in self.things)


def random_scene(random: Generator) -> Scene:
    """One thing at any of the five places, or two at opposite sides, which are never the same."""
    if random.random() < 0.4:
        things: tuple[Thing, ...] = (_thing(random, _choice(random, tuple(PLACES))),)
    else:
        places = OPPOSITE[random.integers(2)]
        things = tuple(_thing(random, place) for place in places)
        while things[0].label.split()[:2] == things[1].label.split()[:2]:
            things = (things[0], _thing(random, places[1]))
        if random.random() < 0.5:
            things = things[::-1]
    texture = "plain" if random.random() < 0.4 else _choice(random, TEXTURES[1:])
    return Scene(things, _choice(random, tuple(BACKGROUNDS)), texture, (random.random(), random.random()))


def full_caption(scene: Scene) -> str:
    """All that can be said of a scene."""
    things = " and ".join(_phrase([thing.size, thing.fill, thing.label]) for thing in scene.things)
    texture = "" if scene.texture == "plain" else f"{scene.texture} "
    return f"{things} on a {texture}{scene.background} background"


def random_caption(scene: Scene, random: Generator) -> str:
    """What somebody might say of a scene. Colours and shapes are always said, and places nearly always."""
    places = random.random() < 0.95
    things = []
    for thing in scene.things:
        words = [thing.size if random.random() < 0.6 else "", thing.fill if random.random() < 0.6 else ""]
        things.append(_phrase([*words, thing.colour, thing.shape, thing.place if places else ""]))
    caption = " and ".join(things)
    if random.random() < 0.7:
        texture = scene.texture if scene.texture != "plain" and random.random() < 0.8 else ""
        caption += " on " + _phrase([texture, scene.background, "background"])
    return caption


def random_fragment(scene: Scene, random: Generator) -> str:
    """A part of what can be said, as people write negative prompts: a word or two about something that is there."""
    thing = scene.things[random.integers(len(scene.things))]
    said = [
        thing.colour,
        thing.shape,
        f"{thing.colour} {thing.shape}",
        _phrase([thing.colour, thing.shape]),
        thing.fill,
        f"{scene.background} background",
        scene.texture,
        thing.place,
    ]
    return said[random.integers(len(said))]


def random_text(scene: Scene, random: Generator) -> str:
    """What a denoiser is trained with: captions for the most part, but also fragments, and nothing at all."""
    chance = random.random()
    if chance < 0.1:
        return ""
    return random_fragment(scene, random) if chance < 0.2 else random_caption(scene, random)


def draw(scene: Scene) -> NDArray[np.uint8]:
    """The picture: (64, 64, 3), with soft edges."""
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    ground = np.asarray(BACKGROUNDS[scene.background], np.float32)
    other = ground * 0.72 if ground.mean() > 64 else ground + 36
    picture = ground + (other - ground) * _texture(scene, x, y)[..., None]
    for thing in scene.things:
        distance = _distance(thing.shape, x - thing.centre[0], y - thing.centre[1], thing.radius)
        if thing.fill == "outlined":
            distance = np.abs(distance + STROKE / 2) - STROKE / 2
        cover = np.clip(0.5 - distance, 0, 1)[..., None]
        picture = picture + (np.asarray(COLOURS[thing.colour], np.float32) - picture) * cover
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _phrase(words: list[str]) -> str:
    text = " ".join(filter(None, words))
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def _thing(random: Generator, place: str) -> Thing:
    size = _choice(random, tuple(RADII))
    x, y = PLACES[place] + random.uniform(-3, 3, 2)
    radius = random.uniform(*RADII[size])
    colour, shape, fill = (_choice(random, kinds) for kinds in (tuple(COLOURS), SHAPES, FILLS))
    return Thing(colour, shape, place, size, fill, (float(x), float(y)), float(radius))


def _choice(random: Generator, kinds: tuple[str, ...]) -> str:
    return kinds[random.integers(len(kinds))]


def _texture(scene: Scene, x: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[np.float32]:
    """Where the other shade is: 0..1 per pixel, in a pattern that repeats every 8 or 16 pixels."""
    across, down = scene.phase
    if scene.texture == "striped":
        return ((x + y + 16 * across) % 16 < 8).astype(np.float32)
    if scene.texture == "checkered":
        return (((x + 16 * across) % 16 < 8) ^ ((y + 16 * down) % 16 < 8)).astype(np.float32)
    if scene.texture == "dotted":
        u, v = (x + 8 * across) % 8 - 4, (y + 8 * down) % 8 - 4
        return np.clip(2.6 - np.hypot(u, v), 0, 1)
    return np.zeros_like(x)


def _distance(shape: str, x: NDArray[np.float32], y: NDArray[np.float32], radius: float) -> NDArray[np.float32]:
    """Pixels to the edge, negative inside; between corners it is exact."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.86 * radius
    if shape == "triangle":
        return np.maximum(0.866 * np.abs(x) - 0.5 * y - 0.5 * radius, y - 0.5 * radius)
    arm, u, v = 0.34 * radius, np.abs(x), np.abs(y)
    return np.minimum(np.maximum(u - radius, v - arm), np.maximum(v - radius, u - arm))
