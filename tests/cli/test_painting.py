"""``sloth-fx generate`` and ``sloth-fx compare``, with a tiny pipeline of random weights."""

import json
from dataclasses import replace

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from PIL import Image

import sloth_fx
from sloth_fx.cli.models import open_pipeline
from sloth_fx.cli.painting import Settings, paint
from sloth_fx.cli.spec_files import made_with, read_specs

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # the schedulers' own

COMMON = ("--prompt", "ab cd", "--size", "168x104", "--steps", 2, "--seed", 5)
SETTINGS = Settings(prompt="ab cd", size=(168, 104), steps=2, seed=5)


@pytest.fixture(scope="module")
def pipe(pipeline):
    return open_pipeline(pipeline, "float32", "cpu")


def test_painted_with_and_without(pipe, spec):
    steps = []
    specs = read_specs(spec)
    plain = paint(pipe, SETTINGS, [], lambda: steps.append(1))
    assert len(steps) == 2
    patched = paint(pipe, SETTINGS, specs, lambda: None)
    again = paint(pipe, SETTINGS, [], lambda: None)
    assert plain[0].size == (168, 104)
    assert np.array_equal(plain[0], again[0])
    assert not np.array_equal(plain[0], patched[0])
    with sloth_fx.attach(pipe, specs):
        expected = pipe(**SETTINGS.arguments(pipe)).images
    assert np.array_equal(patched[0], expected[0])


def test_a_negative_prompt_in_attention(pipe, run, pipeline, tmp_path):
    nag = sloth_fx.NAG(scale=9.0, alpha=1.0)
    settings = replace(SETTINGS, negative_prompt="xyz", guidance=1.0)
    plain, guided = (paint(pipe, settings, specs, lambda: None)[0] for specs in ([], [nag]))
    assert not np.array_equal(plain, guided)
    with pytest.raises(sloth_fx.SlothError, match="give --negative-prompt"):
        paint(pipe, SETTINGS, [nag], lambda: None)
    spec, output = tmp_path / "nag.json", tmp_path / "out.png"
    spec.write_text(json.dumps(nag.to_dict()))
    with_prompt = ("--negative-prompt", "xyz", "--guidance", 1, "-o", output)
    assert run("generate", pipeline, *COMMON, "--spec", spec, *with_prompt).code == 0
    assert read_specs(output) == [nag]


def test_pipelines_without_a_negative_prompt_of_their_own():
    class Few:
        def __call__(self, prompt, num_inference_steps, generator):
            raise AssertionError

    settings = Settings(prompt="a", negative_prompt="b")
    assert settings.arguments(Few(), guided=True).keys() == {"prompt", "num_inference_steps", "generator"}
    with pytest.raises(sloth_fx.SlothError, match="takes no negative_prompt"):
        settings.arguments(Few())


def test_each_image_has_a_seed_of_its_own(pipe):
    several = paint(pipe, Settings(prompt="ab cd", size=(168, 104), steps=2, seed=4, count=3), [], lambda: None)
    (alone,) = paint(pipe, SETTINGS, [], lambda: None)
    assert len(several) == 3
    assert np.abs(np.asarray(several[1], dtype=int) - np.asarray(alone, dtype=int)).max() <= 1
    assert not np.array_equal(several[0], several[1])


def test_what_a_pipeline_does_not_take(pipe):
    class Other:
        def __call__(self, prompt, num_inference_steps, generator):
            raise AssertionError

    with pytest.raises(sloth_fx.SlothError, match="Other takes no negative_prompt, width, height"):
        paint(Other(), Settings(prompt="a", negative_prompt="b", size=(8, 16)), [], lambda: None)
    with pytest.raises(sloth_fx.SlothError, match=r"StableDiffusionPipeline failed: ValueError: .*divisible by 8"):
        paint(pipe, Settings(prompt="a", size=(8, 17)), [], lambda: None)


