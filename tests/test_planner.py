"""Which spec acts where: combinations, refusals and notes."""

import itertools

import pytest

from sloth_fx import SlothError
from sloth_fx.planner import make_plan
from sloth_fx.site import AttentionSite, Place
from sloth_fx.spec import (
    HyperTile,
    NearSightedAttention,
    NearSightedTile,
    Reduction,
    SlothfulAttention,
    TokenDownsample,
    TokenMerging,
)

SPECS = [SlothfulAttention, NearSightedTile, NearSightedAttention, TokenDownsample, HyperTile, TokenMerging]
BY_NAME = {spec.__name__: spec for spec in SPECS}

# The table of docs/specs.md, "Combining them": pairs that are refused; all others compose.
REFUSED = {
    ("SlothfulAttention", "NearSightedAttention"): "reduce",
    ("NearSightedTile", "NearSightedAttention"): "tile",
    ("NearSightedTile", "HyperTile"): "tile",
    ("NearSightedAttention", "HyperTile"): "tile",
    **{
        (name, name): deed
        for name, deed in zip(
            BY_NAME,
            ("reduce the keys of", "tile", "reduce the keys of", "thin out", "tile", "merge tokens of"),
            strict=True,
        )
    },
}


def site(path="blocks.0", kind="self", depth=1, grid=(23, 41), **changes):
    tokens = 23 * 41
    return AttentionSite(
        **{
            "path": path,
            "call": 0,
            "owner": "Attention",
            "kind": kind,
            "stage": "in",
            "depth": depth,
            "heads": 2,
            "head_dim": 8,
            "q_tokens": tokens,
            "kv_tokens": tokens,
            "grid": grid,
            "divisors": None if grid is None else (depth,) * len(grid),
            "text": None,
            "on_image": kind in ("self", "joint", "temporal"),
            **changes,
        }
    )


def temporal(path="time.0", **changes):
    return site(path, "temporal", grid=(7, 1, 1), divisors=(1, None, None), q_tokens=7, kv_tokens=7, **changes)


def acting(plan):
    return {each.site.name: tuple(type(spec).__name__ for spec in each.specs) for each in plan.sites}


# Combinations


@pytest.mark.parametrize(("first", "second"), list(itertools.product(BY_NAME, BY_NAME)))
def test_a_pair_at_one_site(first, second):
    specs = [BY_NAME[first](), BY_NAME[second](where="blocks.*")]
    deed = REFUSED.get((first, second)) or REFUSED.get((second, first))
    if deed is None:
        [plan] = make_plan(specs, [site()]).sites
        assert {type(spec).__name__ for spec in plan.specs} == {first, second}
        return
    with pytest.raises(SlothError) as refusal:
        make_plan(specs, [site()])
    for word in (first, second, deed, "blocks.0", "where="):
        assert word in str(refusal.value)


@pytest.mark.parametrize(("first", "second"), [pair for pair in REFUSED if "TokenMerging" not in pair])
def test_what_is_refused_at_one_site_is_fine_at_two(first, second):
    plan = make_plan([BY_NAME[first](where="a"), BY_NAME[second](where="b")], [site("a"), site("b")])
    assert acting(plan) == {"a": (first,), "b": (second,)}


@pytest.mark.parametrize("three", list(itertools.combinations(BY_NAME, 3)))
def test_three_at_one_site(three):
    specs = [BY_NAME[name]() for name in three]
    if any(pair in REFUSED for pair in itertools.combinations(three, 2)):
        with pytest.raises(SlothError, match="both"):
            make_plan(specs, [site()])
    else:
        assert {*acting(make_plan(specs, [site()]))["blocks.0"]} == {*three}


@pytest.mark.parametrize("name", BY_NAME)
def test_merging_beside_another_merges_queries_alone(name):
    [alone] = make_plan([TokenMerging(tokens="all")], [site()]).sites
    assert alone.merged_tokens == "all"
    if name != "TokenMerging":
        [plan] = make_plan([TokenMerging(tokens="all"), BY_NAME[name]()], [site()]).sites
        assert plan.merged_tokens == "q"


