"""The nodes for ComfyUI: what they declare, what they make of their values, and what they refuse."""

import json
import math
import re
import subprocess
import sys

import pytest

import sloth_fx
from sloth_fx.checks import FLAG
from sloth_fx.errors import SlothError
from sloth_fx.integrations.comfy.patching import report_of
from sloth_fx.integrations.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from sloth_fx.patch import patch_of
from sloth_fx.workflow import FORMS, SPECS, forms_of
from tests.integrations.comfy_host import Blind, Novel, conditioning, patcher, sample
from tests.test_workflow import NODE_TYPES, VALUES

# (default, least, most, step) of the original nodes, as their packs declare them.
ORIGINAL = {
    "SlothfulAttention": {
        "peak_time": (0.4, 0, 1, 0.1),
        "time_decay": (2.0, 0, 4, 0.5),
        "in_depth_decay": (2.0, 0, 4, 0.5),
        "in_slothful": (6.0, 0, 50, 0.5),
        "in_k_blend": (0.0, 0, 1, 0.05),
        "out_slothful": (4.0, 0, 50, 0.5),
        "out_v_blend": (0.0, 0, 1, 0.05),
    },
    "SlothfulAttentionSimple": {
        "time_decay": (1.0, 0, 4, 0.1),
        "depth_decay": (1.0, -2, 4, 0.1),
        "in_strength": (6.0, 0, 50, 0.5),
        "in_blend": (0.0, 0, 1, 0.05),
        "out_strength": (4.0, 0, 50, 0.5),
    },
    "NearSightedTile": {
        "tiling_max_depth": (2, 1, 3, 1),
        "global_ratio": (0.5, 0, 1, 0.1),
        "tile_size": (32, 16, 64, 2),
    },
    "NearSightedAttention": {
        "tiling_max_depth": (2, 1, 3, 1),
        "base_tile_size": (24, 16, 64, 2),
        "peak_tile_size": (32, 16, 64, 2),
        "base_global_ratio": (0.2, 0, 1, 0.1),
        "peak_global_ratio": (0.8, 0, 1, 0.1),
        "out_depth_decay": (2.0, 0, 4, 0.5),
    },
    "NearSightedAttentionSimple": {"slothful": (4.0, 0, 50, 0.5), "out_blend": (0.0, 0, 1, 0.05)},
}
TILE = {"tiling_max_depth": 2, "global_ratio": 0.5, "tile_size": 16}
FULL = sloth_fx.NearSightedTile.from_node(**TILE)


def inputs_of(name):
    declared = NODE_CLASS_MAPPINGS[name].INPUT_TYPES()
    return {**declared["required"], **declared.get("optional", {})}


def execute(name, model, **values):
    """What ComfyUI gives a node: all its values, those of widgets by their defaults."""
    node = NODE_CLASS_MAPPINGS[name]()
    defaults = {key: options["default"] for key, (_, options) in inputs_of(name).items() if "default" in options}
    return getattr(node, node.FUNCTION)(model=model, **{**defaults, **values})


def specs_of(patched):
    return patch_of(patched.object_patches["diffusion_model"]).specs


def original_id(kind, release):
    names = {"2023-12-16": kind, "2023-12-11": kind, "later": f"SlothFX{kind}_later"}
    return f"SlothFX{kind}_2023-12-11" if (kind, release) == ("SlothfulAttention", "2023-12-11") else names[release]


@pytest.mark.parametrize("name", ORIGINAL)
def test_original_inputs(name):
    declared = inputs_of(name)
    for key, (default, least, most, step) in ORIGINAL[name].items():
        kind, options = declared[key]
        assert kind == ("INT" if isinstance(default, int) else "FLOAT")
        assert (options["default"], options["min"], options["max"], options["step"]) == (default, least, most, step)
    assert NODE_CLASS_MAPPINGS[name].CATEGORY == "SlothfulAttention"
    assert NODE_CLASS_MAPPINGS[name].RETURN_TYPES == ("MODEL",)


