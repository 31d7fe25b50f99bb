"""What specs come to at one site and moment: layouts worked out by hand."""

import math
from dataclasses import replace

import pytest

from sloth_fx import SlothError
from sloth_fx.operators import KeyLayout
from sloth_fx.plan import clocks, level_of
from sloth_fx.planner import make_plan
from sloth_fx.schedule import Constant, Moment, PeakDecay, StepDecay
from sloth_fx.site import AttentionSite, LatentSize
from sloth_fx.spec import (
    HyperTile,
    NearSightedAttention,
    NearSightedTile,
    Reduction,
    SlothfulAttention,
    TokenDownsample,
    TokenMerging,
)

LATENT = LatentSize(1, 23, 41)
VIDEO = LatentSize(7, 23, 41)
START, PEAK = Moment(0.0, 14.6), Moment(0.4, 4.0)  # PeakDecay() is exp(-0.64) and 1 there


def site(depth=1, *, frames=None, path=None, stage="in", kind="self"):
    grid = math.ceil(23 / depth), math.ceil(41 / depth)
    divisors = depth, depth
    if frames is not None:
        grid, divisors = (frames, *grid), (1, *divisors)
    return AttentionSite(
        path=path or f"attn.{depth}",
        call=0,
        owner="Attention",
        kind=kind,
        stage=stage,
        depth=depth,
        heads=2,
        head_dim=8,
        q_tokens=math.prod(grid),
        kv_tokens=math.prod(grid),
        grid=grid,
        divisors=divisors,
        text=None,
    )


def plans(specs, *sites):
    return make_plan(specs, sites or [site()]).sites


def layout(*specs, at=PEAK, latent=LATENT, where=None):
    """Of the first site."""
    return plans(specs, *([where] if where else []))[0].layout(at, latent)


# One spec


def test_pooling():
    """Stride 6: factors ceil(sqrt 6) = 3 and 6 / 3 = 2, the larger for the rows."""
    assert layout(SlothfulAttention()) == KeyLayout((23, 41), (3, 2))
    by_columns = SlothfulAttention(in_=Reduction(rate=6.0, long_axis="x"))
    assert layout(by_columns) == KeyLayout((23, 41), (2, 3))
    flat = SlothfulAttention(in_=Reduction(rate=6.0, mode="1d_avg"))
    assert layout(flat) == KeyLayout((23, 41), (1, 6), flat=True)


def test_pooling_follows_the_schedule_and_the_stage():
    """6 exp(-0.64) = 3.16: ceil(sqrt 3.16) = 2, ceil(3.16 / 2) = 2. Output blocks have rate 4."""
    assert layout(SlothfulAttention(), at=START).window == (2, 2)
    assert layout(SlothfulAttention(), where=site(stage="out")).window == (2, 2)
    assert layout(SlothfulAttention(schedule=Constant()), at=START).window == (3, 2)
    assert layout(SlothfulAttention(in_=Reduction(rate=1.0))).neutral
    assert layout(SlothfulAttention(in_=Reduction(rate=0.0))).neutral


def test_pooling_at_depth():
    """A depth of 2 is a quarter of the tokens: a quarter of the stride. Turned around, the deepest has it all."""
    first, second, third = plans([SlothfulAttention(in_=Reduction(rate=36.0))], site(), site(2), site(4))
    assert [each.layout(PEAK, LATENT).window for each in (first, second, third)] == [(6, 6), (3, 3), (2, 2)]
    turned = SlothfulAttention(in_=Reduction(rate=36.0, depth_decay=-2.0))
    windows = [each.layout(PEAK, LATENT).window for each in plans([turned], site(), site(2), site(4))]
    assert windows == [(2, 2), (3, 3), (6, 6)]


def test_step_decay_counts_the_tokens_that_there_are():
    """12 x 21 = 252 of 943 tokens: 36 x 252 / 943 = 9.62, so ceil(3.1) = 4 and ceil(2.4) = 3. By depth it is 9."""
    spec = SlothfulAttention(in_=Reduction(rate=36.0), schedule=StepDecay(time_decay=0))
    _, deeper = plans([spec], site(), site(2))
    assert deeper.layout(PEAK, LATENT).window == (4, 3)
    by_depth = replace(spec, schedule=Constant())
    assert plans([by_depth], site(), site(2))[1].layout(PEAK, LATENT).window == (3, 3)


