"""from_node: every node, release and form, against values written out by hand."""

from typing import Any

import pytest

from sloth_fx.errors import SlothError
from sloth_fx.node_values import NODES
from sloth_fx.schedule import PeakDecay, StepDecay
from sloth_fx.spec import NearSightedAttention, NearSightedTile, Reduction, SlothfulAttention

NODE = {each.__name__: each for each in (SlothfulAttention, NearSightedTile, NearSightedAttention)}
FIRST: dict[str, Any] = {"long_axis": "x", "border": "crop"}
SECOND: dict[str, Any] = {"long_axis": "y", "border": "crop"}
LATER: dict[str, Any] = {"long_axis": "y", "border": "keep"}
LATER_TILES: dict[str, Any] = {
    "base_tile_size": 32,
    "peak_tile_size": 48,
    "base_global_ratio": 1,
    "peak_global_ratio": 0.5,
}


def sides(rate_in: float, rate_out: float, depth_decay: float, **more: Any) -> dict[str, Reduction]:
    return {
        "in_": Reduction(rate=rate_in, depth_decay=depth_decay, **more),
        "out": Reduction(rate=rate_out, depth_decay=depth_decay, **more),
    }


@pytest.mark.parametrize(
    ("node", "release", "simple", "expected"),
    [
        (SlothfulAttention, "2023-12-11", None, SlothfulAttention(**sides(6, 4, 1, **FIRST), schedule=StepDecay())),
        (SlothfulAttention, "2023-12-11", True, SlothfulAttention(**sides(6, 4, 1, **FIRST), schedule=StepDecay())),
        (SlothfulAttention, "2023-12-16", None, SlothfulAttention(**sides(6, 4, 2, **SECOND))),
        (SlothfulAttention, "later", False, SlothfulAttention(**sides(6, 4, 2, **LATER))),
        (NearSightedAttention, "2023-12-16", False, NearSightedAttention(**sides(6, 4, 2, **SECOND))),
        (NearSightedAttention, "2023-12-16", True, NearSightedAttention(**sides(4, 4, 1.5, **SECOND))),
        (NearSightedAttention, "later", None, NearSightedAttention(**sides(6, 4, 2, **LATER), **LATER_TILES)),
        (NearSightedAttention, "later", True, NearSightedAttention(**sides(4, 4, 2, **LATER), **LATER_TILES)),
        (NearSightedTile, "2023-12-16", None, NearSightedTile()),
        (
            NearSightedTile,
            "later",
            None,
            NearSightedTile(
                global_ratio=1.0, peak_tile_size=48, peak_global_ratio=0.5, schedule=PeakDecay(peak_time=0.3), mode="1d"
            ),
        ),
    ],
)
def test_defaults_of_the_nodes(node: Any, release: str, simple: bool | None, expected: Any) -> None:
    assert node.from_node(release=release, **({} if simple is None else {"simple": simple})) == expected


def test_the_default_release_is_the_second() -> None:
    for node in NODE.values():
        assert node.from_node() == node.from_node(release="2023-12-16")


def test_every_parameter_of_the_first_release_arrives() -> None:
    spec = SlothfulAttention.from_node(
        release="2023-12-11", time_decay=0.5, keep_middle=False,
        in_mode="1d_max", in_depth_decay=-1, in_strength=9, in_k_blend=0.1, in_v_blend=0.2,
        out_mode="2D_Max", out_depth_decay=3, out_strength=8, out_k_blend=0.3, out_v_blend=0.4,
    )  # fmt: skip
    assert spec == SlothfulAttention(
        in_=Reduction(rate=9, mode="1d_max", depth_decay=-1, k_blend=0.1, v_blend=0.2, **FIRST),
        out=Reduction(rate=8, mode="2d_max", depth_decay=3, k_blend=0.3, v_blend=0.4, **FIRST),
        schedule=StepDecay(time_decay=0.5),
        keep_middle=False,
    )