@pytest.mark.parametrize(("kind", "release", "names"), NODE_TYPES)
def test_values_of_an_original_workflow(kind, release, names):
    """Widgets are in the order of the original, and their values become the spec that from_node makes of them."""
    name = original_id(kind, release)
    assert list(inputs_of(name)) == ["model", *names.split()]
    values = {each: VALUES[each] for each in names.split()}
    patched = execute(name, patcher(), **values)[0]
    simple = {"simple": True} if kind.endswith("Simple") else {}
    spec = SPECS[kind.removesuffix("Simple")].from_node(release=release, **simple, **values)
    assert specs_of(patched) == (spec,)


def test_every_node_is_well_formed():
    assert set(NODE_CLASS_MAPPINGS) == set(NODE_DISPLAY_NAME_MAPPINGS)
    assert len(set(NODE_DISPLAY_NAME_MAPPINGS.values())) == len(NODE_DISPLAY_NAME_MAPPINGS)
    for name, node in NODE_CLASS_MAPPINGS.items():
        assert callable(getattr(node(), node.FUNCTION))
        assert node.DESCRIPTION
        assert "release of later" not in node.DESCRIPTION
        for key, (kind, options) in inputs_of(name).items():
            if key == "model":
                continue
            assert kind in ("INT", "FLOAT", "BOOLEAN", "STRING", "CONDITIONING") or isinstance(kind, list), (name, key)
            assert options["tooltip"], (name, key)
            assert not re.search("Raises SlothError|math.inf|:`", options["tooltip"])
            if kind in ("INT", "FLOAT"):
                assert options["min"] <= options["default"] <= options["max"]
        json.dumps(node.INPUT_TYPES())


def test_originals_cover_all_releases():
    there = {
        (each.__name__, name) for name, each in NODE_CLASS_MAPPINGS.items() if each.CATEGORY == "SlothfulAttention"
    }
    assert len(there) == sum(len(forms_of(kind)) for kind in FORMS) == len(NODE_TYPES) + 1  # SlothfulAttention, later


@pytest.mark.parametrize("name", ["NAG", "PAG", "SEG", "SAG", "HyperTile", "TokenMerging", "TokenDownsample"])
def test_nodes_of_specs(name):
    spec = getattr(sloth_fx, name)
    negative = {"negative": conditioning()} if name == "NAG" else {}
    patched = execute(f"SlothFX{name}", patcher(), **negative)[0]
    assert specs_of(patched) == (spec(),)  # the defaults of the widgets are those of the spec


def test_the_most_of_a_widget_stands_for_no_limit():
    assert "1000 gives each query the mean" in inputs_of("SlothFXSEG")["blur_sigma"][1]["tooltip"]
    for name, field in (("SlothFXSEG", "blur_sigma"), ("SlothFXSAG", "blur_sigma"), ("SlothFXNAG", "tau")):
        patched = execute(name, patcher(), **{field: 1000.0}, **({"negative": conditioning()} if "NAG" in name else {}))
        assert getattr(specs_of(patched[0])[0], field) == math.inf


def test_seeds_stay_what_they_are():
    """A browser that makes a new seed for each run would have the model transformed for each."""
    seeded = [options for name in NODE_CLASS_MAPPINGS for key, (_, options) in inputs_of(name).items() if key == "seed"]
    assert seeded
    assert not any(options["control_after_generate"] for options in seeded)


def test_tuples_and_selectors_from_text():
    patched = execute("SlothFXTokenMerging", patcher(), cell="3, 2", max_depth=7, where='{"stage": ["in", "out"]}')[0]
    (spec,) = specs_of(patched)
    assert spec.cell == (3, 2)
    assert spec.where == {"stage": ("in", "out")}
    assert specs_of(execute("SlothFXTokenDownsample", patcher(), factors="3,2", where="out")[0])[0].factors == (3, 2)


def test_from_json():
    other = sloth_fx.TokenDownsample(factors=(1, 2), where="middle")
    text = json.dumps([FULL.to_dict(), other.to_dict()])
    assert specs_of(execute("SlothFXFromJSON", patcher(), spec=text)[0]) == (FULL, other)


