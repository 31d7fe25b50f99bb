"""What is said of guidance by perturbed attention is so, and backgrounds are what they are taken for."""

import math
import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # scripts, which import each other by name

import backgrounds as reader
import evaluate
import perturbed_plots
import perturbed_quality
import perturbed_report
import scenes
from backgrounds import backgrounds, promised
from perturbed_points import BASE, MIDDLE_SAG, SERIES, settings, tiers
from perturbed_results import Result, gather, moved
from quality_points import UNPATCHED
from quality_statistics import Estimate, Reference
from quality_store import Batch, Conditions, Store

import sloth_fx
from sloth_fx.locate import survey
from sloth_fx.model_adapters import adapter_for, trial_call
from sloth_fx.planner import make_plan

# Backgrounds


def drawn(count, seed=0):
    random = np.random.default_rng(seed)
    return [scenes.random_scene(random) for _ in range(count)]


def test_what_is_looked_at_no_thing_can_reach():
    corners = [
        replace(thing, centre=(x + across, y + down), radius=13.0, shape=shape, fill=fill)
        for thing in drawn(1)[0].things
        for x, y in [scenes.PLACES[thing.place]]
        for across, down in ((-3, -3), (3, 3), (3, -3), (-3, 3))
        for shape in scenes.SHAPES
        for fill in scenes.FILLS
    ]
    largest = [replace(scene, things=(thing,)) for scene in drawn(1) for thing in corners]
    for scene in drawn(100) + largest:
        free = reader._free(tuple(thing.place for thing in scene.things))
        assert free.sum() > 1500
        assert np.array_equal(scenes.draw(scene)[free], scenes.draw(replace(scene, things=()))[free])


def test_backgrounds_of_renderings_are_right_and_others_are_not():
    shown = drawn(24, seed=1)
    captions = [scenes.full_caption(scene) for scene in shown]
    pixels = np.stack([scenes.draw(scene) for scene in shown])
    assert [promised(each) for each in captions] == [(scene.background, scene.texture) for scene in shown]
    found = backgrounds(pixels, captions)
    assert found[:, 0].all()
    assert found[:, 1].max() < 6  # dots lie between two phases
    assert np.median(found[:, 1]) < 0.1
    for change in ({"background": "brown"}, {"texture": "dotted"}):
        others = [replace(scene, **change) for scene in shown]
        differ = np.array([new != old for new, old in zip(others, shown, strict=True)])
        wrong = backgrounds(np.stack([scenes.draw(scene) for scene in others]), captions)
        assert not wrong[differ, 0].any()
        assert (wrong[differ, 1] > found[differ, 1] + 4).all()


def test_the_fault_is_the_distance_to_the_nearest_allowed():
    random = np.random.default_rng(2)
    scene = replace(drawn(1)[0], texture="striped")
    noisy = np.clip(scenes.draw(scene) + random.normal(0, 9, (64, 64, 3)), 0, 255).astype(np.uint8)
    ((right, fault),) = backgrounds(noisy[None], [scenes.full_caption(scene)])
    free = np.ones((64, 64), bool)
    for thing in scene.things:
        x, y = scenes.PLACES[thing.place]
        free[max(0, y - 17) : y + 18, max(0, x - 17) : x + 18] = False
    empty = [replace(scene, things=(), phase=(step / 16, 0.0)) for step in range(16)]
    distances = [((noisy.astype(float) - scenes.draw(each))[free] ** 2).mean() for each in empty]
    assert right == 1
    assert fault == pytest.approx(math.sqrt(min(distances)), rel=1e-3)


# Points


@pytest.mark.parametrize("name", list(SERIES))
def test_every_point_acts_in_its_own_way(lab, name):
    pipe = lab[1][name]
    model = pipe.unet if name == "lab-unet" else pipe.transformer
    adapter = adapter_for(model)
    sites = survey(model, adapter, trial_call(model, adapter)).sites
    points = [point for tier in tiers(name) for point in tier]
    assert len({point.name for point in points}) == len(points)
    for series in SERIES[name]:
        if series.operator != "SLG":  # which acts on blocks; a block that is not there is an error
            plans = [make_plan([point.spec], sites) for _, point in settings(series)]
            (spoilt,) = {tuple(each.site.path for each in plan.sites if each.perturbing) for plan in plans}
            assert spoilt
        assert [point.spec.scale for _, point in settings(series)] == [float(label) for label, _ in series.settings]