def test_a_spec_fills_its_roles():
    roles = ("reducing", "downsampling", "tiling", "merging")
    filled = {
        SlothfulAttention: {"reducing"},
        NearSightedTile: {"tiling"},
        NearSightedAttention: {"reducing", "tiling"},
        TokenDownsample: {"downsampling"},
        HyperTile: {"tiling"},
        TokenMerging: {"merging"},
    }
    for kind, expected in filled.items():
        spec = kind()
        [plan] = make_plan([spec], [site()]).sites
        assert {role for role in roles if getattr(plan, role) is spec} == expected
        assert plan.specs == (spec,)
        assert plan.reduces == bool({"reducing", "downsampling"} & expected)


# Sites that are left alone, and why


def notes(specs, sites, **options):
    return make_plan(specs, sites, **options).notes


@pytest.mark.parametrize("spec", SPECS)
def test_other_attention_is_left_alone_with_a_note(spec):
    sites = [
        site(),
        site("cross", "cross", on_image=False),
        site("text", grid=None, on_image=False),
        site("both", "joint"),
        site("sums", "linear", on_image=False),
    ]
    plan = make_plan([spec()], sites)
    assert acting(plan) == {"blocks.0": (spec.__name__,), "both": (spec.__name__,)}
    assert plan.notes.keys() == {"cross", "text", "sums"}
    assert "cross-attention" in plan.notes["cross"]
    assert "other tokens" in plan.notes["text"]
    assert "softmax" in plan.notes["sums"]


def test_a_model_without_attention_of_images_is_refused():
    sites = [site("sums", "linear", on_image=False), site("cross", "cross", on_image=False)]
    with pytest.raises(SlothError, match="linear, cross"):
        make_plan([SlothfulAttention()], sites)


@pytest.mark.parametrize("where", ["cross", "cross.*", {"kind": "cross"}])
def test_a_selector_of_other_attention_is_refused(where):
    sites = [site(), site("cross.attn", "cross", on_image=False)]
    with pytest.raises(SlothError, match=r"cross\.attn.*cross-attention"):
        make_plan([SlothfulAttention(where=where)], sites)


def test_a_selector_that_matches_nothing_names_what_there_is():
    sites = [site("down.attn"), site("up.attn", stage="out", depth=2)]
    for where, near in {"upp.attn": "up.attn", "middle": "in", (3, 8): "depth 2"}.items():
        with pytest.raises(SlothError, match=near):
            make_plan([SlothfulAttention(where=where)], sites)


def test_temporal_attention_is_reduced_over_frames_alone():
    sites = [site(), temporal()]
    plan = make_plan([SlothfulAttention(in_=Reduction(rate=4.0, temporal=2))], sites)
    assert acting(plan) == dict.fromkeys(["blocks.0", "time.0"], ("SlothfulAttention",))
    plan = make_plan([SlothfulAttention()], sites)
    assert acting(plan) == {"blocks.0": ("SlothfulAttention",)}
    assert "temporal=1" in plan.notes["time.0"]


def test_near_sighted_attention_does_not_tile_frames():
    spec = NearSightedAttention(in_=Reduction(rate=4.0, temporal=2))
    spatial, over_frames = make_plan([spec], [site(), temporal()]).sites
    assert (spatial.tiling, over_frames.tiling, over_frames.reducing) == (spec, None, spec)


def test_the_temporal_reduction_of_a_stage_is_that_of_the_stage():
    spec = SlothfulAttention(in_=Reduction(rate=4.0, temporal=2))
    plan = make_plan([spec], [site(), temporal("a"), temporal("b", stage="out")])
    assert plan.notes.keys() == {"b"}


@pytest.mark.parametrize("spec", [NearSightedTile, TokenDownsample, HyperTile, TokenMerging])
def test_temporal_attention_has_no_rows(spec):
    plan = make_plan([spec()], [site(), temporal()])
    assert acting(plan) == {"blocks.0": (spec.__name__,)}
    assert plan.notes["time.0"] == f"temporal attention: it has no rows and columns for {spec.__name__}"
    with pytest.raises(SlothError, match=r"time\.0: temporal attention"):
        make_plan([spec(where="temporal")], [site(), temporal()])


def test_frames_alone_are_a_model_too():
    [plan] = make_plan([SlothfulAttention(in_=Reduction(rate=4.0, temporal=2))], [temporal()]).sites
    assert (plan.shallowest.name, plan.deepest) == ("time.0", 1)