def test_a_window_is_no_longer_than_the_grid():
    spec = SlothfulAttention(in_=Reduction(rate=50.0))
    assert layout(spec, latent=LatentSize(1, 3, 41)).window == (3, 17)  # 8 rows are 3, and 50 / 3 columns


def test_tiles_and_samples():
    """ceil(23 / 16) = 2 by 3 tiles of 12 x 14; every 6 / 0.5 = 12th token: 4 along the columns, 3 along the rows."""
    spec = NearSightedTile(tile_size=16)
    assert layout(spec) == KeyLayout((23, 41), tile=(12, 14), samples=(3, 4))
    assert layout(replace(spec, long_axis="y")).samples == (4, 3)
    assert layout(replace(spec, mode="1d")) == KeyLayout((23, 41), tile=(12, 14), samples=(1, 12), flat=True)
    assert layout(replace(spec, global_ratio=0.0)) == KeyLayout((23, 41), tile=(12, 14))
    assert layout(replace(spec, tile_size=41)).neutral


def test_tiles_and_samples_follow_the_schedule():
    """At ratio 1 tiles of 8 (3 x 6 of them, 8 x 7) and 18 / 1 = 18: 5 and 4."""
    spec = NearSightedTile(tile_size=16, peak_tile_size=8, peak_global_ratio=1.0, schedule=PeakDecay())
    assert layout(spec) == KeyLayout((23, 41), tile=(8, 7), samples=(4, 5))
    assert layout(spec, at=START).tile == (12, 11)  # 16 - 8 exp(-0.64) = 11.8


def test_padding_at_random():
    """12 + 12 has a row too many for 23, 3 x 14 a column too many for 41."""
    spec = NearSightedTile(tile_size=16, pad="random")
    pads = [layout(spec, at=Moment(step / 1000)).pad for step in range(40)]
    assert set(pads) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert pads == [layout(spec, at=Moment(step / 1000)).pad for step in range(40)]
    assert pads != [layout(replace(spec, seed=1), at=Moment(step / 1000)).pad for step in range(40)]
    assert layout(replace(spec, pad="end")).pad == (0, 0)


def test_pooled_tiles_and_pooled_samples():
    """At the peak tiles of 16: 2 x 3 of them; samples every 6 x 6 / 0.8 = 45th: 7 and 7."""
    spec = NearSightedAttention(base_tile_size=8, peak_tile_size=16)
    expected = KeyLayout((23, 41), (3, 2), tile=(12, 14), samples=(7, 7), sample_window=(3, 2))
    assert layout(spec) == expected
    halved = replace(site(), grid=(12, 21), divisors=(2, 2))
    assert layout(replace(spec, max_depth=1), where=halved) == KeyLayout((12, 21), (3, 2))  # too deep to be tiled


def test_every_nth_row_and_column():
    first, second, third = plans([TokenDownsample(factors=(3, 2, 4))], site(), site(2), site(4))
    windows = [each.layout(START, LATENT).window for each in (first, second, third)]
    assert windows == [(3, 3), (2, 2), (4, 4)]
    assert first.pooling == (*first.pooling[:1], 0.0, 0.0, "keep")  # blends of 0: the first token of each window


def test_hypertile():
    """At least 64 / 8 = 8 tokens: 23 is three tiles of 8 or two of 12, and 41 five of 9 or four of 11."""
    spec = HyperTile(tile_size=64, swap_size=1)
    assert layout(spec) == KeyLayout((23, 41), tile=(8, 9))
    choices = {layout(replace(spec, swap_size=2), at=Moment(step / 50)).tile for step in range(50)}
    assert choices == {(8, 9), (8, 11), (12, 9), (12, 11)}
    assert layout(replace(spec, tile_size=8192)).neutral


def test_frames():
    """Tiles and windows are of each frame; frames are pooled by threes besides."""
    over = site(frames=7)
    assert layout(SlothfulAttention(in_=Reduction(rate=6.0, temporal=3)), where=over, latent=VIDEO) == KeyLayout(
        (23, 41), (3, 2), frames=7, frame_window=3
    )
    assert layout(NearSightedTile(tile_size=16), where=over, latent=VIDEO) == KeyLayout(
        (23, 41), tile=(12, 14), samples=(3, 4), frames=7
    )
    assert layout(SlothfulAttention(in_=Reduction(rate=1.0, temporal=64)), where=over, latent=VIDEO).frame_window == 7


