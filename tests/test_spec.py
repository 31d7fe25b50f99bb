"""Specs: what they refuse, and their arithmetic against the nodes' own way of writing it."""

import math
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from sloth_fx.errors import SlothError
from sloth_fx.schedule import Constant, Moment, PeakDecay
from sloth_fx.spec import (
    HyperTile,
    NearSightedAttention,
    NearSightedTile,
    Reduction,
    SlothfulAttention,
    TokenDownsample,
    TokenMerging,
)

SCHEDULED = [SlothfulAttention, NearSightedTile, NearSightedAttention]
SPECS = [*SCHEDULED, TokenDownsample, HyperTile, TokenMerging]
R6, R4 = Reduction(rate=6.0), Reduction(rate=4.0)
NOT_NUMBERS = [math.nan, math.inf, True, "1", None]


@pytest.mark.parametrize("depth_decay", [0.0, 0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize(("side", "channels"), [(64, 1), (32, 2), (16, 4)])
def test_stride_of_the_second_release(depth_decay: float, side: int, channels: int) -> None:
    """slothful * time_ratio * (1 / channel multiple) ^ depth_decay, SD1.5 at a latent of 64 x 64."""
    stride = Reduction(rate=6, depth_decay=depth_decay).stride(0.7, side**2 / 64**2, 8)
    assert stride == pytest.approx(6 * 0.7 * (1 / channels) ** depth_decay)


@pytest.mark.parametrize("depth_decay", [-2.0, -0.3, 0.0, 0.6, 1.0, 4.0])
@pytest.mark.parametrize(
    ("xl", "tokens"), [(False, 6144), (False, 1536), (False, 384), (False, 96), (True, 1536), (True, 384)]
)
def test_stride_of_the_first_release(depth_decay: float, xl: bool, tokens: int) -> None:
    """The node's two branches, for a latent of 96 x 64: SD1.5 attends from 1:1 to 1:8, XL from 1:2 to 1:4."""
    samples = 96 * 64
    growing, shrinking = samples / tokens / (16 if xl else 64), (4 if xl else 1) * tokens / samples
    sample_rate = growing if depth_decay < 0 else shrinking
    expected = 5.5 * 0.4 * sample_rate ** (abs(depth_decay) / 2)
    shallowest, deepest = (samples / 4, 2) if xl else (samples, 8)
    stride = Reduction(rate=5.5, depth_decay=depth_decay).stride(0.4, tokens / shallowest, deepest)
    assert stride == pytest.approx(expected)


@pytest.mark.parametrize("arguments", [(1.1, 1, 8), (0.5, 0, 8), (0.5, 1, 0), (0.5, math.nan, 8), (0.5, 1, "8")])
def test_stride_refuses(arguments: tuple[Any, Any, Any]) -> None:
    with pytest.raises(SlothError, match=r"time_ratio|relative_tokens|deepest"):
        R6.stride(*arguments)


REFUSED: list[tuple[type, str, list[Any]]] = [
    (Reduction, "rate", [-1, 50.5, *NOT_NUMBERS]),
    (Reduction, "mode", ["2D_AVG", "avg", 2, None]),
    (Reduction, "depth_decay", [-2.1, 4.1, *NOT_NUMBERS]),
    (Reduction, "k_blend", [-0.1, 1.1, *NOT_NUMBERS]),
    (Reduction, "v_blend", [-0.1, 1.1, *NOT_NUMBERS]),
    (Reduction, "long_axis", ["z", None]),
    (Reduction, "border", ["crops", True]),
    (Reduction, "temporal", [0, 65, 2.0, *NOT_NUMBERS]),
    (SlothfulAttention, "in_", [6.0, None, {"rate": 6}, Reduction]),
    (SlothfulAttention, "out", [4]),
    (SlothfulAttention, "keep_middle", [1, None, "yes"]),
    (SlothfulAttention, "schedule", [None, 1.0, PeakDecay, object()]),
    (NearSightedTile, "tile_size", [0, 4097, 32.0, *NOT_NUMBERS]),
    (NearSightedTile, "peak_tile_size", [0, 32.0, True]),
    (NearSightedTile, "global_ratio", [-0.1, 2.1, *NOT_NUMBERS]),
    (NearSightedTile, "peak_global_ratio", [-0.1, 2.1, "1"]),
    (NearSightedTile, "max_depth", [0, 9, 2.0, True]),
    (NearSightedTile, "mode", ["2d_avg", 1]),
    (NearSightedTile, "pad", ["start", None]),
    (NearSightedTile, "seed", [-1, 0.0, True]),
    (NearSightedTile, "concat_local", [0]),
    (NearSightedAttention, "base_tile_size", [0, 24.5]),
    (NearSightedAttention, "peak_tile_size", [5000, None]),
    (NearSightedAttention, "base_global_ratio", [3, None]),
    (NearSightedAttention, "peak_global_ratio", [-1, None]),
    (NearSightedAttention, "max_depth", [0]),
    (NearSightedAttention, "in_", [None]),
    (NearSightedAttention, "out", ["4"]),
    (NearSightedAttention, "schedule", ["peak"]),
    (NearSightedAttention, "pad", ["none"]),
    (NearSightedAttention, "seed", [2**63]),
    (NearSightedAttention, "concat_global", ["no"]),
    (TokenDownsample, "factors", [(), (0,), (2, 65), (2.0,), (True,), 2, "2", None, (1,) * 9, ((2,),)]),
    (HyperTile, "tile_size", [0, 8193, 256.0, *NOT_NUMBERS]),
    (HyperTile, "swap_size", [0, 17, 2.0, *NOT_NUMBERS]),
    (HyperTile, "max_depth", [-1, 8, 1.0, *NOT_NUMBERS]),
    (HyperTile, "scale_depth", [1, None]),
    (HyperTile, "seed", [-1, 2**63, 0.0, True]),
    (TokenMerging, "ratio", [-0.1, 1.1, *NOT_NUMBERS]),
    (TokenMerging, "cell", [2, (2,), (2, 2, 2), (0, 2), (2, 65), (2, 2.0), "22", None]),
    (TokenMerging, "max_depth", [-1, 8, *NOT_NUMBERS]),
    (TokenMerging, "tokens", ["ALL", "k", None, True]),
    (TokenMerging, "seed", [-1, 2**63]),
]


@pytest.mark.parametrize(("kind", "name", "bad"), [(kind, name, bad) for kind, name, bads in REFUSED for bad in bads])
def test_a_bad_value_is_refused_by_name(kind: type, name: str, bad: Any) -> None:
    values = {"rate": 2.0} if kind is Reduction else {}
    with pytest.raises(SlothError, match=rf"{kind.__name__}: {name}=.* takes "):
        kind(**{**values, name: bad})


@pytest.mark.parametrize("kind", SPECS)
def test_where_is_checked_and_kept_in_canonical_form(kind: Any) -> None:
    with pytest.raises(SlothError, match="nearest: stage"):
        kind(where={"stag": "in"})
    assert kind(where={"stage": ["in", "out"]}).where == {"stage": ("in", "out")}


@pytest.mark.parametrize("kind", SPECS)
def test_specs_are_frozen_keyword_only_and_hashable(kind: Any) -> None:
    spec = kind(where={"stage": "in"})
    with pytest.raises(FrozenInstanceError):
        spec.where = None
    with pytest.raises(TypeError):
        kind(R6)
    assert hash(spec) == hash(kind(where={"stage": "in"}))


def test_a_schedule_of_ones_own_is_accepted() -> None:
    class Ramp:
        clock = "progress"

        def ratio(self, moment: Moment) -> float:
            return moment.progress

    for kind in SCHEDULED:
        assert kind(schedule=Ramp()).schedule.clock == "progress"
    Ramp.clock = "seconds"
    with pytest.raises(SlothError, match="takes a schedule: PeakDecay"):
        SlothfulAttention(schedule=Ramp())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (SlothfulAttention(), {"in": R6, "middle": None, "out": R4}),
        (SlothfulAttention(keep_middle=False), {"in": R6, "middle": R6, "out": R4}),
        (NearSightedTile(), {"in": None, "middle": None, "out": None}),
        (NearSightedAttention(), {"in": R6, "middle": R6, "out": R4}),
    ],
)
def test_reduction_of_a_stage(spec: Any, expected: dict[str, Reduction | None]) -> None:
    assert {stage: spec.reduction(stage) for stage in expected} == expected
    with pytest.raises(SlothError, match=r"stage='up' .* in, middle, out"):
        spec.reduction("up")


