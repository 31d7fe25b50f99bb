"""Perturbed attention across the zoo: one call that shares, and where that cannot be two, against brute force."""

import math

import pytest

import sloth_fx
from sloth_fx import PAG, SEG
from tests.perturbed_by_hand import itself, itself_and_others, mean_queries, rows_of, two_calls
from tests.zoo.compare import at, difference
from tests.zoo.registry import MODELS, run, shared

SCALE, PROGRESS = 2.0, 0.1
# Whether one call serves both branches.
FAMILIES = {
    "UNet2DConditionModel/sd15": True,
    "UNet2DConditionModel/sdxl": True,
    "UNet2DModel": True,
    "UNet3DConditionModel": True,
    "PixArtTransformer2DModel": True,
    "HunyuanDiT2DModel": True,
    "SD3Transformer2DModel": True,
    "SD3Transformer2DModel/sd35": True,
    "FluxTransformer2DModel": True,
    "QwenImageTransformer2DModel": True,
    "AuraFlowTransformer2DModel": True,
    "CogVideoXTransformer3DModel": True,
    "WanTransformer3DModel": True,
    "LuminaNextDiT2DModel": False,
}
REFUSED = {
    "SanaTransformer2DModel": r"this model has none \(it has: linear, cross\)",
    "ControlNetModel": "matches no site|are none: transform the model",
    "ZImageTransformer2DModel": "takes no latent that is one tensor",
}


def acting(patched, name):
    """The attentions, by number, that are perturbed, and of the first what is known of its image tokens."""
    numbers = [number for number, site in enumerate(sloth_fx.report(patched)) if site.operators]
    return numbers, MODELS[name].expected[numbers[0]]


def guided(prediction, perturbed, scale=SCALE):
    """The second row of two guides both."""
    return [p + scale * (p[1:] - q) for p, q in zip(prediction, perturbed, strict=True)]


def transformed(name, spec):
    patched = sloth_fx.transform(shared(name), spec, example_inputs=MODELS[name].inputs())
    sloth_fx.context(patched).rows = ("uncond", "cond")
    return patched


@pytest.mark.parametrize("spec", [PAG(scale=SCALE), SEG(scale=SCALE)], ids=["PAG", "SEG"])
@pytest.mark.parametrize("name", FAMILIES)
def test_it_equals_two_calls(name, spec):
    call, model = MODELS[name].inputs(), shared(name)
    patched = transformed(name, spec)
    notes = [site.note for site in sloth_fx.report(patched) if site.operators]
    assert all(("computed once" in note) == FAMILIES[name] for note in notes)
    numbers, known = acting(patched, name)
    others = known.kind == "joint"
    tokens = math.prod(known.grid)
    if isinstance(spec, SEG):
        frames = known.grid[0] if len(known.grid) > 2 else 1
        attention = mean_queries(known.image if others else 0, tokens if others else None, frames)
    else:
        attention = itself_and_others(known.image, tokens) if others else itself
    expected = two_calls(model, call, numbers, attention, batch=2, rows=[1], run=run)
    found = at(patched, PROGRESS, call)
    assert difference(found, guided(*expected)) < 1e-5
    assert difference(found, expected[0]) > 0.01


@pytest.mark.parametrize("name", [name for name, shares in FAMILIES.items() if shares])
def test_a_single_row(name):
    """One image, one text: what a host folds into the batch, and takes out of it, is still told from rows."""
    call, model = rows_of(MODELS[name].inputs(), 2, [1]), shared(name)
    patched = transformed(name, PAG(scale=SCALE))
    sloth_fx.context(patched).rows = ("cond",)
    numbers, known = acting(patched, name)
    attention = itself_and_others(known.image, math.prod(known.grid)) if known.kind == "joint" else itself
    p, q = two_calls(model, call, numbers, attention, batch=1, rows=[0], run=run)
    expected = [one + SCALE * (one - other) for one, other in zip(p, q, strict=True)]
    assert difference(at(patched, PROGRESS, call), expected) < 1e-5


@pytest.mark.parametrize("name", REFUSED)
def test_families_that_are_refused(name):
    with pytest.raises(sloth_fx.SlothError, match=REFUSED[name]):
        sloth_fx.transform(shared(name), PAG(), example_inputs=MODELS[name].inputs())
