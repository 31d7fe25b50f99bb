"""Whole patched models in float32 against the formulas, worked out anew in float64 (`reference.py`)."""

from dataclasses import dataclass, replace
from typing import Any

import pytest

import sloth_fx
from sloth_fx import (
    Constant,
    NearSightedAttention,
    NearSightedTile,
    PeakDecay,
    Reduction,
    SlothfulAttention,
    StepDecay,
)
from tests import models, reference

BOUND = 1e-5  # of the largest value


@dataclass(frozen=True, kw_only=True)
class Case:
    """Specs for a model, at some moments: each a progress, (progress, sigma), step "i/n", or timestep "t".

    ``meaning``: the specs that the formulas are read from, where ``specs`` are made from a node's values.
    """

    name: str
    specs: Any
    model: str = "sdxl"
    size: tuple[int, int] = (13, 21)
    batch: int = 2
    moments: tuple[Any, ...] = (0.4,)
    meaning: Any = None
    halves: int = 1


def slothful(name: str, in_: dict[str, Any], out: dict[str, Any], **changes: Any) -> Case:
    fields = {key: changes.pop(key) for key in ("schedule", "keep_middle", "where") if key in changes}
    spec = SlothfulAttention(in_=Reduction(**{"rate": 6.0, **in_}), out=Reduction(**{"rate": 4.0, **out}), **fields)
    return Case(name=name, specs=spec, **changes)


POOLING = [
    slothful(
        "1d",
        {"mode": "1d_avg", "k_blend": 0.3, "v_blend": 0.8},
        {"mode": "1d_max", "k_blend": 1.0, "v_blend": 1.0, "border": "crop", "rate": 5.5},
        model="sd15",
    ),
    slothful(
        "1d-max-keep",
        {"mode": "1d_max", "k_blend": 0.25, "v_blend": 0.25},
        {"mode": "1d_avg", "border": "crop", "k_blend": 0.0, "v_blend": 1.0},
        batch=3,
    ),
    slothful(
        "2d-wide",
        {"k_blend": 1.0, "v_blend": 1.0, "long_axis": "x"},
        {"mode": "2d_max", "k_blend": 0.3, "v_blend": 0.8, "long_axis": "y", "rate": 11.0},
        size=(19, 29),
    ),
    slothful(
        "2d-crop",
        {"k_blend": 0.5, "v_blend": 0.5, "border": "crop"},
        {"mode": "2d_max", "k_blend": 1.0, "long_axis": "x", "border": "crop", "depth_decay": 0.5},
        model="ssd1b",
        size=(19, 29),
    ),
    slothful("every-nth", {"border": "crop", "rate": 10.0}, {"long_axis": "x", "rate": 3.0}, batch=1),
    slothful(
        "feature-maps",
        {"mode": "2d_max", "v_blend": 0.7},
        {"mode": "1d_avg", "k_blend": 1.0, "depth_decay": 0.0},
        model="unconditional",
        size=(16, 28),
        batch=3,
    ),
    slothful(
        "more-than-there-is", {"rate": 50.0, "depth_decay": 0.0}, {"rate": 50.0, "mode": "1d_avg", "k_blend": 1.0}
    ),
]

