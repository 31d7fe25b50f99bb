import numpy as np
import pytest

from sloth_fx.operators import KeyLayout, Pooling
from tests.operators import by_hand

LAYOUTS = [
    KeyLayout((7, 11)),
    KeyLayout((7, 11), window=(3, 2)),
    KeyLayout((13, 9), window=(2, 2), tile=(5, 5), samples=(4, 3), sample_window=(2, 2)),
    KeyLayout((13, 9), window=(2, 1), tile=(5, 5), pad=(1, 1), samples=(3, 2), sample_window=(2, 1)),
    KeyLayout((9, 11), window=(4, 4), tile=(4, 4), pad=(2, 0), samples=(6, 5), sample_window=(5, 7)),
    KeyLayout((13, 9), window=(1, 4), tile=(5, 5), pad=(2, 0), samples=(1, 7), sample_window=(1, 4), flat=True),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("border", ["keep", "crop"])
def test_counts_are_those_of_the_sets(layout, border):
    pooling, image = Pooling(border=border), np.zeros((*layout.grid, 1))
    stride, window = layout.samples, layout.window
    far = (
        len(by_hand.samples(image, *by_hand.everything(layout), layout.sample_window, stride, pooling, 0, layout.flat))
        if stride
        else 0
    )
    tiles = by_hand.tiles(layout)
    near = [len(by_hand.samples(image, *tile, window, window, pooling, 0, layout.flat)) for tile in tiles]
    assert layout.sample_tokens(border) == far
    assert layout.gathered_tokens(border) == sum(near) + far
    assert layout.kv_tokens(border) == max(near) + far
    assert layout.pairs(border) == sum(len(r) * len(c) * (n + far) for (r, c), n in zip(tiles, near, strict=True))


def test_neutral_means_all_tokens_once():
    plain = KeyLayout((7, 11))
    assert plain.neutral
    assert plain.tokens == plain.kv_tokens() == plain.gathered_tokens() == 77
    assert plain.pairs() == 77**2
    assert not any(layout.neutral for layout in LAYOUTS[1:])


def test_a_layout_is_a_dictionary_key():
    assert {KeyLayout((7, 11)): 1}[KeyLayout((7, 11), (1, 1))] == 1