@pytest.mark.parametrize("spec", SPECS)
def test_an_unknown_grid(spec):
    sites = [site(), site("strange", grid=None)]
    plan = make_plan([spec()], sites)
    assert acting(plan) == {"blocks.0": (spec.__name__,)}
    assert "grid" in plan.notes["strange"]
    assert str(23 * 41) in plan.notes["strange"]
    for where in ("strange", "s*", {"kind": "self"}):
        with pytest.raises(SlothError, match=r"strange: .*grid"):
            make_plan([spec(where=where)], sites)
    assert acting(make_plan([spec(where="self")], sites, strict=False)) == {"blocks.0": (spec.__name__,)}
    with pytest.raises(SlothError, match=r"strange: .*grid"):
        make_plan([spec()], sites[1:])
    with pytest.raises(SlothError, match=r"strange: .*grid"):
        make_plan([spec(where="strange")], sites, strict=False)


def test_the_middle_block_is_kept():
    sites = [site(), site("mid", stage="middle", depth=4)]
    assert "keep_middle" in notes([SlothfulAttention()], sites)["mid"]
    assert notes([SlothfulAttention(keep_middle=False)], sites) == {}
    assert notes([NearSightedAttention()], sites) == {}


# (spec that reaches the level, spec that does not, the level): site of depth 2^level, latent at level 0
LEVELS = [
    (NearSightedTile(max_depth=2), NearSightedTile(max_depth=1), 1),
    (HyperTile(max_depth=1), HyperTile(max_depth=0), 1),
    (HyperTile(max_depth=2), HyperTile(max_depth=1), 2),
    (TokenMerging(max_depth=1), TokenMerging(max_depth=0), 1),
    (TokenDownsample(factors=(2, 3)), TokenDownsample(factors=(2,)), 1),
    (TokenDownsample(factors=(2, 1, 3)), TokenDownsample(factors=(2, 3, 1)), 2),
]


@pytest.mark.parametrize(("reaches", "stays", "level"), LEVELS)
def test_levels_that_a_spec_does_not_reach(reaches, stays, level):
    sites = [site("a"), site("b", depth=2**level)]
    name = type(stays).__name__
    assert acting(make_plan([reaches], sites)) == {"a": (name,), "b": (name,)}
    plan = make_plan([stays], sites)
    assert acting(plan) == {"a": (name,)}
    assert "max_depth" in plan.notes["b"] or "factors" in plan.notes["b"]


def test_a_spec_that_fits_no_site_says_what_each_is():
    with pytest.raises(SlothError, match=r"NearSightedTile.*a: 4 times coarser.*b: 8 times coarser"):
        make_plan([NearSightedTile(max_depth=1)], [site("a", depth=4), site("b", depth=8)])
    with pytest.raises(SlothError, match=r"TokenDownsample.*level 0.*factors=\(1,\)"):
        make_plan([TokenDownsample(factors=(1,))], [site()])


def test_many_reasons_are_cut_short():
    sites = [site(f"blocks.{i}", grid=None) for i in range(9)]
    with pytest.raises(SlothError, match=r"\(9 in all\)"):
        make_plan([HyperTile()], sites)


def test_notes_of_sites_that_no_selector_selects():
    sites = [site("a"), site("b")]
    assert notes([SlothfulAttention(where="a")], sites) == {"b": "not selected by where"}
    assert notes([SlothfulAttention(where="a"), HyperTile()], sites) == {}
    assert notes([TokenDownsample(factors=(1, 2)), HyperTile(where="a")], [*sites, site("c", depth=2)])["b"] == (
        "attention level 0, left whole (factors=(1, 2))"
    )


def test_plans_by_owner():
    sites = [site("a"), site("a", call=1, core=1), site("b")]
    plan = make_plan([SlothfulAttention()], sites)
    assert {path: list(calls) for path, calls in plan.by_owner().items()} == {"a": [0, 1], "b": [0]}


def test_depth_counts_from_spatial_attention():
    """Frames are at no level."""
    sites = [temporal("t", depth=0.5), site("a"), site("b", depth=4)]
    plan = make_plan([SlothfulAttention()], sites)
    assert {(each.shallowest.name, each.deepest) for each in plan.sites} == {("a", 4)}


def test_places_do_not_matter_to_the_plan():
    [plan] = make_plan([HyperTile()], [site(kind="joint", key_place=Place(7, from_end=False, alone=False))]).sites
    assert plan.site.key_place.offset == 7