SCHEDULES = [
    slothful("over-time", {}, {}, moments=(0.0, 0.25, 0.7, 1.0), schedule=PeakDecay(peak_time=0.6, time_decay=3.0)),
    slothful("without-decay", {}, {}, moments=(0.0, 1.0), schedule=PeakDecay(time_decay=0.0)),
    slothful("constant", {}, {"depth_decay": 1.0}, moments=(0.9,), schedule=Constant(), model="ssd1b"),
    slothful("by-steps", {}, {}, moments=("0/5", "2/5", "4/5"), schedule=PeakDecay(peak_time=0.2, time_decay=1.5)),
    slothful("by-timesteps", {}, {}, moments=("999", "601", "20"), schedule=PeakDecay(peak_time=0.3), batch=3),
    slothful("deep-most", {"depth_decay": -1.0}, {"depth_decay": -2.0, "rate": 20.0}, model="sd15"),
    slothful("middle-too", {"depth_decay": 0.0}, {"depth_decay": 4.0}, keep_middle=False, model="sd15"),
    slothful("only-out", {}, {"depth_decay": 0.0}, where="out", model="ssd1b"),
    slothful(
        "by-sigma",
        {"depth_decay": 1.0},
        {"depth_decay": 3.0, "rate": 12.0},
        schedule=StepDecay(),
        moments=((0.0, 14.6), (0.3, 2.5), (0.9, 0.3)),
        model="sd15",
        size=(19, 29),
    ),
    slothful(
        "by-sigma-deep-most",
        {"depth_decay": -1.0, "rate": 9.0},
        {"depth_decay": -2.0, "rate": 20.0},
        schedule=StepDecay(time_decay=0.5),
        moments=((0.2, 6.0),),
        size=(19, 29),
    ),
    slothful(
        "sigma-of-timesteps",
        {"depth_decay": 1.0},
        {"depth_decay": 0.0},
        schedule=StepDecay(time_decay=1.5),
        moments=("999", "640", "3/10"),
    ),
    slothful(
        "sigma-of-another-model",
        {"depth_decay": 1.0},
        {"depth_decay": 0.0},
        schedule=StepDecay(time_decay=1.5),
        moments=("700",),
        model="unconditional",
        size=(16, 28),
    ),
]

TILE = NearSightedTile(tile_size=5)
LOCAL = NearSightedAttention(base_tile_size=6, peak_tile_size=8)
TILED = [
    Case(name="tiles", specs=TILE, model="sd15"),
    Case(name="tiles-alone", specs=replace(TILE, global_ratio=0.0, max_depth=3), batch=3),
    Case(name="many-samples", specs=replace(TILE, global_ratio=2.0, long_axis="y", max_depth=8), model="ssd1b"),
    Case(name="samples-1d", specs=replace(TILE, mode="1d", tile_size=7), size=(19, 29)),
    Case(
        name="tiles-over-time",
        specs=replace(TILE, peak_tile_size=9, peak_global_ratio=1.5, schedule=PeakDecay()),
        moments=(0.0, "450"),
        model="unconditional",
        size=(16, 28),
    ),
    Case(name="shallow-only", specs=replace(TILE, max_depth=1), model="sd15"),
    Case(name="near-sighted", specs=LOCAL, model="sd15", moments=(0.4, 0.0)),
    Case(
        name="near-sighted-modes",
        specs=replace(
            LOCAL,
            in_=Reduction(rate=5.0, mode="2d_max", k_blend=0.3, v_blend=0.8, long_axis="x", border="crop"),
            out=Reduction(rate=4.0, mode="1d_avg", k_blend=1.0, v_blend=0.5, depth_decay=0.0),
        ),
        size=(19, 29),
    ),
    Case(
        name="near-sighted-windows",
        specs=replace(
            LOCAL,
            peak_global_ratio=2.0,
            max_depth=3,
            in_=Reduction(rate=6.0, k_blend=1.0, v_blend=1.0),
            out=Reduction(rate=3.0, mode="2d_max", k_blend=1.0, v_blend=0.2),
        ),
        model="ssd1b",
        size=(19, 29),
        batch=1,
    ),
    Case(
        name="near-sighted-1d",
        specs=replace(
            LOCAL,
            in_=Reduction(rate=3.0, mode="1d_max", k_blend=1.0, v_blend=1.0, border="crop"),
            out=Reduction(rate=6.0, mode="1d_avg", k_blend=0.4, v_blend=0.4),
        ),
        moments=("3/8",),
        model="unconditional",
        size=(16, 28),
    ),
    Case(
        name="windows-larger-than-tiles",
        specs=replace(
            LOCAL, base_tile_size=4, peak_tile_size=4, in_=Reduction(rate=45.0, k_blend=1.0, v_blend=1.0), max_depth=3
        ),
    ),
]