def test_temporal_attention():
    """Along frames alone, whatever the rate."""
    over_frames = replace(site(), kind="temporal", grid=(7, 1, 1), divisors=(1, None, None), path="time")
    spec = SlothfulAttention(in_=Reduction(rate=6.0, temporal=2))
    _, plan = plans([spec], site(), over_frames)
    assert plan.layout(PEAK, VIDEO) == KeyLayout((1, 7), (1, 2))
    assert plan.layout(PEAK, LatentSize(13, 5, 9)) == KeyLayout((1, 13), (1, 2))
    assert plan.layout(PEAK, LatentSize(1, 5, 9)).neutral


# Several specs


def test_pooling_and_downsampling_multiply():
    """(3, 2) and every 2nd: (6, 4); flattened, 6 tokens and every 2nd of both axes: 24."""
    both = [SlothfulAttention(), TokenDownsample()]
    assert layout(*both) == layout(*both[::-1]) == KeyLayout((23, 41), (6, 4))
    flat = SlothfulAttention(in_=Reduction(rate=6.0, mode="1d_avg"))
    assert layout(flat, TokenDownsample()) == KeyLayout((23, 41), (1, 24), flat=True)
    assert layout(SlothfulAttention(), TokenDownsample(factors=(16,))).window == (23, 32)
    [plan] = plans([SlothfulAttention(in_=Reduction(rate=6.0, k_blend=0.5, v_blend=1.0)), TokenDownsample()])
    assert plan.pooling == ("avg", 0.5, 1.0, "keep")


def test_pooling_within_tiles():
    """Windows of a tile, and samples every 6 x 6 / 0.5 = 72nd: 9 and 8, pooled by (3, 2) as well."""
    assert layout(NearSightedTile(tile_size=16), SlothfulAttention()) == KeyLayout(
        (23, 41), (3, 2), tile=(12, 14), samples=(9, 8), sample_window=(3, 2)
    )
    assert layout(HyperTile(tile_size=64, swap_size=1), SlothfulAttention()) == KeyLayout((23, 41), (3, 2), tile=(8, 9))


def test_tiles_smaller_than_the_windows():
    """50 is 8 x 7, but a tile has 5 rows and 5 columns."""
    spec = SlothfulAttention(in_=Reduction(rate=50.0))
    tiled = layout(NearSightedTile(tile_size=5, global_ratio=0.0), spec)
    assert tiled.tile == (5, 5)
    assert tiled.window == (5, 5)


def test_downsampling_within_tiles():
    """The samples stay where they are; they are single tokens."""
    assert layout(NearSightedTile(tile_size=16), TokenDownsample()) == KeyLayout(
        (23, 41), (2, 2), tile=(12, 14), samples=(3, 4), sample_window=(2, 2)
    )
    assert layout(HyperTile(tile_size=64, swap_size=1), TokenDownsample(factors=(3,))) == KeyLayout(
        (23, 41), (3, 3), tile=(8, 9)
    )


def test_near_sighted_attention_and_downsampling():
    spec = NearSightedAttention(base_tile_size=8, peak_tile_size=16)
    assert layout(spec, TokenDownsample()) == KeyLayout(
        (23, 41), (6, 4), tile=(12, 14), samples=(7, 7), sample_window=(6, 4)
    )


@pytest.mark.parametrize(
    "others",
    [
        [],
        [SlothfulAttention()],
        [NearSightedTile(tile_size=16)],
        [NearSightedAttention(base_tile_size=8, peak_tile_size=16)],
        [TokenDownsample()],
        [HyperTile(tile_size=64)],
        [HyperTile(tile_size=64), SlothfulAttention(), TokenDownsample()],
    ],
)
def test_merging_leaves_the_keys_to_others(others):
    [plan] = plans([TokenMerging(), *others])
    expected = layout(*others) if others else KeyLayout((23, 41))
    assert plan.layout(PEAK, LATENT) == expected


