"""ToDo, HyperTile and Token Merging: their arithmetic, by trying out and against the sizes that were published."""

import math
from typing import Any

import pytest

from sloth_fx.errors import SlothError
from sloth_fx.spec import HyperTile, TokenDownsample, TokenMerging


def test_defaults() -> None:
    assert TokenDownsample() == TokenDownsample(factors=(2,), where=None)
    assert HyperTile() == HyperTile(tile_size=256, swap_size=2, max_depth=0, scale_depth=True, seed=0, where=None)
    assert TokenMerging() == TokenMerging(ratio=0.5, cell=(2, 2), max_depth=0, tokens="all", seed=0, where=None)


def test_lists_become_tuples() -> None:
    assert TokenDownsample(factors=[3, 1]).factors == (3, 1)  # type: ignore[arg-type]
    assert hash(TokenMerging(cell=[3, 2])) == hash(TokenMerging(cell=(3, 2)))  # type: ignore[arg-type]


def test_factor_of_a_level() -> None:
    spec = TokenDownsample(factors=(3, 1, 2))
    assert [spec.factor(level) for level in range(5)] == [3, 1, 2, 1, 1]


@pytest.mark.parametrize(
    ("pixels", "factor"),
    [(256, 1), (512, 1), (1024, 2), (1536, 3), (2048, 4), ((2048, 512), 2), ((1536, 1024), 2), (65536, 64)],
)
def test_factor_at_a_resolution(pixels: Any, factor: int) -> None:
    spec = TokenDownsample.at_resolution(pixels, where="in")
    assert spec == TokenDownsample(factors=(factor,), where="in")


@pytest.mark.parametrize("times", [1, 2, 3, 5, 16])
def test_about_4096_keys_are_left_at_any_resolution(times: int) -> None:
    for edges in ((512 * times, 512 * times), (256 * times, 1024 * times)):
        factor = TokenDownsample.at_resolution(edges).factor(0)
        assert math.prod(len(range(0, edge // 8, factor)) for edge in edges) == pytest.approx(4096, rel=0.05)


def test_resolution_of_a_model_that_attends_later() -> None:
    assert TokenDownsample.at_resolution(2048, pixels_per_token=16).factors == (2,)
    assert TokenDownsample.at_resolution(1024, pixels_per_token=16).factors == (1,)
    assert TokenDownsample.at_resolution(1500, pixels_per_token=10).factors == (2,)


@pytest.mark.parametrize("bad", [0, -8, 1024.0, "1024", True, None, (1024, 0), (1024,), 2**20])
def test_a_resolution_that_is_none_is_refused(bad: Any) -> None:
    with pytest.raises(SlothError, match=r"pixels=.* a whole number from 1 to 65536"):
        TokenDownsample.at_resolution(bad)
    with pytest.raises(SlothError, match="pixels_per_token=0 "):
        TokenDownsample.at_resolution(1024, pixels_per_token=0)


@pytest.mark.parametrize("kind", [HyperTile, TokenMerging])
@pytest.mark.parametrize("max_depth", [0, 1, 3])
def test_max_depth_counts_from_the_shallowest_level(kind: Any, max_depth: int) -> None:
    spec = kind(max_depth=max_depth)
    acts = spec.tiles if kind is HyperTile else spec.merges
    assert [level for level in range(6) if acts(level)] == list(range(max_depth + 1))


@pytest.mark.parametrize("level", [-1, 0.0, True, None])
def test_a_level_that_is_none_is_refused(level: Any) -> None:
    calls = (
        TokenDownsample().factor,
        HyperTile().tiles,
        lambda each: HyperTile().choices(64, each),
        TokenMerging().merges,
    )
    for call in calls:
        with pytest.raises(SlothError, match="level="):
            call(level)


@pytest.mark.parametrize("scale_depth", [True, False])
@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("swap_size", [1, 2, 5])
@pytest.mark.parametrize("tile_size", [8, 32, 100, 256, 384])
def test_choices_are_the_largest_numbers_of_tiles_that_are_large_enough(
    tile_size: int, swap_size: int, level: int, scale_depth: bool
) -> None:
    """By trying every number of tiles, for sizes that tiles divide and sizes that they do not."""
    spec = HyperTile(tile_size=tile_size, swap_size=swap_size, scale_depth=scale_depth)
    least = max(tile_size, 32) // 8 * (2**level if scale_depth else 1)
    for length in (*range(1, 140), 256, 257):
        tilings: dict[int, int] = {}  # size of a tile by the number of tiles that there really are
        for tiles in range(1, length + 1):
            size = math.ceil(length / tiles)
            if size >= least or tiles == 1:
                tilings[math.ceil(length / size)] = size
        expected = [tilings[tiles] for tiles in sorted(tilings, reverse=True)][:swap_size]
        assert spec.choices(length, level) == expected


@pytest.mark.parametrize("length", [32, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("level", [0, 1])
def test_the_smallest_tile_is_the_reference_s_where_it_divides_the_grid(length: int, level: int) -> None:
    """The first divisor of the axis from the smallest edge on, as HyperTile's own code has it."""
    least = 32 * 2**level
    divisors = [size for size in range(least, length + 1) if length % size == 0] or [length]
    spec = HyperTile(swap_size=1)
    (size,) = spec.choices(length, level)
    assert size == divisors[0] if divisors[0] == least else size <= divisors[0]


@pytest.mark.parametrize("length", [0, -1, 64.0, True, None])
def test_an_axis_that_is_none_is_refused(length: Any) -> None:
    with pytest.raises(SlothError, match="length="):
        HyperTile().choices(length, 0)


@pytest.mark.parametrize(
    ("ratio", "tokens", "sources", "expected"),
    [(0.5, 117, 90, 58), (0.9, 117, 90, 90), (0.0, 117, 90, 0), (1.0, 6, 4, 4), (0.3, 10, 7, 3), (0.5, 7, 0, 0)],
)
def test_merged(ratio: float, tokens: int, sources: int, expected: int) -> None:
    merged = TokenMerging(ratio=ratio).merged(tokens, sources)
    assert (merged, type(merged)) == (expected, int)


@pytest.mark.parametrize(("tokens", "sources", "named"), [(0, 0, "tokens"), (4, 5, "sources"), (4, -1, "sources")])
def test_merging_tokens_that_are_not_there_is_refused(tokens: int, sources: int, named: str) -> None:
    with pytest.raises(SlothError, match=f"{named}="):
        TokenMerging().merged(tokens, sources)