TOGETHER = [
    Case(name="images-share-tiles", specs=replace(TILE, concat_local=True), batch=3),
    Case(name="images-share-samples", specs=replace(LOCAL, concat_global=True), batch=4, halves=2),
    Case(name="images-share-all", specs=replace(LOCAL, concat_local=True, concat_global=True), batch=4, halves=2),
    Case(
        name="images-share-untiled",
        specs=replace(LOCAL, concat_local=True, concat_global=True, base_tile_size=64, peak_tile_size=64),
    ),
    Case(name="pooled-tiles", specs=[SlothfulAttention(), TILE], model="sd15", moments=(0.4, 1.0)),
    Case(
        name="pooled-tiles-1d",
        specs=[
            NearSightedTile(tile_size=6, long_axis="y", max_depth=3),
            SlothfulAttention(in_=Reduction(rate=4.0, mode="1d_avg", k_blend=1.0, border="crop"), where="in"),
        ],
        size=(19, 29),
    ),
    Case(
        name="side-by-side",
        specs=[replace(LOCAL, where="in"), SlothfulAttention(where="out"), replace(TILE, where="mid*", max_depth=3)],
        batch=1,
    ),
]

# The nodes' parameters, and what the formulas make of them.
OLD = {"long_axis": "x", "border": "crop"}
NEW = {"border": "crop"}
NODES = [
    Case(
        name="node-2023-12-11",
        specs=SlothfulAttention.from_node(
            release="2023-12-11",
            time_decay=0.5,
            keep_middle=False,
            in_mode="2D_MAX",
            in_depth_decay=1.5,
            in_strength=8.0,
            in_k_blend=0.5,
            out_mode="1D_AVG",
            out_depth_decay=-1.0,
            out_strength=10.0,
            out_v_blend=1.0,
        ),
        meaning=SlothfulAttention(
            in_=Reduction(rate=8.0, mode="2d_max", depth_decay=1.5, k_blend=0.5, **OLD),
            out=Reduction(rate=10.0, mode="1d_avg", depth_decay=-1.0, v_blend=1.0, **OLD),
            schedule=StepDecay(time_decay=0.5),
            keep_middle=False,
        ),
        moments=((0.0, 10.0), "600"),
        model="sd15",
    ),
    Case(
        name="node-2023-12-11-defaults",
        specs=SlothfulAttention.from_node(release="2023-12-11"),
        meaning=SlothfulAttention(
            in_=Reduction(rate=6.0, depth_decay=1.0, **OLD),
            out=Reduction(rate=4.0, depth_decay=1.0, **OLD),
            schedule=StepDecay(time_decay=1.0),
        ),
        moments=("999",),
        size=(19, 29),
    ),
    Case(
        name="node-2023-12-11-simple",
        specs=SlothfulAttention.from_node(release="2023-12-11", depth_decay=2.0, in_blend=1.0, out_blend=0.5),
        meaning=SlothfulAttention(
            in_=Reduction(rate=6.0, depth_decay=2.0, k_blend=1.0, v_blend=1.0, **OLD),
            out=Reduction(rate=4.0, depth_decay=2.0, k_blend=0.5, v_blend=0.5, **OLD),
            schedule=StepDecay(time_decay=1.0),
        ),
        moments=((0.0, 20.0),),
    ),
    Case(
        name="node-2023-12-16",
        specs=SlothfulAttention.from_node(
            peak_time=0.2, time_decay=1.0, in_slothful=7.0, in_k_blend=1.0, in_v_blend=1.0, out_mode="1D_MAX"
        ),
        meaning=SlothfulAttention(
            in_=Reduction(rate=7.0, depth_decay=2.0, k_blend=1.0, v_blend=1.0, **NEW),
            out=Reduction(rate=4.0, mode="1d_max", depth_decay=2.0, **NEW),
            schedule=PeakDecay(peak_time=0.2, time_decay=1.0),
        ),
        moments=("700",),
        model="sd15",
        size=(19, 29),
    ),
    Case(
        name="node-later",
        specs=SlothfulAttention.from_node(release="later", out_k_blend=0.5),
        meaning=SlothfulAttention(
            in_=Reduction(rate=6.0, depth_decay=2.0, border="keep"),
            out=Reduction(rate=4.0, depth_decay=2.0, k_blend=0.5, border="crop"),
            schedule=PeakDecay(peak_time=0.4, time_decay=2.0),
        ),
        moments=(0.4,),
    ),
    # The sizes below are such that the nodes pad nothing.
    Case(
        name="node-tile",
        specs=NearSightedTile.from_node(tile_size=16, global_ratio=0.6, tiling_max_depth=2),
        meaning=NearSightedTile(tile_size=16, global_ratio=0.6, max_depth=2, mode="2d", long_axis="x"),
        model="sd15",
        size=(20, 34),
    ),
    Case(
        name="node-tile-later",
        specs=NearSightedTile.from_node(release="later", base_tile_size=16, peak_tile_size=18, concat_global=True),
        meaning=NearSightedTile(
            tile_size=16,
            peak_tile_size=18,
            global_ratio=1.0,
            peak_global_ratio=0.5,
            mode="1d",
            concat_global=True,
            schedule=PeakDecay(peak_time=0.3, time_decay=2.0),
        ),
        moments=("900",),
        size=(40, 68),
    ),
    Case(
        name="node-near-sighted",
        specs=NearSightedAttention.from_node(base_tile_size=16, peak_tile_size=20, in_v_blend=0.5, out_slothful=3.0),
        meaning=NearSightedAttention(
            base_tile_size=16,
            peak_tile_size=20,
            base_global_ratio=0.2,
            peak_global_ratio=0.8,
            max_depth=2,
            in_=Reduction(rate=6.0, depth_decay=2.0, v_blend=0.5, **NEW),
            out=Reduction(rate=3.0, depth_decay=2.0, **NEW),
            schedule=PeakDecay(peak_time=0.4, time_decay=2.0),
        ),
        moments=(0.4,),
        model="sd15",
        size=(24, 36),
    ),
    Case(
        name="node-near-sighted-simple",
        specs=NearSightedAttention.from_node(slothful=5.0, in_blend=1.0, base_tile_size=16, peak_tile_size=16),
        meaning=NearSightedAttention(
            base_tile_size=16,
            peak_tile_size=16,
            in_=Reduction(rate=5.0, depth_decay=1.5, k_blend=1.0, v_blend=1.0, **NEW),
            out=Reduction(rate=5.0, depth_decay=1.5, **NEW),
        ),
        moments=("1/2",),
        model="sd15",
        size=(20, 34),
    ),
    Case(
        name="node-near-sighted-later",
        specs=NearSightedAttention.from_node(
            release="later", slothful=6.0, base_tile_size=16, peak_tile_size=16, concat_local=True, out_blend=0.2
        ),
        meaning=NearSightedAttention(
            base_tile_size=16,
            peak_tile_size=16,
            base_global_ratio=1.0,
            peak_global_ratio=0.5,
            in_=Reduction(rate=6.0, depth_decay=2.0, border="keep"),
            out=Reduction(rate=6.0, depth_decay=2.0, k_blend=0.2, v_blend=0.2, border="crop"),
            concat_local=True,
        ),
        moments=("500",),
        size=(40, 68),
    ),
]

