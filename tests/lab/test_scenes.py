"""Scenes are what their captions say, and a seed names them."""

import numpy as np
import pytest
import scenes
from scenes import COLOURS, LABELS, OPPOSITE, PLACES, Scene, Thing, draw, full_caption, random_caption, random_scene


def many(count=300, seed=3):
    random = np.random.default_rng(seed)
    return [random_scene(random) for _ in range(count)]


def thing(colour="red", shape="square", place="on the left", size="large", fill="filled", radius=10.0):
    return Thing(colour, shape, place, size, fill, PLACES[place], radius)


def painted(picture, colour):
    """Where a picture has nearly that colour."""
    return np.abs(picture.astype(int) - COLOURS[colour]).max(-1) < 12


def test_a_seed_names_a_series():
    assert many() == many()
    assert many() != many(seed=4)
    assert len(set(many())) == 300


def test_scenes_differ_in_everything():
    drawn = many()
    things = [each for scene in drawn for each in scene.things]
    for name, kinds in (("colour", COLOURS), ("shape", scenes.SHAPES), ("place", PLACES), ("fill", scenes.FILLS)):
        assert {getattr(each, name) for each in things} == set(kinds)
    assert {scene.background for scene in drawn} == set(scenes.BACKGROUNDS)
    assert {scene.texture for scene in drawn} == set(scenes.TEXTURES)
    assert {len(scene.things) for scene in drawn} == {1, 2}


def test_two_things_are_opposite_and_not_the_same():
    for scene in many():
        if len(scene.things) == 2:
            first, second = scene.things
            assert (first.place, second.place) in OPPOSITE or (second.place, first.place) in OPPOSITE
            assert (first.colour, first.shape) != (second.colour, second.shape)


def test_a_picture_shows_its_things_and_no_other_colour():
    for scene in many(60):
        picture = draw(scene)
        assert picture.shape == (64, 64, 3)
        assert picture.dtype == np.uint8
        for colour in COLOURS:
            shown = painted(picture, colour)
            here = [each for each in scene.things if each.colour == colour]
            assert (shown.sum() > 8) == bool(here), full_caption(scene)
            if len(here) == 1:
                rows, columns = np.nonzero(shown)
                middle = (columns.min() + columns.max()) / 2, (rows.min() + rows.max()) / 2
                assert np.abs(np.subtract(middle, here[0].centre)).max() < 4.0, full_caption(scene)


@pytest.mark.parametrize(("shape", "area"), [("circle", np.pi), ("square", 2.96), ("triangle", 1.3), ("cross", 2.26)])
def test_areas_of_shapes(shape, area):
    red = draw(Scene((thing(shape=shape),), "black", "plain", (0, 0)))[..., 0].astype(float)
    cover = (red - red.min()) / (red.max() - red.min())
    assert cover.sum() == pytest.approx(area * 100, rel=0.05)


def test_outlines_are_hollow():
    filled, outlined = (draw(Scene((thing(fill=fill),), "white", "plain", (0, 0))) for fill in scenes.FILLS)
    x, y = PLACES["on the left"]
    assert painted(filled, "red")[y, x]
    assert not painted(outlined, "red")[y, x]
    assert 0.2 < painted(outlined, "red").sum() / painted(filled, "red").sum() < 0.6


@pytest.mark.parametrize("texture", scenes.TEXTURES)
def test_textures(texture):
    picture = draw(Scene((thing(),), "grey", texture, (0.3, 0.7)))
    right = picture[:, 40:]
    shades = len(np.unique(right.reshape(-1, 3), axis=0))
    assert (shades == 1) == (texture == "plain")
    share = (right.max(-1) < 130).mean()
    assert share == 0 if texture == "plain" else 0.05 < share < 0.6


def test_captions():
    scene = Scene((thing(fill="outlined"), thing("cyan", "cross", "on the right", "small")), "grey", "striped", (0, 0))
    things = "a large outlined red square on the left and a small filled cyan cross on the right"
    assert full_caption(scene) == f"{things} on a striped grey background"
    assert scene.labels == ("red square on the left", "cyan cross on the right")
    assert set(scene.labels) <= set(LABELS)


def test_captions_say_nothing_wrong():
    random = np.random.default_rng(5)
    for scene in many():
        said = set(random_caption(scene, random).split())
        assert said <= set(full_caption(scene).split()) | {"a", "an"}
        assert {each.colour for each in scene.things} <= said
        words = scenes.random_fragment(scene, random).split()
        assert set(words) <= set(full_caption(scene).split()) | {"a", "an", "plain", "background"}


def test_articles():
    random = np.random.default_rng(6)
    for scene in many():
        caption = f" {random_caption(scene, random)}"
        assert " a outlined" not in caption
        assert " an " not in caption or " an outlined" in caption
