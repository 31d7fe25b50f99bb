import doctest

import pytest
import torch

from sloth_fx.errors import SlothError
from sloth_fx.operators import Run, runs, tile_size, tiling
from sloth_fx.operators.tiling import cut, paste
from tests.operators import by_hand


@pytest.mark.parametrize(
    ("length", "tile", "size"), [(64, 32, 32), (61, 32, 31), (65, 32, 22), (5, 32, 5), (128, 27, 26)]
)
def test_tile_size_divides_evenly_and_never_exceeds_the_tile(length, tile, size):
    assert tile_size(length, tile) == size


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((64, 32), [Run(0, 32, 2)]),
        ((61, 31), [Run(0, 31, 1), Run(31, 30, 1)]),
        ((128, 26), [Run(0, 26, 4), Run(104, 24, 1)]),
        ((128, 26, 1), [Run(0, 25, 1), Run(25, 26, 3), Run(103, 25, 1)]),
        ((12, 5, 1), [Run(0, 4, 1), Run(4, 5, 1), Run(9, 3, 1)]),
        ((5, 5), [Run(0, 5, 1)]),
        ((5, 9, 3), [Run(0, 5, 1)]),
    ],
)
def test_runs_of_known_axes(arguments, expected):
    assert runs(*arguments) == expected


def test_runs_cover_every_axis_tile_by_tile():
    for length in range(1, 40):
        for tile in range(1, length + 2):
            size = tile_size(length, tile)
            for pad in range(-(-length // size) * size - length + 1):
                found = runs(length, size, pad)
                spelled = [
                    list(range(run.start + i * run.size, run.start + (i + 1) * run.size))
                    for run in found
                    for i in range(run.tiles)
                ]
                assert spelled == by_hand.axis_tiles(length, size, pad)
                assert len(found) <= (1 if length % size == 0 else 2 if pad == 0 else 3)


@pytest.mark.parametrize("arguments", [(61, 31, 2), (61, 31, -1), (64, 32, 1)])
def test_runs_refuse_more_padding_than_there_is(arguments):
    with pytest.raises(SlothError, match=f"{arguments[0]} tokens in 2 tiles"):
        runs(*arguments)


def test_tile_size_refuses_nothing():
    with pytest.raises(SlothError, match="tiles of 0"):
        tile_size(8, 0)


def test_cut_holds_the_positions_of_each_tile():
    grid = torch.arange(13 * 9).view(1, 1, 13, 9, 1)
    tiles = cut(grid, Run(1, 4, 3), Run(2, 3, 2))
    expected = [[r * 9 + c for r in range(i, i + 4) for c in range(j, j + 3)] for i in (1, 5, 9) for j in (2, 5)]
    assert tiles[0, :, :, 0].tolist() == expected


@pytest.mark.parametrize("pad", [(0, 0), (1, 0), (2, 3)])
def test_paste_undoes_cut(pad):
    grid = torch.randn(2, 1, 13, 9, 3, 2)
    rows, columns = runs(13, 5, pad[0]), runs(9, 6, pad[1])
    pieces = [cut(grid, band, run) for band in rows for run in columns]
    assert torch.equal(paste(pieces, rows, columns), grid)


def test_a_single_tile_is_a_view():
    grid = torch.randn(2, 1, 13, 9, 4)
    whole = [Run(0, 13, 1)], [Run(0, 9, 1)]
    assert paste([cut(grid, whole[0][0], whole[1][0])], *whole).data_ptr() == grid.data_ptr()


def test_examples_in_the_docstrings():
    result = doctest.testmod(tiling)
    assert result.attempted
    assert not result.failed
