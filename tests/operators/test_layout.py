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
    KeyLayout((5, 7), window=(2, 2), frames=3),
    KeyLayout((5, 7), window=(2, 1), tile=(3, 4), samples=(3, 2), sample_window=(2, 2), frames=5, frame_window=2),
    KeyLayout((1, 23), window=(1, 3), tile=(1, 8), pad=(0, 1), samples=(1, 5), frames=1),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("border", ["keep", "crop"])
def test_counts_are_those_of_the_sets(layout, border):
    pooling, video = Pooling(border=border), np.zeros((layout.frames, *layout.grid, 1))
    far = len(by_hand.far_tokens(video, layout, pooling, 0)) if layout.samples else 0
    tiles = by_hand.tiles(layout)
    near = [len(by_hand.own_tokens(video, tile, layout, pooling, 0)) for tile in tiles]
    assert layout.sample_tokens(border) == far
    assert layout.gathered_tokens(border) == sum(near) + far
    assert layout.kv_tokens(border) == max(near) + far
    queries = [layout.frames * len(rows) * len(columns) for rows, columns in tiles]
    assert layout.tokens == sum(queries)
    assert layout.pairs(border) == sum(q * (n + far) for q, n in zip(queries, near, strict=True))


def test_neutral_means_all_tokens_once():
    plain = KeyLayout((7, 11))
    assert plain.neutral
    assert plain.tokens == plain.kv_tokens() == plain.gathered_tokens() == 77
    assert plain.pairs() == 77**2
    assert not any(layout.neutral for layout in LAYOUTS[1:])
    assert KeyLayout((7, 11), frames=3).neutral
    assert not KeyLayout((7, 11), frames=3, frame_window=2).neutral


def test_a_layout_is_a_dictionary_key():
    assert {KeyLayout((7, 11)): 1}[KeyLayout((7, 11), (1, 1))] == 1
