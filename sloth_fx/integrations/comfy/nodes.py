"""The nodes: classes with what ComfyUI looks for in one, made from specs."""

from __future__ import annotations

import json
from typing import Any

import sloth_fx
from sloth_fx.errors import SlothError
from sloth_fx.integrations.comfy.documentation import summary
from sloth_fx.integrations.comfy.inputs import Input, Inputs, inputs_of_form, inputs_of_spec, values_of_spec
from sloth_fx.integrations.comfy.patching import patch_model, report_of
from sloth_fx.serialize import load_spec
from sloth_fx.spec import NAG
from sloth_fx.workflow import FORMS, SPECS, forms_of

CATEGORY = "Sloth FX"
_ORIGINAL_CATEGORY = "SlothfulAttention"
_MODEL: Input = ("MODEL", {})
_NEGATIVE: Input = ("CONDITIONING", {"tooltip": "What is not wanted, for NAG: the CONDITIONING of CLIP Text Encode."})
_RELEASES = ("2023-12-16", "2023-12-11", "later")
"""Of the releases of a node, the first of these has its original id."""

_ORIGINAL_NAMES = {
    "SlothfulAttention": "Slothful Attention",
    "SlothfulAttentionSimple": "Slothful Attention Simple",
    "NearSightedTile": "Near-sighted Tile",
    "NearSightedAttention": "Near-sighted Attention",
    "NearSightedAttentionSimple": "Near-sighted Attention (Simple)",
}
SPEC_NODES = ("NAG", "PAG", "SEG", "SAG", "HyperTile", "TokenMerging", "TokenDownsample")
"""Specs that are nodes of their own."""


def _node(name: str, inputs: dict[str, Inputs], run: Any, description: str, **more: Any) -> type:
    """A node class: ``run(**inputs)`` is what it executes."""
    members = {
        "INPUT_TYPES": classmethod(lambda cls: inputs),
        "RETURN_TYPES": ("MODEL",),
        "FUNCTION": "execute",
        "CATEGORY": CATEGORY,
        "DESCRIPTION": description,
        "execute": lambda self, **given: run(**given),
    }
    return type(name, (), {**members, **more})


def _original_node(kind: str, release: str) -> type:
    """A node with the parameters of an original one."""
    node, form = FORMS[kind]
    spec = SPECS[node]

    def run(model: Any, **values: Any) -> tuple[Any]:
        choice = {"simple": True} if form == "simple" else {}
        return (patch_model(model, [spec.from_node(release=release, **choice, **values)]),)

    inputs = {"required": {"model": _MODEL, **inputs_of_form(spec, forms_of(kind)[release])}}
    description = f"{summary(spec)} The node {kind}, release of {release}."
    return _node(kind, inputs, run, description.replace("of later", "a later one"), CATEGORY=_ORIGINAL_CATEGORY)


def _spec_node(name: str) -> type:
    """A node with the fields of a spec."""
    spec = getattr(sloth_fx, name)

    def run(model: Any, negative: Any = None, **values: Any) -> tuple[Any]:
        return (patch_model(model, [spec(**values_of_spec(spec, values))], negative=negative),)

    negative = {"negative": _NEGATIVE} if spec is NAG else {}
    inputs = inputs_of_spec(spec)
    optional = {"where": inputs.pop("where")}
    return _node(name, {"required": {"model": _MODEL, **negative, **inputs}, "optional": optional}, run, summary(spec))


def _from_json(model: Any, spec: str, negative: Any = None) -> tuple[Any]:
    try:
        data = json.loads(spec)
    except ValueError as error:
        raise SlothError(f"the spec is no JSON: {error}") from None
    loaded = load_spec(data)
    return (patch_model(model, loaded if isinstance(loaded, list) else [loaded], negative=negative),)


def _phases(model: Any, phases: int) -> tuple[Any]:
    return (patch_model(model, phases=phases),)


def _report(model: Any) -> dict[str, Any]:
    text = str(report_of(model))
    return {"ui": {"text": (text,)}, "result": (text,)}


_EXAMPLE = json.dumps(sloth_fx.TokenDownsample().to_dict(), indent=2)
_JSON_INPUT: Input = (
    "STRING",
    {
        "default": _EXAMPLE,
        "multiline": True,
        "tooltip": "A spec, or a list of specs, as sloth-fx and to_dict() write them.",
    },
)
_PHASES_INPUT: Input = (
    "INT",
    {"default": 4, "min": 1, "max": 64, "tooltip": "How many different sets of strides and tiles a run may have."},
)

_ORIGINALS = {
    (kind if release == first else f"SlothFX{kind}_{release}"): (kind, release)
    for kind in FORMS
    for first in [next(each for each in _RELEASES if each in forms_of(kind))]
    for release in forms_of(kind)
}
_SPECS = {f"SlothFX{name}": name for name in SPEC_NODES}

NODE_CLASS_MAPPINGS: dict[str, type] = {
    **{name: _original_node(*each) for name, each in _ORIGINALS.items()},
    **{name: _spec_node(each) for name, each in _SPECS.items()},
    "SlothFXFromJSON": _node(
        "FromJSON",
        {"required": {"model": _MODEL, "spec": _JSON_INPUT}, "optional": {"negative": _NEGATIVE}},
        _from_json,
        "Any spec, or several.",
    ),
    "SlothFXPhases": _node(
        "Phases",
        {"required": {"model": _MODEL, "phases": _PHASES_INPUT}},
        _phases,
        "Rounds the schedules of the nodes before it, so that TorchCompileModel after it compiles no more than so many "
        "graphs.",
    ),
    "SlothFXReport": _node(
        "Report",
        {"required": {"model": _MODEL}},
        _report,
        "Where attention is computed in the model, and what the nodes of Sloth FX do there.",
        RETURN_TYPES=("STRING",),
        OUTPUT_NODE=True,
    ),
}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {
    **{
        name: _ORIGINAL_NAMES[kind] + ("" if name == kind else f", {release} (Sloth FX)")
        for name, (kind, release) in _ORIGINALS.items()
    },
    **{name: f"{each} (Sloth FX)" for name, each in _SPECS.items()},
    "SlothFXFromJSON": "Sloth FX: from JSON",
    "SlothFXPhases": "Sloth FX: phases",
    "SlothFXReport": "Sloth FX: report",
}
