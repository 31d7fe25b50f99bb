"""``sloth-fx plan``."""

import json

import numpy as np
import pytest
from PIL import Image

from sloth_fx import SlothfulAttention
from sloth_fx.cli.plan import scaled
from sloth_fx.cost import estimate
from tests.models import shared

SIZE = ("--size", "168x104")  # 13 rows and 21 columns


def test_json_is_the_estimate(run, pipeline, spec):
    done = run("plan", pipeline, "--spec", spec, *SIZE, "--steps", 3, "--text", 7, "--dtype", "bfloat16", "--json")
    slothful = SlothfulAttention(keep_middle=False)
    expected = estimate(shared("two_levels"), slothful, (13, 21), steps=3, text=7, number_bytes=2)
    assert done.code == 0
    assert json.loads(done.out) == json.loads(json.dumps(expected.to_dict()))


def test_text(run, pipeline, spec):
    done = run("plan", pipeline, "--spec", spec, *SIZE, "--steps", 3, "--step", 2)
    cost = estimate(shared("two_levels"), SlothfulAttention(keep_middle=False), (13, 21), steps=3, number_bytes=2)
    assert done.code == 0
    assert "13 rows and 21 columns, 77 text tokens, 3 steps" in done.out
    assert "Step 2 of 3 (progress 0.33, sigma " in done.out
    first = next(line.split() for line in done.out.splitlines() if line.startswith("down_blocks.0"))
    assert first[1:8] == ["in", "self", "13x21", "273", f"{cost.sites[0].steps[1].keys:.0f}", "273", "20%"]
    assert "SlothfulAttention: 1 of 6 keys (3x2)" in done.out
    assert f"{cost.flops_left:.0%} are left" in done.out
    assert f"Compiled graphs: {cost.graphs} of" in done.out


def test_tiles_and_merging_in_words(run, pipeline, tmp_path):
    file = tmp_path / "spec.json"
    tile = {"version": 1, "type": "NearSightedTile", "tile_size": 7, "max_depth": 1}
    merging = {"version": 1, "type": "TokenMerging", "ratio": 0.25}
    file.write_text(json.dumps([tile, merging]))
    done = run("plan", pipeline, "--spec", file, *SIZE, "--steps", 1)
    assert "NearSightedTile+TokenMerging: 2x3 tiles of 7x7, samples of 1 in 12 (3x4), " in done.out
    assert "queries merged" in done.out


def test_what_is_asked_once_more(run, pipeline, tmp_path):
    file = tmp_path / "spec.json"
    file.write_text(json.dumps({"version": 1, "type": "SEG", "stop": 0.5}))
    done = run("plan", pipeline, "--spec", file, *SIZE, "--steps", 2, "--step", 1)
    lines = {
        line.split()[0]: line.rstrip() for line in done.out.splitlines() if "blocks" in line or "mid_block" in line
    }
    assert lines["mid_block.attentions.0.transformer_blocks.0.attn1"].endswith("200%  SEG: perturbed, in two branches")
    assert lines["up_blocks.1.attentions.0.transformer_blocks.0.attn1"].endswith(
        "(not selected by where), in two branches"
    )
    assert lines["down_blocks.0.attentions.0.transformer_blocks.0.attn1"].endswith("100%  - (not selected by where)")


def test_picture(run, pipeline, spec, tmp_path):
    picture = tmp_path / "plan.png"
    done = run("plan", pipeline, "--spec", spec, *SIZE, "--steps", 2, "--picture", picture)
    assert done.out.endswith(f"picture: {picture}\n")
    with Image.open(picture) as image:
        assert image.size[0] > 1000
        assert np.asarray(image).std() > 10


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--size", "168by104"], 2, "is not WIDTHxHEIGHT"),
        (["--size", "167x104"], 1, "multiples of 8"),
        (["--latent", "0x3"], 2, "is not WIDTHxHEIGHT"),
        ([*SIZE, "--steps", "2", "--step", "3"], 2, "the run has 2 steps"),
        ([*SIZE, "--picture", "plan.jpeg"], 1, "ends with .png"),
        ([*SIZE, "--picture", "nowhere/plan.png"], 1, "no folder nowhere"),
    ],
)
def test_refusals(run, pipeline, spec, arguments, code, words):
    done = run("plan", pipeline, "--spec", spec, *arguments)
    assert done.code == code
    assert words in done.words
    assert done.out == ""


@pytest.mark.parametrize(
    ("number", "words"), [(0, "0 "), (999, "999 "), (1234, "1.23 k"), (8.4e9, "8.4 G"), (5e17, "500 P")]
)
def test_numbers_with_units(number, words):
    assert scaled(number) == words
