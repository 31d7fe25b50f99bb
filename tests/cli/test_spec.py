"""``sloth-fx spec``."""

import json
from dataclasses import fields

import pytest
from PIL import Image

from sloth_fx import HyperTile, SlothfulAttention, load_spec
from sloth_fx.cli.png import save_png
from sloth_fx.cli.spec_files import as_text, read_specs
from sloth_fx.serialize import SPECS

SPEC = SlothfulAttention(keep_middle=False, where=(1, 2))
SPECS_OF_TWO = [SPEC, HyperTile(seed=7)]
NODE = {"class_type": "NearSightedTile", "inputs": {"tiling_max_depth": 1, "global_ratio": 0.25, "tile_size": 24}}


@pytest.fixture(params=["json", "list", "png"])
def file(request, tmp_path):
    """A file of each form with specs in it."""
    found = tmp_path / f"spec.{'png' if request.param == 'png' else 'json'}"
    if request.param == "png":
        save_png(Image.new("RGB", (5, 3)), found, as_text(SPECS_OF_TWO, prompt="ein Faultier \N{SLOTH}", seed=3))
    else:
        found.write_text(json.dumps(SPEC.to_dict() if request.param == "json" else [s.to_dict() for s in SPECS_OF_TWO]))
    return found


def test_show(run, file):
    done = run("spec", "show", file)
    lines = [line.split() for line in done.out.splitlines() if line]
    assert done.code == 0
    assert lines[0] == ["SlothfulAttention"]
    assert ["keep_middle", "False"] in lines
    assert ["in_.rate", "6.0", "(default)"] in lines
    assert ["where", "(1,", "2)"] in lines


def test_validate(run, file):
    done = run("spec", "validate", file)
    assert done.code == 0
    assert done.out.startswith(f"{file}: SlothfulAttention")


def test_convert_gives_what_was_read(run, file, tmp_path):
    written = tmp_path / "converted.json"
    assert run("spec", "convert", file, "-o", written).code == 0
    assert read_specs(written) == read_specs(file)
    printed = load_spec(json.loads(run("spec", "convert", file).out))
    assert (printed if isinstance(printed, list) else [printed]) == read_specs(file)


@pytest.mark.parametrize("form", ["json", "png"])
def test_convert_a_workflow(run, tmp_path, form):
    workflow, file = json.dumps({"3": NODE}), tmp_path / f"workflow.{form}"
    if form == "json":
        file.write_text(workflow)
    else:
        save_png(Image.new("RGB", (5, 3)), file, {"prompt": workflow})
    done = run("spec", "convert", file)
    assert done.code == 0
    spec = load_spec(json.loads(done.out))
    assert (spec.tile_size, spec.global_ratio, spec.max_depth) == (24, 0.25, 1)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", "{", "not a JSON file"),
        ("a.json", "[]", "empty"),
        ("a.json", "3", "not a JSON object"),
        ("a.json", '{"version": 1, "type": "HyperTiel"}', "nearest: HyperTile"),
        ("a.json", '{"version": 9, "type": "HyperTile"}', "newer"),
        ("a.json", '{"version": 1, "type": "HyperTile", "seed": -1}', "seed"),
        ("a.json", '{"nodes": []}', ""),
        ("a.png", "no image", "is no image"),
    ],
)
@pytest.mark.parametrize("command", ["show", "validate", "convert"])
def test_files_that_hold_no_spec(run, tmp_path, command, name, content, words):
    file = tmp_path / name
    file.write_text(content)
    done = run("spec", command, file)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: ")
    assert words in done.err


def test_missing_file_and_folder(run, tmp_path):
    assert "does not exist" in run("spec", "show", tmp_path / "no.json").err
    assert "is a folder" in run("spec", "show", tmp_path).err


def test_convert_to_a_place_that_is_not_there(run, file, tmp_path):
    done = run("spec", "convert", file, "-o", tmp_path / "no" / "spec.json")
    assert done.code == 1
    assert "cannot write" in done.err


def test_list_has_every_kind_and_field(run):
    found = json.loads(run("spec", "list", "--json").out)
    for name, cls in SPECS.items():
        assert list(found[name]) == [each.name for each in fields(cls)]
    assert found["SLG"]["layers"]["default"] == "(none)"
    assert found["HyperTile"]["swap_size"] == {"default": "2", "takes": "a whole number from 1 to 16"}
    text = run("spec", "list").out
    assert all(f"{name}: " in text for name in found)


def test_list_of_one_kind(run):
    done = run("spec", "list", "TokenMerging")
    assert done.out.startswith("TokenMerging: Self-attention over merged tokens")
    assert "HyperTile" not in done.out
    assert "nearest: TokenMerging" in run("spec", "list", "TokenMergin").err