def test_the_unpatched_model_comes_first_whatever_is_chosen():
    everything = perturbed_quality.wanted("lab-unet", None)
    assert everything[0][0] is UNPATCHED
    assert [*everything[0][1:], *chain(*everything[1:])] == list(chain(*tiers("lab-unet")))
    (slg,) = perturbed_quality.wanted("lab-unet", ["slg-block-1"])
    assert slg[0] is UNPATCHED
    assert {type(point.spec) for point in slg[1:]} == {sloth_fx.SLG}
    with pytest.raises(SystemExit, match="no point has 'sagg'"):
        perturbed_quality.wanted("lab-unet", ["sagg"])


# Results


def stored(tmp_path, guidance=1.0, leave=()):
    """Two batches of 4 of all points of lab-unet. The stronger, the fewer things are right; SAG brightens images by 8
    levels times its scale up to 1.5, and no further."""
    captions = evaluate.prompts(8)
    random = np.random.default_rng(evaluate.HELD_OUT)
    pictures = np.stack([scenes.draw(scenes.random_scene(random)) for _ in range(8)]) // 2 + 60
    assert len(captions) == 8
    store = Store(tmp_path, Conditions("weights", guidance=guidance, batch=4))
    for point in (UNPATCHED, *(point for tier in tiers("lab-unet") for point in tier)):
        scale = 0.0 if point.spec is None else point.spec.scale
        for batch in range(1 if point.name in leave else 2):
            rows = np.random.default_rng([batch, 7]).normal(scale, 1, (4, 5))
            measures = np.zeros((4, 6))
            measures[:, 0] = np.arange(4) >= scale
            shown = pictures[4 * batch : 4 * batch + 4] + np.uint8(8 * min(scale, 1.5))
            store.save(point, batch, Batch(rows.astype(np.float32), measures, 1.0, shown, "a machine"))
    return store


REAL = Reference(np.random.default_rng(3).normal(0, 1, (60, 5)))


def test_results(tmp_path):
    store = stored(tmp_path)
    sheet = gather("lab-unet", store, 2, REAL)
    at = dict(sheet.of(MIDDLE_SAG))
    assert sheet.machine == "a machine"
    assert sheet.unfinished == []
    assert list(at) == ["0.25", "0.5", "0.75", "1", "1.5", "3"]
    assert at["1"].value("moved").value == pytest.approx(8)
    assert at["3"].each["moved"] == pytest.approx(12)
    things = at["1"].value("things")
    assert (things.value, things.low, things.high) == (0.75, *evaluate.interval(6, 8))
    assert (at["1"].each["all"] == at["1"].each["things"] * at["1"].each["background"]).all()
    assert moved([sheet.base], [at["1"]], "things").value == pytest.approx(-0.25)
    shown = np.concatenate([batch.features for batch in store.load(dict(settings(MIDDLE_SAG))["3"], range(2))])
    assert at["3"].value("Frechet").value == pytest.approx(REAL.distance(shown))


def test_changes_are_between_the_means_of_points(tmp_path):
    at = dict(gather("lab-unet", stored(tmp_path), 2, REAL).of(MIDDLE_SAG))
    before, after = ([at[label] for label in labels] for labels in (("0.5", "1.5"), ("1", "3")))
    found = moved(before, after, "Frechet")
    changes = (after[0].without + after[1].without - before[0].without - before[1].without) / 2
    assert found.value == pytest.approx(sum(each.frechet for each in after) / 2 - sum(e.frechet for e in before) / 2)
    assert found.high - found.value == pytest.approx(1.96 * math.sqrt((len(changes) - 1) * changes.var()))
    assert moved(before, after, "moved").value == pytest.approx((8 + 12) / 2 - (4 + 12) / 2)


def test_what_was_stopped_in_a_lap_is_of_whole_laps(tmp_path):
    sheet = gather("lab-unet", stored(tmp_path, leave=["pag-in-the-middle-scale-3"]), 2, REAL)
    assert len(sheet.base.images) == 4
    assert sheet.unfinished == []


def test_what_is_not_finished_is_left_out(tmp_path):
    late = [point.name for point in tiers("lab-unet")[1]]
    store = stored(tmp_path)
    for point in tiers("lab-unet")[1]:
        for batch in range(2):
            store.path(point, batch).unlink()
    sheet = gather("lab-unet", store, 2, REAL)
    assert sheet.unfinished == late
    assert len(sheet.base.images) == 8
    assert sheet.of(SERIES["lab-unet"][1]) == []
    assert gather("lab-unet", Store(tmp_path, Conditions("others")), 2, REAL) is None