@pytest.mark.parametrize(
    ("low", "high", "ratio", "expected"),
    [(24, 32, 0.0, 24), (24, 32, 1.0, 32), (24, 32, 0.3, 26), (32, 33, 0.5, 32), (33, 34, 0.5, 34)],
)
def test_tile_is_interpolated_and_rounded_half_to_even(low: int, high: int, ratio: float, expected: int) -> None:
    for spec in (
        NearSightedAttention(base_tile_size=low, peak_tile_size=high),
        NearSightedTile(tile_size=low, peak_tile_size=high),
    ):
        assert spec.tile(ratio) == expected
        assert type(spec.tile(ratio)) is int


def test_global_ratio_is_interpolated() -> None:
    assert NearSightedAttention().global_ratio_at(0.25) == pytest.approx(0.2 * 0.75 + 0.8 * 0.25)
    assert NearSightedTile(global_ratio=1.0, peak_global_ratio=0.5).global_ratio_at(0.4) == pytest.approx(0.8)
    assert (NearSightedTile().tile(0.3), NearSightedTile().global_ratio_at(0.3)) == (32, 0.5)
    with pytest.raises(SlothError, match=r"ratio=2 .*from 0 to 1"):
        NearSightedAttention().tile(2)


@pytest.mark.parametrize(("max_depth", "tiled"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 4])])
def test_max_depth(max_depth: int, tiled: list[int]) -> None:
    for spec in (NearSightedTile(max_depth=max_depth), NearSightedAttention(max_depth=max_depth)):
        assert [depth for depth in (1, 2, 4, 8) if spec.tiles(depth)] == tiled


def test_defaults() -> None:
    assert Reduction(rate=6, mode="2d_avg", depth_decay=2, k_blend=0, v_blend=0, long_axis="y", border="keep") == R6
    assert SlothfulAttention().schedule == NearSightedAttention().schedule == PeakDecay(peak_time=0.4, time_decay=2)
    assert NearSightedTile().schedule == Constant()


def test_specs_do_not_import_torch() -> None:
    """With the package's own __init__ left out, which may import what it likes."""
    code = """
import sys, types
package = types.ModuleType("sloth_fx")
package.__path__ = [sys.argv[1]]
sys.modules["sloth_fx"] = package
import sloth_fx.serialize
sys.exit("torch" in sys.modules)
"""
    folder = str(Path(__file__).parent.parent / "sloth_fx")
    subprocess.run([sys.executable, "-c", code, folder], check=True)
