"""What is said of negative prompts is so."""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # scripts, which import each other by name

import models
import negatives
import negatives_plots
import train
from diffusers import StableDiffusionPipeline
from PIL import Image
from scenes import COLOURS, LABELS, PLACES, SHAPES
from transformers import CLIPTextModel

from sloth_fx.cli.judge import Judge


class Sees:
    """A judge that says what it is told."""

    labels = LABELS

    def __init__(self, shown):
        self.shown = shown

    def scores(self, images):
        return np.array([[float(label in self.shown) for label in LABELS]] * len(images))

    def promised(self, prompt):
        return Judge.promised(self, prompt)


class Bar:
    def update(self, count):
        self.count = count


def untrained():
    torch.manual_seed(0)
    words = models.tokenizer()
    pipe = StableDiffusionPipeline(
        vae=models.vae(),
        text_encoder=CLIPTextModel(models.text_encoder(words).config),
        tokenizer=words,
        unet=models.unet(),
        scheduler=train.unet_schedule(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_tasks_leave_open_what_their_negative_prompts_name():
    given = negatives.tasks(30)
    assert given == negatives.tasks(30)
    assert len(given) == 60
    opened, captions = given[:30], given[30:]
    for task in opened:
        kind = next(kind for kind in (COLOURS, SHAPES, PLACES) if task.negative in kind)
        assert not any(negatives.has(task.prompt, word) for word in kind)
        assert negatives.has(task.prompt, task.asked)
    assert {len(list(kind)) for kind in (COLOURS, SHAPES, PLACES)} == {6, 4, 5}
    for task in captions:
        assert task.asked is None
        assert not negatives.has(task.prompt, task.negative)


def test_what_the_judge_sees_is_counted():
    painter = negatives.Painter(None, Sees(["red circle on the left"]), 2)
    painter.paint = lambda side, given: [(list(given), [None] * len(given))]
    given = [
        negatives.Task("a red circle", "on the left", "red circle"),
        negatives.Task("a red circle", "on the right", "red circle"),
        negatives.Task("square", "red", "square"),
        negatives.Task("a small red circle on the left", "blue", None),
        negatives.Task("a red circle on the left and a blue cross on the right", "green", None),
    ]
    found = painter.measure(negatives.PLAIN, given, Bar())
    assert found == {"negative": [1, 0, 1], "kept": [1, 1, 0], "right": [1, 0]}


def test_sides_differ_in_what_they_paint_and_the_pipeline_is_as_it_was(monkeypatch):
    pipe = untrained()
    unet, encode = pipe.unet, pipe.encode_prompt
    painter = negatives.Painter(pipe, None, 2)
    given = negatives.tasks(3)[:3]
    sides = [negatives.PLAIN, negatives.SIDES[1], negatives.SIDES[-1], negatives.PLAIN]
    with torch.no_grad():
        painted = [
            np.stack([np.asarray(image) for _, images in painter.paint(side, given) for image in images])
            for side in sides
        ]
        whole = negatives.Painter(pipe, None, 3)
        at_once = np.stack([np.asarray(image) for image in next(whole.paint(sides[2], given))[1]])
    assert painted[0].shape == (3, 64, 64, 3)
    assert np.array_equal(painted[0], painted[3])
    assert not np.array_equal(painted[0], painted[1])
    assert not np.array_equal(painted[0], painted[2])
    assert np.abs(painted[2].astype(int) - at_once).max() <= 1  # each prompt has its own negative, in any batch
    assert pipe.unet is unet
    assert pipe.encode_prompt == encode


def test_tables_and_pictures(tmp_path):
    count, random = 6, np.random.default_rng(0)
    found = {
        side.name: {name: random.integers(0, 2, count).tolist() for name in negatives.MEASURES}
        for side in negatives.all_sides()
    }
    assert len(found) == len(negatives.all_sides()) == len({negatives.key(side) for side in negatives.all_sides()})
    table = str(negatives.table("lab", found))
    assert table.count("\n") == 1 + len(found)
    negatives_plots.sweeps(
        "lab", found, negatives.BASE, negatives.SWEEPS, negatives.PLAIN.name, tmp_path / "sweeps.png"
    )
    shown = {side.name: [Image.new("RGB", (64, 64), "red")] * 3 for side in negatives.SIDES}
    negatives_plots.grid(negatives.tasks(3)[:3], shown, tmp_path / "grid.png")
    for name in ("sweeps.png", "grid.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 400