CASES = [*POOLING, *SCHEDULES, *TILED, *TOGETHER, *NODES]


def listed(specs: Any) -> list[Any]:
    return list(specs) if isinstance(specs, list) else [specs]


def moment_of(
    context: sloth_fx.TimestepContext, moment: Any, noise: dict[str, float]
) -> tuple[float, float | None, int]:
    """Drives the context there, or leaves it to the timestep; (progress, sigma, timestep for the call)."""
    if isinstance(moment, tuple):
        context.at(*moment)
        return (*moment, 500)
    if isinstance(moment, float):
        context.at(moment)
        return moment, reference.sigma_at(1000 * (1 - moment), **noise), 500
    if "/" in moment:
        i, n = map(int, moment.split("/"))
        context.step(i, n)
        return i / n, reference.sigma_at(1000 * (1 - i / n), **noise), 500
    context.auto()
    timestep = int(moment)
    return 1 - timestep / 1000, reference.sigma_at(timestep, **noise), timestep


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_patched_model_follows_the_formulas(case):
    model = models.shared(case.model)
    noise = {"beta_start": 0.0001, "beta_end": 0.02, "power": 1.0} if case.model == "unconditional" else {}
    patched = sloth_fx.transform(model, case.specs)
    context = sloth_fx.context(patched)
    context.halves = case.halves
    effects = []
    for moment in case.moments:
        progress, sigma, timestep = moment_of(context, moment, noise)
        values = models.inputs(model, case.batch, *case.size, timestep=timestep)
        out = models.run(patched, values)
        assert context.progress == pytest.approx(progress)
        meaning = listed(case.meaning or case.specs)
        expected = reference.predict(model, meaning, values, progress=progress, sigma=sigma, halves=case.halves)
        scale = expected.abs().max()
        assert (out - expected).abs().max() <= BOUND * scale, moment
        effects.append((models.run(model, values) - expected).abs().max() / scale)
    assert max(effects) > 0.02, "this case cannot tell the patched model from the plain one"