def test_every_parameter_of_the_first_simple_form_arrives() -> None:
    spec = SlothfulAttention.from_node(
        release="2023-12-11", time_decay=2, depth_decay=-2,
        in_mode="1D_AVG", in_strength=9, in_blend=0.1, out_mode="1D_MAX", out_strength=8, out_blend=0.3,
    )  # fmt: skip
    assert spec == SlothfulAttention(
        in_=Reduction(rate=9, mode="1d_avg", depth_decay=-2, k_blend=0.1, v_blend=0.1, **FIRST),
        out=Reduction(rate=8, mode="1d_max", depth_decay=-2, k_blend=0.3, v_blend=0.3, **FIRST),
        schedule=StepDecay(time_decay=2),
    )


FULL: dict[str, Any] = {
    "peak_time": 0.7, "time_decay": 3,
    "in_mode": "1D_MAX", "in_depth_decay": 0, "in_slothful": 9, "in_k_blend": 1, "in_v_blend": 1,
    "out_mode": "1D_AVG", "out_depth_decay": 4, "out_slothful": 8, "out_k_blend": 0, "out_v_blend": 0,
}  # fmt: skip
TILES: dict[str, Any] = {"base_tile_size": 16, "peak_tile_size": 64, "base_global_ratio": 0.0, "peak_global_ratio": 1.0}
CONCAT: dict[str, Any] = {"concat_local": True, "concat_global": True}


def full_spec(node: Any, borders: tuple[str, str], **more: Any) -> Any:
    """in_ stays in_, whatever the second release's code does."""
    in_ = Reduction(rate=9, mode="1d_max", depth_decay=0, k_blend=1, v_blend=1, border=borders[0])  # type: ignore[arg-type]
    out = Reduction(rate=8, mode="1d_avg", depth_decay=4, border=borders[1])  # type: ignore[arg-type]
    return node(in_=in_, out=out, schedule=PeakDecay(peak_time=0.7, time_decay=3), **more)


def test_every_parameter_of_the_second_release_arrives() -> None:
    assert SlothfulAttention.from_node(**FULL) == full_spec(SlothfulAttention, ("crop", "crop"))
    spec = NearSightedAttention.from_node(tiling_max_depth=3, **TILES, **FULL)
    assert spec == full_spec(NearSightedAttention, ("crop", "crop"), max_depth=3, **TILES)
    spec = NearSightedTile.from_node(tiling_max_depth=1, global_ratio=0.0, tile_size=16)
    assert spec == NearSightedTile(max_depth=1, global_ratio=0, tile_size=16)


def test_every_parameter_of_the_later_release_arrives() -> None:
    """The later node keeps the border only where both blends are 0."""
    assert SlothfulAttention.from_node(release="later", **FULL) == full_spec(SlothfulAttention, ("crop", "keep"))
    spec = NearSightedAttention.from_node(release="later", tiling_max_depth=3, **TILES, **FULL, **CONCAT)
    assert spec == full_spec(NearSightedAttention, ("crop", "keep"), max_depth=3, **TILES, **CONCAT)
    tile = NearSightedTile.from_node(release="later", tiling_max_depth=3, peak_time=1, time_decay=0, **TILES, **CONCAT)
    schedule = PeakDecay(peak_time=1, time_decay=0)
    assert tile == NearSightedTile(
        tile_size=16,
        peak_tile_size=64,
        global_ratio=0,
        peak_global_ratio=1,
        max_depth=3,
        mode="1d",
        schedule=schedule,
        **CONCAT,
    )


def test_every_parameter_of_the_simple_near_sighted_form_arrives() -> None:
    given = {"slothful": 5, "in_blend": 0.5, "out_blend": 1, "mode": "2d_max", "depth_decay": 3, "peak_time": 0.1}
    for release, extra in (("2023-12-16", {}), ("later", CONCAT)):
        spec = NearSightedAttention.from_node(release=release, **given, **TILES, **extra)
        same = {"rate": 5, "mode": "2d_max", "depth_decay": 3, **SECOND}
        assert spec == NearSightedAttention(
            in_=Reduction(**same, k_blend=0.5, v_blend=0.5),
            out=Reduction(**same, k_blend=1, v_blend=1),
            schedule=PeakDecay(peak_time=0.1),
            **TILES,
            **extra,
        )