def of(**each):
    count = 40
    arrays = {name: np.broadcast_to(np.asarray(value, float), count) for name, value in each.items()}
    return Result(
        {**arrays, "all": arrays["background"]}, 3.0 - arrays["background"].mean(), np.full(20, 3.0), np.zeros(0)
    )


def test_claims():
    flags = np.arange(40) % 4 > 0
    none = of(background=flags, fault=9, moved=0)
    good = of(background=1, fault=3, moved=5)
    same = {label: good for label, _ in MIDDLE_SAG.settings}
    saturated = {BASE: none, **same}
    assert [claim.answer for claim in perturbed_report._repairs(saturated)] == ["yes", "yes"]
    assert perturbed_report._saturates(saturated).answer == "yes"
    none_better, _, more_better, _ = perturbed_report._is_good(saturated)
    assert (none_better.answer, more_better.answer) == ("yes", "no")
    straight = {**saturated, "3": of(background=flags, fault=9, moved=10)}
    assert perturbed_report._saturates(straight).answer == "no"
    assert perturbed_report._is_good(straight)[2].answer == "yes"
    harmful = dict.fromkeys(same, none) | {BASE: good}
    assert [claim.answer for claim in perturbed_report._repairs(harmful)] == ["no, the opposite"] * 2


def test_the_ratio_of_means_has_the_interval_of_its_linearisation():
    random = np.random.default_rng(5)
    below = random.normal(10, 2, 500)
    above = 0.9 * below + random.normal(0, 0.5, 500)
    found = perturbed_report.ratio(above, below)
    deviation = (above - found.value * below).std() / below.mean() / math.sqrt(500)
    assert found.value == pytest.approx(above.mean() / below.mean())
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * deviation, rel=0.15)


def test_an_estimate_may_be_scaled():
    assert 100 * Estimate(0.5, 0.25, 0.75) == Estimate(50, 25, 75)


# The page


@pytest.fixture
def few(monkeypatch):
    """Of lab-unet only some series."""
    chosen = SERIES["lab-unet"]
    monkeypatch.setitem(SERIES, "lab-unet", (chosen[0], chosen[3], chosen[-1]))


def test_tables_and_pictures(few, tmp_path):
    late = tiers("lab-unet")[-1][0].name
    sheets = {
        guidance: gather(
            "lab-unet", stored(tmp_path / str(guidance), guidance, [late] if guidance == 4 else []), 2, REAL
        )
        for guidance in (1.0, 4.0)
    }
    text = perturbed_report.text("lab-unet", sheets)
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("|")]
    assert sum(row[2] == "SAG" and row[4] == "0.75" for row in rows) == 2  # with and without
    assert sum(row[1] == "its effect saturates near 1.5" for row in rows) == 2
    assert "a machine; 20 steps." in text
    perturbed_plots.curves("lab-unet", sheets, tmp_path / "curves.png")
    perturbed_plots.images("lab-unet", sheets[1.0], tmp_path / "images.png")
    for name in ("curves.png", "images.png"):
        with Image.open(tmp_path / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 5


def test_a_run_goes_on_and_writes_its_page(lab, few, tmp_path, monkeypatch):
    folder, pipes = lab
    monkeypatch.setattr(perturbed_quality, "LAB", folder)
    monkeypatch.setattr(perturbed_quality, "require", lambda *names: None)
    monkeypatch.setattr(
        perturbed_quality, "renderings", lambda judge, out: np.random.default_rng(0).normal(size=(400, 160))
    )
    loads = []
    monkeypatch.setattr(perturbed_quality, "pipeline", lambda model, device: loads.append(model) or pipes[model])
    page = tmp_path / "page.md"
    page.write_text("<!-- begin quality lab-unet -->\n<!-- end quality lab-unet -->\n")
    asked = f"--models lab-unet --steps 2 --images 4 --batch 2 --out {tmp_path / 'out'} --page {page} --device cpu"
    grad = torch.is_grad_enabled()
    for extra in ("--points slg-block-1-scale-5", "--report"):
        monkeypatch.setattr(sys, "argv", ["perturbed_quality.py", *asked.split(), *extra.split()])
        perturbed_quality.main()
    torch.set_grad_enabled(grad)
    assert loads == ["lab-unet"]
    assert "| SLG " in page.read_text()
    kept = sorted(path.parent.name.rsplit("-", 1)[0] for path in (tmp_path / "out").rglob("*.npz"))
    assert kept == ["slg-block-1-scale-5"] * 4 + ["unpatched"] * 4  # two batches each, with and without guidance
    with np.load(next((tmp_path / "out").rglob("*.npz"))) as batch:
        assert batch["thumbnails"].shape == (2, 64, 64, 3)