def test_the_reference_without_specs_is_the_model():
    for name in models.MODELS:
        values = models.inputs(models.shared(name), 2, 16, 28)
        expected = reference.predict(models.shared(name), [], values, progress=0.4)
        plain = models.run(models.shared(name), values)
        assert (plain - expected).abs().max() <= BOUND * expected.abs().max()


def test_phases_give_the_middle_of_each():
    model = models.shared("ssd1b")
    spec = SlothfulAttention(schedule=PeakDecay(peak_time=0.1, time_decay=3.0))
    patched = sloth_fx.transform(model, spec, phases=4)
    values = models.inputs(model)
    for progress, middle in ((0.0, 0.125), (0.3, 0.375), (0.74, 0.625), (1.0, 0.875)):
        sloth_fx.context(patched).at(progress)
        expected = reference.predict(model, [spec], values, progress=middle)
        assert (models.run(patched, values) - expected).abs().max() <= BOUND * expected.abs().max()


def test_random_padding_shifts_the_tiles_and_nothing_else():
    """Which shift it is depends on seed and time alone; each gives what the formulas give for it."""
    model = models.shared("ssd1b")
    spec = NearSightedTile(tile_size=5, max_depth=2, pad="random", where="down_blocks.1.*")  # one site, of 7 x 11
    values = models.inputs(model)
    pads = [(rows, columns) for rows in (0, 1) for columns in (0, 1)]  # 7 = 4 + 4 - 1, 11 = 4 + 4 + 4 - 1
    known = {pad: reference.predict(model, [spec], values, progress=0.4, pad=pad) for pad in pads}

    def pads_of(patched, progress):
        sloth_fx.context(patched).at(progress)
        out = models.run(patched, values)
        return [pad for pad in pads if (out - known[pad]).abs().max() <= BOUND * out.abs().max()]

    patched = sloth_fx.transform(model, spec)
    seen = [pads_of(patched, i / 12) for i in range(12)]
    assert all(len(each) == 1 for each in seen)
    assert len({each[0] for each in seen}) > 1
    assert seen == [pads_of(patched, i / 12) for i in range(12)]
    other = sloth_fx.transform(model, replace(spec, seed=1))
    assert seen != [pads_of(other, i / 12) for i in range(12)]