RANGES: list[tuple[str, str, str, float, float]] = [
    ("SlothfulAttention", "2023-12-11", "in_strength", 0, 50),
    ("SlothfulAttention", "2023-12-11", "in_depth_decay", -2, 4),
    ("SlothfulAttention", "2023-12-11", "depth_decay", -2, 4),
    ("SlothfulAttention", "2023-12-11", "out_blend", 0, 1),
    ("SlothfulAttention", "2023-12-16", "out_depth_decay", 0, 4),
    ("SlothfulAttention", "2023-12-16", "peak_time", 0, 1),
    ("SlothfulAttention", "later", "time_decay", 0, 4),
    ("NearSightedAttention", "2023-12-16", "base_tile_size", 16, 64),
    ("NearSightedAttention", "2023-12-16", "peak_global_ratio", 0, 1),
    ("NearSightedAttention", "2023-12-16", "tiling_max_depth", 1, 3),
    ("NearSightedAttention", "2023-12-16", "slothful", 0, 50),
    ("NearSightedAttention", "later", "peak_tile_size", 16, 96),
    ("NearSightedAttention", "later", "base_global_ratio", 0, 2),
    ("NearSightedTile", "2023-12-16", "tile_size", 16, 64),
    ("NearSightedTile", "2023-12-16", "global_ratio", 0, 1),
    ("NearSightedTile", "later", "base_tile_size", 16, 96),
]


@pytest.mark.parametrize(("node", "release", "name", "low", "high"), RANGES)
def test_the_nodes_own_ranges(node: str, release: str, name: str, low: float, high: float) -> None:
    for good in (low, high):
        NODE[node].from_node(release=release, **{name: good})
    for bad in (low - 1, high + 1, "1", None, True, float("nan")):
        with pytest.raises(SlothError, match=rf"{node} of {release}: {name}=.* takes "):
            NODE[node].from_node(release=release, **{name: bad})


@pytest.mark.parametrize(
    ("node", "given", "message"),
    [
        (SlothfulAttention, {"release": "2023-12-12"}, "release '2023-12-12' is unknown, nearest: 2023-12-1"),
        (NearSightedTile, {"release": "2023-12-11"}, r"known: 2023-12-16, later"),
        (SlothfulAttention, {"release": None}, "release None is unknown"),
        (SlothfulAttention, {"in_slothfull": 6}, "'in_slothfull' is unknown, nearest: in_slothful"),
        (SlothfulAttention, {"in_strength": 6}, "'in_strength' is unknown"),
        (SlothfulAttention, {"keep_middle": False}, "'keep_middle' is unknown"),
        (SlothfulAttention, {"in_mode": "3D_AVG"}, "in_mode='3D_AVG' .* 1D_AVG"),
        (SlothfulAttention, {"in_mode": None}, "in_mode=None"),
        (SlothfulAttention, {"simple": True}, "has no simple form"),
        (SlothfulAttention, {"simple": "yes"}, "simple='yes'"),
        (SlothfulAttention, {"release": "2023-12-11", "keep_middle": 1}, "keep_middle=1"),
        (
            SlothfulAttention,
            {"release": "2023-12-11", "depth_decay": 1, "in_k_blend": 0},
            "in_k_blend is of the full form",
        ),
        (NearSightedAttention, {"slothful": 4, "out_mode": "2D_AVG"}, "out_mode is of the full form"),
        (NearSightedAttention, {"simple": False, "slothful": 4}, "slothful is of the simple form"),
        (NearSightedAttention, {"simple": True, "in_slothful": 4}, "in_slothful is of the full form"),
        (NearSightedAttention, {"concat_local": True}, "'concat_local' is unknown"),
        (NearSightedTile, {"tile_size": 32.0}, "tile_size=32.0 .* whole number"),
    ],
)
def test_what_a_node_does_not_know_is_refused(node: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(SlothError, match=message):
        node.from_node(**given)


@pytest.mark.parametrize(
    ("node", "release", "form"),
    [
        (node, release, form)
        for node, releases in NODES.items()
        for release, forms in releases.items()
        for form in forms
    ],
)
def test_every_default_lies_in_its_own_range(node: str, release: str, form: str) -> None:
    given = {name: parameter.default for name, parameter in NODES[node][release][form].items()}
    spec = NODE[node].from_node(release=release, **given)
    assert spec == NODE[node].from_node(release=release, simple=form == "simple")
