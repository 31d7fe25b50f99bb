"""What is said of images is so, and what has been made is not made again."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # scripts, which import each other by name

import evaluate
import models
import quality
import quality_plots
import quality_report
import scenes
from quality_measures import MEASURES, measured, properties
from quality_points import CLAIMS, OTHER_SEEDS, SERIES, STRENGTHS, UNPATCHED, Point, points
from quality_statistics import Estimate, Reference, breaks_at, change, harmless_until, jackknife, verdict
from quality_store import Batch, Conditions, Painter, Store, digest, missing

import sloth_fx
from sloth_fx.cli.judge import frechet
from sloth_fx.locate import survey
from sloth_fx.model_adapters import adapter_for, trial_call
from sloth_fx.planner import make_plan

MANY = points()


# Points


@pytest.mark.parametrize("name", ["lab-unet", "lab-dit"])
def test_every_point_acts_on_both_models_and_each_in_its_own_way(lab, name):
    pipe = lab[1][name]
    model = pipe.unet if name == "lab-unet" else pipe.transformer
    adapter = adapter_for(model)
    sites = survey(model, adapter, trial_call(model, adapter)).sites
    moments = [sloth_fx.Moment(progress / 8, sigma=1.0) for progress in range(8)]
    for series in SERIES:
        plans = [make_plan([spec], sites) for _, spec in series.settings]
        keys = [
            sum(site.layout(now, sloth_fx.LatentSize(1, 16, 16)).kv_tokens() for site in plan.sites for now in moments)
            for plan in plans
        ]
        assert len({repr(plan) for plan in plans}) == len(plans)
        if series not in STRENGTHS or series.operator == "TokenMerging":  # which merges by what it sees
            continue
        # Tiles of HyperTile are whole divisions, of which 8 x 8 tokens have few, or are chosen by chance.
        assert len(set(keys)) == len(keys) or series.operator == "HyperTile", (series.title, keys)


def test_points_have_names_of_their_own_and_claims_their_points():
    assert len({each.name for each in MANY.values()}) == len(MANY) > 40
    assert {spec for claim in CLAIMS for _, spec in claim.ends} <= set(MANY)
    assert {claim.measure for claim in CLAIMS} <= set(MEASURES)
    chosen = quality.chosen(["tokendown", "rate-8"])
    assert chosen[:2] == [UNPATCHED, OTHER_SEEDS]
    assert {each.name for each in chosen[2:]} >= {"slothfulattention-rate-8", "tokendownsample-factor-8"}
    assert all("tokendown" in each.name or "rate-8" in each.name for each in chosen[2:])
    with pytest.raises(SystemExit, match="no point has 'sloht'"):
        quality.chosen(["sloht"])


# Measures


def test_properties_of_pictures_that_are_known():
    flat = np.full((1, 20, 31, 3), 90, np.uint8)
    ramp = np.broadcast_to(np.arange(31, dtype=np.uint8)[:, None] * 4, (1, 20, 31, 3))
    halves = flat.copy()
    halves[:, :, 15:] = 190
    (nothing,), (slope,), (edge,) = (properties(each) for each in (flat, ramp, halves))
    assert nothing == pytest.approx([0, 0, 0, 0], abs=1e-9)
    assert slope[1:] == pytest.approx([4, 0, 4 * np.sqrt(2 / 3)], abs=1e-9)
    assert edge == pytest.approx([100 * np.sqrt(15 * 16) / 31, 50, 2 * 100 / 29, 0], abs=1e-9)


def test_noise_is_told_from_texture():
    random = np.random.default_rng(1)
    clean = np.stack([scenes.draw(scenes.random_scene(random)) for _ in range(40)])
    noise = [0.0, 2.0, 4.0]
    noisy = [np.clip(clean + random.normal(0, each, clean.shape), 0, 255).round().astype(np.uint8) for each in noise]
    found = [np.median(properties(each)[:, MEASURES.index("noise") - 2]) for each in noisy]
    assert found[0] == 0
    assert found[2] == pytest.approx(2 * found[1], rel=0.15)
    soft = (clean[:, 1:, 1:] // 2 + clean[:, :-1, :-1] // 2).astype(np.uint8)
    assert (properties(soft)[:, 1:3].mean(0) < properties(clean)[:, 1:3].mean(0)).all()


def test_what_is_right_is_what_the_judge_says(judge):
    texts, images = map(list, zip(*evaluate.renderings(7), strict=True))
    found = measured(images, texts, judge)
    assert found.shape == (7, len(MEASURES))
    assert found[:, 0].tolist() == judge.right(images, texts).tolist()
    # The random judge sees about half of its labels in anything, and few of these were promised.
    assert (found[:, 1] > 30).all()


# Statistics


def test_an_interval_of_a_change_is_that_of_the_paired_differences():
    random = np.random.default_rng(2)
    prompt = random.normal(0, 10, 400)
    before, after = prompt + random.normal(0, 1, 400), prompt + random.normal(0.5, 1, 400)
    found = change(before, after)
    deviation = (after - before).std(ddof=1) / 20
    assert found.value == pytest.approx((after - before).mean())
    assert (found.low, found.high) == pytest.approx(
        (found.value - 1.96 * deviation, found.value + 1.96 * deviation), abs=0.02
    )
    assert change(before, after) == found
    assert change(after, before).value == pytest.approx(-found.value)


def test_the_frechet_distance_is_the_judges():
    random = np.random.default_rng(3)
    a, b = random.normal(size=(90, 7)) @ random.normal(size=(7, 7)), random.normal(0.4, 1, (61, 7))
    assert Reference(a).distance(b) == pytest.approx(frechet(a, b), rel=1e-9)
    assert Reference(a).distance(a) == pytest.approx(0, abs=1e-9)
    without = Reference(a).without(b)
    assert len(without) == 50
    assert without[3] == pytest.approx(frechet(a, np.delete(b, [3, 53], axis=0)), rel=1e-9)


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(4).normal(size=37)
    without = np.array([np.delete(values, index).mean() for index in range(37)])
    found = jackknife(float(values.mean()), without)
    assert found.high - found.value == pytest.approx(1.96 * values.std(ddof=1) / np.sqrt(37))
    assert found.value - found.low == pytest.approx(found.high - found.value)


def lost(*points):
    return [Estimate(-each / 100, -each / 100 - 0.015, -each / 100 + 0.015) for each in points]


@pytest.mark.parametrize(
    ("changes", "safe", "broken"),
    [
        (lost(0, 1, 3, 12), 2, 3),
        (lost(0, 1, 1.4, 10), 3, None),
        (lost(1.9, 0), 0, None),  # the interval of the first does not reach 0
        ([Estimate(-0.03, -0.08, 0.02)], 0, None),  # its value is too low
        (lost(0, 11, 0, 40), 1, 1),  # what comes after a loss is not harmless
        (lost(-30, -1), 2, None),
        (lost(), 0, None),
    ],
)
def test_regions(changes, safe, broken):
    assert (harmless_until(changes), breaks_at(changes)) == (safe, broken)


@pytest.mark.parametrize(
    ("moved", "direction", "answer"),
    [
        ((-2, -3, -1), -1, "yes"),
        ((-2, -3, -1), 1, "no, the opposite"),
        ((2, 1, 3), 1, "yes"),
        ((0.1, -0.3, 0.5), 1, "no"),
        ((0.1, -0.3, 0.5), -1, "no"),
        ((0.1, -3, 3.2), 1, "not measurable here"),
        ((1, -5, 0.5), -1, "not measurable here"),
        ((1, -0.5, 5), -1, "no"),
    ],
)
def test_verdicts(moved, direction, answer):
    assert verdict(Estimate(*moved), direction, before=100.0) == answer


# What is stored


def test_what_has_been_made_is_not_made_again(lab, judge, tmp_path):
    conditions = Conditions("weights", steps=2, batch=2)
    store = Store(tmp_path, conditions)
    spec = sloth_fx.TokenDownsample(factors=(4,))
    chosen = [UNPATCHED, OTHER_SEEDS, Point("thin", spec)]
    pipe = lab[1]["lab-unet"]
    with torch.no_grad():
        quality.fill(store, Painter(pipe, judge, conditions, "a machine"), missing(store, chosen, 1), "m", 3)
    assert missing(store, chosen, 1) == []
    assert missing(store, chosen, 2) == [(chosen[1], 1), (chosen[2], 1), (chosen[0], 1)]  # another one begins
    assert missing(store, [Point("thin", replace(spec, factors=(3,)))], 1)
    for other in ({"weights": "w"}, {"steps": 3}, {"guidance": 1.0}, {"batch": 3}, {"device": "cuda"}, {"form": 2}):
        assert len(missing(Store(tmp_path, replace(conditions, **other)), chosen, 1)) == 3
    plain, others, thin = (store.load(point, [0])[0] for point in chosen)
    assert plain.machine == "a machine"
    assert plain.seconds > 0
    assert plain.features.shape == (2, 160)
    assert not np.array_equal(plain.features, others.features)
    assert not np.array_equal(plain.features, thin.features)
    expected = evaluate.paint(pipe, evaluate.prompts(2), num_inference_steps=2, guidance_scale=4.0)
    assert np.abs(plain.thumbnails.astype(int) - np.stack([np.asarray(each) for each in expected])).max() <= 1


def test_what_was_not_finished_is_not_there(tmp_path):
    store = Store(tmp_path, Conditions("weights"))
    path = store.path(UNPATCHED, 0)
    path.parent.mkdir(parents=True)
    path.with_suffix(".new").write_bytes(b"half")
    assert not store.has(UNPATCHED, 0)


@pytest.mark.parametrize("name", ["lab-unet", "lab-dit"])
def test_points_take_turns_over_the_same_weights(lab, judge, name):
    pipe = lab[1][name]
    before = dict(pipe.components)
    painter = Painter(pipe, judge, Conditions("weights", steps=1, batch=1))
    point = MANY[SERIES[0].settings[-1][1]]
    with torch.no_grad():
        first, patched, again = (painter.batch(each, 1) for each in (UNPATCHED, point, UNPATCHED))
    assert np.array_equal(first.features, again.features)
    assert not np.array_equal(first.features, patched.features)
    assert first.thumbnails.shape == (0, 64, 64, 3)
    assert all(pipe.components[part] is before[part] for part in before)


def test_pipelines_are_loaded_in_full_precision(lab, monkeypatch, tmp_path):
    pipe = lab[1]["lab-dit"]
    pipe.save_pretrained(tmp_path / "lab-dit")
    monkeypatch.setattr(quality, "LAB", tmp_path)
    loaded = quality.pipeline("lab-dit", torch.device("cpu"))
    assert loaded.transformer.dtype == torch.float32
    assert torch.equal(loaded.transformer.pos_embed.proj.weight, pipe.transformer.pos_embed.proj.weight)


def test_weights_have_a_digest(lab, tmp_path):
    judge = lab[0] / "judge"
    found = digest(judge)
    assert found == digest(judge) != digest(judge, judge)
    changed = tmp_path / "judge"
    torch.manual_seed(1)
    models.judge().save_pretrained(changed)
    assert digest(changed) != found


# The report


def painted(rights, shade, batch, seconds):
    count = len(rights)
    random = np.random.default_rng([batch, round(shade)])
    measures = np.column_stack([rights, 1 - np.asarray(rights), *(np.full(count, shade) for _ in range(4))])
    images = np.full((3 if batch == 0 else 0, 64, 64, 3), round(shade), np.uint8)
    return Batch(random.normal(shade / 10, 1, (count, 4)).astype(np.float32), measures, seconds, images, "a machine")


@pytest.fixture
def filled(tmp_path):
    """Two batches of 8 of all points; rate 2 loses nothing, 4 half of the images; 32 has been begun."""
    store = Store(tmp_path / "store", Conditions("weights", batch=8))
    for point in (UNPATCHED, OTHER_SEEDS, *MANY.values()):
        rights = [1, 0] * 4 if point.name == "slothfulattention-rate-4" else [1] * 8
        blend = point.name.endswith("k-blend-1")
        for batch in range(2 if point.name != "slothfulattention-rate-32" else 0):
            seconds = 4.0 if point.spec is None else 3.0 + batch
            store.save(point, batch, painted(rights, 10.0 if blend else 20.0, batch, seconds))
    return store


@pytest.fixture
def report(filled):
    renderings = np.random.default_rng(5).normal(2, 1, (50, 4))
    return quality_report.gather("lab-unet", filled, 2, renderings)


def test_results(report):
    first, second = (report.results[MANY[spec]] for _, spec in STRENGTHS[0].settings[:2])
    assert report.images == 16
    assert report.unfinished == ["slothfulattention-rate-32"]
    assert first.accuracy.value == 1
    assert second.accuracy.value == 0.5
    assert (second.accuracy.low, second.accuracy.high) == evaluate.interval(8, 16)
    assert second.accuracy_change.value == -0.5
    assert second.time.median == pytest.approx(7 / 8)
    assert first.seconds == pytest.approx(7 / 16)
    assert first.frechet_change.value == pytest.approx(0, abs=1e-6)
    assert (first.frechet_change.low, first.frechet_change.high) == pytest.approx((0, 0), abs=1e-6)
    assert first.frechet.low < first.frechet.value < first.frechet.high
    assert not report.complete(STRENGTHS[0])


def test_tables(report, capsys):
    text = quality_report.text(report)
    assert "| SlothfulAttention  " in text
    claims = [line for line in text.splitlines() if "less noise" in line]
    assert ["**yes**" in line for line in claims] == [True, True]
    assert all("20 at 0" in line and "10 at 1" in line for line in claims)
    assert "Not finished yet: slothfulattention-rate-32." in text
    regions = [line for line in text.splitlines() if "not finished" in line]
    assert len(regions) == 1
    tiles = next(line for line in text.splitlines() if line.startswith("| NearSightedTile  "))
    cells = [cell.strip() for cell in tiles.split("|")]
    assert cells[3] == "1"
    assert cells[5:8] == ["0.88 (0.80 to 0.95)", "none of these", ""]
    everything = str(quality_report.everything(report)).splitlines()
    assert len(everything) == 2 + len(MANY) - 1


def test_nothing_is_reported_of_nothing(filled, tmp_path):
    assert quality_report.gather("lab-unet", Store(tmp_path, Conditions("others")), 2, np.ones((5, 4))) is None


def test_a_report_of_what_was_stopped_in_a_lap_is_of_whole_laps(filled):
    late = [point for point in MANY.values() if "tokenmerging" in point.name]
    for point in late:
        filled.path(point, 1).unlink()
    report = quality_report.gather("lab-unet", filled, 2, np.random.default_rng(6).normal(2, 1, (50, 4)))
    assert report.images == 8
    assert all(point in report.results for point in late)


def test_a_section_replaces_what_was_between_its_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- begin quality x -->\nold\n<!-- end quality x -->\nb\n")
    quality_report.insert(page, "x", "new")
    quality_report.insert(page, "x", "newer")
    assert page.read_text() == "a\n<!-- begin quality x -->\nnewer\n<!-- end quality x -->\nb\n"
    with pytest.raises(ValueError, match="begin quality y"):
        quality_report.insert(page, "y", "new")


def test_pictures(report, tmp_path, monkeypatch):
    few = (STRENGTHS[0], *(each for each in STRENGTHS if each.operator == "HyperTile"))
    monkeypatch.setattr(quality_plots, "STRENGTHS", few)
    quality_plots.curves(report, tmp_path / "curves.png")
    quality_plots.images(report, tmp_path / "images.png")
    for name in ("curves.png", "images.png"):
        assert np.asarray(Image.open(tmp_path / name).convert("L")).std() > 5


def test_it_says_how_to_make_the_models(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["quality.py", "--models", "lab-dit"])
    monkeypatch.setattr(quality, "LAB", tmp_path)
    grad = torch.is_grad_enabled()
    with pytest.raises(SystemExit, match=r"train.py judge makes it"):
        quality.main()
    torch.set_grad_enabled(grad)