def test_report():
    patched = execute("NearSightedTile", patcher(), **TILE)[0]
    shown = execute("SlothFXReport", patched)
    assert shown["result"] == (shown["ui"]["text"][0],)
    assert "UNetModel: 8 attention sites (4 self, 4 cross), 4 with operators" in shown["result"][0]
    assert NODE_CLASS_MAPPINGS["SlothFXReport"].OUTPUT_NODE


def test_chained_nodes_are_one_transform():
    first = execute("NearSightedTile", patcher(), **TILE)[0]
    both = execute("SlothFXNAG", first, negative=conditioning())[0]
    assert specs_of(both) == (FULL, sloth_fx.NAG())
    assert specs_of(first) == (FULL,)
    phased = execute("SlothFXPhases", execute("NearSightedAttention", patcher())[0], phases=3)[0]
    assert patch_of(phased.object_patches["diffusion_model"]).phases == 3


REFUSED = {
    "a value out of range": (
        lambda model: execute("NearSightedTile", model, tile_size=7),
        "NearSightedTile of 2023-12-16: tile_size=7 is refused: tile_size takes a whole number from 16 to 64",
    ),
    "a value of another kind": (
        lambda model: execute("SlothfulAttention", model, in_mode="3D"),
        "in_mode='3D' is refused",
    ),
    "two tilings": (
        lambda model: execute("SlothFXHyperTile", execute("NearSightedTile", model, **TILE)[0]),
        "HyperTile and NearSightedTile both tile|NearSightedTile and HyperTile both tile",
    ),
    "two guidances": (
        lambda model: execute("SlothFXSEG", execute("SlothFXPAG", model)[0]),
        "PAG and SEG|SEG and PAG",
    ),
    "no negative": (lambda model: execute("SlothFXNAG", model, negative=None), "NAG has no negative: connect"),
    "a negative for nobody": (
        lambda model: execute(
            "SlothFXFromJSON", model, spec=json.dumps(sloth_fx.PAG().to_dict()), negative=conditioning()
        ),
        "the specs have no NAG that would read it",
    ),
    "two negatives": (
        lambda model: execute("SlothFXNAG", model, negative=conditioning() + conditioning()),
        "has 2 parts: give that of one prompt",
    ),
    "no JSON": (lambda model: execute("SlothFXFromJSON", model, spec="{"), "the spec is no JSON"),
    "no spec": (
        lambda model: execute("SlothFXFromJSON", model, spec='{"version": 1, "type": "Tile"}'),
        "'Tile' is unknown",
    ),
    "no selector": (lambda model: execute("SlothFXTokenMerging", model, where="[1,"), "where=.* is no JSON"),
    "no numbers": (lambda model: execute("SlothFXTokenMerging", model, cell="2, x"), "takes whole numbers"),
    "nothing to report": (lambda model: execute("SlothFXReport", model), "there is nothing to report"),
    "no layer": (lambda model: execute("SlothFXTokenDownsample", model, where="nowhere"), "nowhere"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_an_error_of_the_node(case):
    model = patcher()
    ask, words = REFUSED[case]
    with pytest.raises(SlothError, match=words):
        ask(model)
    assert model.object_patches == {}


def test_a_model_without_attention():
    patched = execute("SlothfulAttention", patcher(Blind()))[0]
    with pytest.raises(SlothError, match="Blind computes no attention: there is nothing to transform"):
        sample(patched)


def test_a_model_of_an_unknown_family_is_located_at_its_first_call():
    model = patcher(Novel())
    patched = execute("NearSightedTile", model, **TILE)[0]
    assert "located at the first call" in str(report_of(patched))
    sample(patched)
    assert [site.operators for site in report_of(patched)] == [("NearSightedTile",), (), ("NearSightedTile",), ()]


def test_switches_are_switches():
    flags = [key for name in NODE_CLASS_MAPPINGS for key, (kind, _) in inputs_of(name).items() if kind == "BOOLEAN"]
    assert {"keep_middle", "concat_local", "scale_depth"} <= set(flags)
    assert FLAG["accepts"].range is None


def test_importing_the_pack_imports_no_host():
    code = "import sys, sloth_fx.integrations.comfyui; print({'comfy', 'diffusers', 'typer'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