# Other sizes


def test_another_latent():
    """At depth 2 after a convolution that halves the latent: 47 x 85 is 24 x 43 and 12 x 22."""
    halved = [replace(each, divisors=tuple(2 * d for d in each.divisors)) for each in (site(), site(2))]
    first, second = plans([NearSightedTile(tile_size=16, max_depth=3)], *halved)
    assert first.layout(PEAK, LatentSize(1, 47, 85)) == KeyLayout((24, 43), tile=(12, 15), samples=(3, 4))
    assert second.layout(PEAK, LatentSize(1, 47, 85)) == KeyLayout((12, 22), tile=(12, 11), samples=(2, 2))


def test_a_window_of_the_host_does_not_grow():
    windowed = replace(site(), grid=(7, 9), divisors=(None, None))
    assert layout(TokenDownsample(), where=windowed, latent=LatentSize(1, 70, 90)) == KeyLayout((7, 9), (2, 2))


def test_an_unknown_grid_has_no_layout():
    [plan] = plans([SlothfulAttention()])
    unknown = replace(plan, site=replace(plan.site, grid=None))
    with pytest.raises(SlothError, match=r"attn\.1: the grid of its 943 tokens"):
        unknown.layout(PEAK, LATENT)


@pytest.mark.parametrize(("depth", "level"), [(0.5, 0), (1, 0), (1.3, 0), (2, 1), (2.2, 1), (3, 2), (4, 2), (8, 3)])
def test_levels(depth, level):
    assert level_of(replace(site(), depth=depth)) == level


# What is drawn


@pytest.mark.parametrize("swap_size", [1, 2, 3])
def test_hypertile_chooses_alike_at_a_level(swap_size):
    spec = HyperTile(tile_size=32, swap_size=swap_size, max_depth=1)
    sites = [site(depth, path=f"{depth}.{index}") for depth in (1, 2) for index in range(3)]
    chosen = plans([spec], *sites)
    seen: dict[float, set[KeyLayout]] = {1: set(), 2: set()}
    for step in range(60):
        layouts = [each.layout(Moment(step / 60), LATENT) for each in chosen]
        assert layouts == [each.layout(Moment(step / 60), LATENT) for each in chosen]
        for depth in (1, 2):
            [alike] = {each for each, plan in zip(layouts, chosen, strict=True) if plan.site.depth == depth}
            seen[depth].add(alike)
    assert len(seen[1]) == swap_size**2
    assert len(seen[2]) == min(swap_size, 2)  # of at least 8: 12 rows are one tile, 21 columns two or one


def test_hypertile_follows_its_seed():
    [a], [b] = (plans([HyperTile(tile_size=32, seed=seed)]) for seed in (0, 1))
    moments = [Moment(step / 20) for step in range(20)]
    assert [a.layout(each, LATENT) for each in moments] != [b.layout(each, LATENT) for each in moments]


def test_seeds_of_merging():
    """Another one at each moment and site, and by the seed of the spec; the same whenever a run comes there."""
    one, other = plans([TokenMerging()], site(path="a"), site(path="b"))
    [reseeded] = plans([TokenMerging(seed=1)], site(path="a"))
    moments = [Moment(step / 50) for step in range(50)]
    seeds = [[each.seed(moment) for moment in moments] for each in (one, other, reseeded)]
    assert len({seed for each in seeds for seed in each}) == 150
    assert all(0 <= seed < 2**31 for each in seeds for seed in each)
    assert seeds[0] == [one.seed(moment) for moment in moments]
    assert one.seed(Moment(0.5, 3.0)) == one.seed(Moment(0.5, None))


# Clocks


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (SlothfulAttention(), {"progress"}),
        (SlothfulAttention(schedule=StepDecay()), {"sigma"}),
        (NearSightedTile(), set()),
        (NearSightedTile(pad="random"), {"progress"}),
        (NearSightedAttention(schedule=StepDecay(), pad="random"), {"progress", "sigma"}),
        (TokenDownsample(), set()),
        (HyperTile(), {"progress"}),
        (HyperTile(swap_size=1), set()),
        (TokenMerging(), set()),
    ],
)
def test_clocks(spec, expected):
    assert clocks(plans([spec])) == expected
