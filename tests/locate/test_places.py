"""Arrays of places against plain numpy on dense arrays: strides of 0 save memory and change nothing."""

import itertools
import math
import random

import numpy as np
import pytest

from sloth_fx.locate.places import NOWHERE, collapse, concatenate, narrow, pick, reshape, smallest, spread, varies

SHAPES = [(3, 5), (1, 5), (2, 3, 5), (2, 1, 7), (3, 2, 1, 5), (2, 3, 4, 5), (1, 1, 1), (6,)]
SEEDS = range(6)


def some_places(shape, seed):
    """Places that do not depend on some of the axes, and a dense copy of them."""
    draw = random.Random(f"{shape} {seed}")
    slim = [size if draw.random() < 0.6 else 1 for size in shape]
    places = spread(np.array([draw.randrange(50) for _ in range(math.prod(slim))]).reshape(slim), shape)
    return places, np.ascontiguousarray(places)


def factorisations(total, most=4):
    """All shapes of up to ``most`` axes with ``total`` elements."""
    if most == 1:
        return [(total,)]
    divisors = [size for size in range(1, total + 1) if total % size == 0]
    return [(total,), *((size, *rest) for size in divisors for rest in factorisations(total // size, most - 1))]


def test_narrow_keeps_what_differs():
    places = spread(np.arange(5).reshape(1, 5, 1), (2, 5, 3))
    assert narrow(places).shape == (1, 5, 1)
    assert narrow(places).tolist() == [[[0], [1], [2], [3], [4]]]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_reshape(shape, seed):
    places, dense = some_places(shape, seed)
    for new in dict.fromkeys(factorisations(math.prod(shape))):
        result = reshape(places, new)
        assert result.shape == new
        assert (result == dense.reshape(new)).all(), (shape, new)


def test_reshape_keeps_axes_that_do_not_differ_thin():
    """(B, H * D, N) -> (B, H, D, N): as many numbers as there are tokens."""
    tokens = spread(np.arange(35).reshape(1, 1, 35), (3, 8, 35))
    heads = reshape(tokens, (3, 2, 4, 35))
    assert heads.strides[:3] == (0, 0, 0)
    assert narrow(reshape(heads, (3, 8, 5, 7))).shape == (1, 1, 5, 7)
    assert reshape(heads, (3, 2, 1, 4, 5, 1, 7)).strides[3] == 0


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_concatenate(shape, seed):
    for axis in range(-len(shape), len(shape)):
        shapes = [tuple(3 + i if a == axis % len(shape) else n for a, n in enumerate(shape)) for i in range(3)]
        parts = [some_places(each, seed + i) for i, each in enumerate(shapes)]
        result = concatenate([places for places, _ in parts], axis)
        assert (result == np.concatenate([dense for _, dense in parts], axis)).all()


def test_concatenate_keeps_the_other_axes_thin():
    image = spread(np.arange(35).reshape(1, 35, 1), (3, 35, 8))
    text = spread(np.int64(NOWHERE).reshape(1, 1, 1), (3, 4, 8))
    assert concatenate([text, image], 1).strides[0] == concatenate([text, image], -2).strides[2] == 0


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_collapse_and_varies(shape, seed):
    places, dense = some_places(shape, seed)
    for axis in range(-len(shape), len(shape)):
        assert (collapse(places, axis) == dense.min(axis, keepdims=True)).all()
        assert varies(places, axis) == varies(dense, axis) == (dense != dense.take([0], axis)).any()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_smallest(shape, seed):
    """Of parts that broadcast to the shape, as operands of a sum do."""
    thin = tuple(1 if axis % 2 else size for axis, size in enumerate(shape))
    parts = [some_places(each, seed + i) for i, each in enumerate((shape, thin, shape[1:] or shape, shape))]
    expected = np.minimum.reduce([np.broadcast_to(dense, shape) for _, dense in parts])
    assert (smallest([places for places, _ in parts], shape) == expected).all()
    assert smallest([parts[0][0]], shape).shape == shape


def test_nowhere_gives_way_to_any_place():
    image = spread(np.arange(15).reshape(1, 15, 1), (2, 15, 4))
    assert (smallest([spread(np.array(NOWHERE), (2, 15, 4)), image], (2, 15, 4)) == image).all()


@pytest.mark.parametrize(("length", "size"), list(itertools.product([1, 5, 9, 13], [1, 2, 3, 5, 9, 26])))
def test_pick(length, size):
    """Evenly: element i is the one at i / size of the whole."""
    places = spread(np.arange(length).reshape(1, length, 1) * 7, (2, length, 3))
    picked = pick(places, 1, size)
    expected = [next(j for j in range(length) if (j + 1) * size > i * length) * 7 for i in range(size)]
    assert picked.shape[1] in ((1,) if length == 1 else (size,))
    assert spread(picked, (2, size, 3))[1, :, 2].tolist() == expected


def test_pick_along_an_axis_that_does_not_differ():
    places = spread(np.arange(5).reshape(1, 5), (3, 5))
    assert spread(pick(places, 0, 8), (8, 5)).tolist() == [[0, 1, 2, 3, 4]] * 8