def test_generate(run, pipeline, spec, tmp_path):
    output = tmp_path / "out.png"
    done = run("generate", pipeline, *COMMON, "--spec", spec, "--count", 2, "-o", output)
    assert done.code == 0
    assert done.out.startswith(f"{output}: 2 images without and with the spec; pixels differ by ")
    with Image.open(output) as image:
        assert image.size[0] > 2 * 168
        assert image.size[1] > 2 * 104
    assert read_specs(output) == read_specs(spec)
    settings = made_with(output)
    assert (settings["prompt"], settings["seed"], settings["size"]) == ("ab cd", 5, [168, 104])
    assert run("spec", "show", output).out == run("spec", "show", spec).out


def test_the_image_serves_as_a_spec(run, pipeline, spec, tmp_path):
    first, second = tmp_path / "first.png", tmp_path / "second.png"
    run("generate", pipeline, *COMMON, "--spec", spec, "-o", first)
    run("generate", pipeline, *COMMON, "--spec", first, "-o", second)
    assert first.read_bytes() == second.read_bytes()


def test_compare(run, pipeline, spec, judge, tmp_path):
    output = tmp_path / "grid.png"
    vary = ("--vary", "rate=1,9", "--vary", "mode=1d_avg,2d_avg")
    done = run(
        "compare", pipeline, *COMMON, "--spec", spec, *vary, "--judge", judge, "--count", 2, "-o", output, "--json"
    )
    cells = json.loads(done.out)["cells"]
    assert len(cells) == 5
    assert [(cell["rate"], cell["mode"]) for cell in cells[1:3]] == [("1", "1d_avg"), ("1", "2d_avg")]
    assert [cell["difference"] > 0 for cell in cells] == [False, False, False, True, True]
    assert all(0 <= cell["right"] <= 1 for cell in cells)
    assert cells[0]["frechet"] == pytest.approx(0, abs=1e-9)
    assert cells[3]["frechet"] > 0
    with Image.open(output) as image:
        assert image.size[0] > 3 * 168
        assert image.size[1] > 4 * 104
    assert made_with(output)["vary"] == ["rate=1,9", "mode=1d_avg,2d_avg"]


def test_compare_shows_a_table(run, pipeline, spec, tmp_path):
    output = tmp_path / "grid.png"
    done = run("compare", pipeline, *COMMON, "--spec", spec, "--vary", "out.rate=1,7", "-o", output)
    lines = [line.split() for line in done.out.splitlines()]
    assert lines[0] == ["out.rate", "difference"]
    assert lines[1] == ["unpatched", "0"]
    assert [line[0] for line in lines[2:4]] == ["1", "7"]
    assert lines[-1] == [str(output)]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--vary", "rate=1,99"], 1, "rate=99 is refused"),
        (["--vary", "raet=1"], 1, "nearest: rate"),
        (["--vary", "rate=1", "--vary", "mode=2d_avg", "--vary", "k_blend=1"], 2, "once or twice, not 3 times"),
        (["--vary", "rate=1", "--vary", "rate=2"], 2, "rate is given twice"),
        (["--vary", "rate"], 2, "is not FIELD=VALUE"),
        (["--vary", "rate=1", "--judge", "nowhere"], 1, "nowhere is no judge"),
        (["--vary", "rate=1", "-o", "grid.gif"], 1, "ends with .png"),
        (["--vary", "rate=1", "--size", "big"], 2, "is not WIDTHxHEIGHT"),
    ],
)
def test_compare_refuses_before_it_paints(run, pipeline, spec, monkeypatch, arguments, code, words):
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", None)
    done = run("compare", pipeline, *COMMON[:2], "--spec", spec, *arguments)
    assert (done.code, done.out) == (code, "")
    assert words in done.words


def test_generate_refuses_what_is_no_pipeline(run, pipeline, spec, tmp_path):
    for folder, words in ((tmp_path, "is no pipeline"), (tmp_path / "no", "does not exist")):
        done = run("generate", folder, *COMMON, "--spec", spec, "-o", tmp_path / "out.png")
        assert done.code == 1
        assert words in done.words
    (tmp_path / "model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    done = run("generate", tmp_path, *COMMON, "--spec", spec, "-o", tmp_path / "out.png")
    assert done.code == 1
    assert "cannot be opened" in done.err
    assert done.err.count("\n") == 1
