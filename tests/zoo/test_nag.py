"""NAG across the zoo: a dozen families, by either way, against two branches computed by brute force."""

import math

import pytest
import torch

import sloth_fx
from sloth_fx.model_adapters import Arguments, adapter_for
from tests.two_branches import CROSS, ReadsText, in_order, in_step, two_branches
from tests.zoo.compare import at, difference
from tests.zoo.count import watch
from tests.zoo.registry import MODELS, run, shared

SPEC = sloth_fx.NAG(scale=4.0, tau=2.0, alpha=0.5)
TEXT, MASK, IMAGE = "encoder_hidden_states", "encoder_attention_mask", "encoder_hidden_states_image"
# What a negative text consists of, and whether keys and values of it are had beforehand.
FAMILIES = {
    "UNet2DConditionModel/textmask": ((TEXT, MASK), True),
    "UVit2DModel": ((TEXT,), True),
    "SanaTransformer2DModel": ((TEXT, MASK), True),
    "LTXVideoTransformer3DModel": ((TEXT, MASK), True),
    "WanTransformer3DModel/i2v": ((TEXT, IMAGE), True),  # keys of an image lie in front of the text, and are cut off
    "ControlNetModel": ((TEXT,), True),
    "UNet2DConditionModel/simplecross": ((TEXT,), False),  # queries of the image alone
    "SD3Transformer2DModel/sd35": ((TEXT,), False),  # attention to the image alone in between
    "FluxTransformer2DModel/kontext": ((TEXT,), False),  # a reference image
    "QwenImageTransformer2DModel": ((TEXT,), False),
    "AuraFlowTransformer2DModel": ((TEXT,), False),  # registers
    "PRXTransformer2DModel": ((TEXT,), False),
    "HunyuanVideoTransformer3DModel": ((TEXT,), False),  # text that attends to itself
}
# Hosts that are steered by what they compute, write into their tokens, or take a list of texts; and what two correct
# runs differ by (positions in half precision).
IN_STEP = {
    "CogView4Transformer2DModel": 1e-5,
    "GlmImageTransformer2DModel": 1e-5,
    "HiDreamImageTransformer2DModel": 1e-5,
    "HunyuanImageTransformer2DModel": 1e-5,
    "HunyuanVideo15Transformer3DModel": 1e-5,
    "HunyuanVideoFramepackTransformer3DModel": 1e-5,
    "QwenImage21Transformer2DModel": 1e-5,
    "EasyAnimateTransformer3DModel": 1e-5,
    "ZImageTransformer2DModel": 1e-5,
    "JoyImageEditPlusTransformer3DModel": 1e-5,
    "WanAnimate2Transformer3DModel": 1e-5,
    "Kandinsky5Transformer3DModel": 1e-4,
}
REFUSED = {
    "UNet2DModel": "NAG needs cross-attention or joint attention of image tokens to text",
    "Cosmos3OmniTransformer": r"the text input_ids has shape \(7,\), and no rows",
    "Lumina2Transformer2DModel": "which of its tokens are the image's is not known",
}


def sites(name: str) -> list[ReadsText | None]:
    """What the attentions of a model are, by the data about it."""
    with watch(shared(name)) as attentions:
        run(shared(name), MODELS[name].inputs())
    found: list[ReadsText | None] = []
    for known, attention in zip(MODELS[name].expected, attentions, strict=True):
        if known.kind == "cross" and known.text is not None:
            found.append(CROSS)
        elif known.kind == "joint":
            first, last = known.image, known.image + math.prod(known.grid)
            if known.text is not None:  # reference images go with the image
                first = 0 if first <= known.text[0] else first
                last = known.keys if known.text[1] <= last else last
            image = slice(first, last)
            found.append(ReadsText(image if attention.query.shape[-2] == known.keys else None, image))
        else:
            found.append(None)
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_it_equals_two_branches_and_the_same_text_changes_nothing(name):
    arguments, beforehand = FAMILIES[name]
    inputs, model = MODELS[name].inputs, shared(name)
    call, base = inputs(), run(model, inputs())
    patched = sloth_fx.transform(model, SPEC, example_inputs=inputs())
    notes = {site.note.partition(" (")[0] for site in sloth_fx.report(patched) if "NAG" in site.operators}
    assert all(("computed once" in note) == beforehand for note in notes)

    context = sloth_fx.context(patched)
    context.set_negative(**{each: call[each] for each in arguments})
    assert difference(at(patched, 0.1, call), base) < 1e-5

    random = torch.Generator().manual_seed(7)
    negative = {TEXT: torch.randn(call[TEXT].shape, generator=random)}
    negative |= {each: call[each].flip(0) for each in arguments if each == MASK}
    negative |= {each: call[each] for each in arguments if each == IMAGE}
    context.set_negative(**negative)
    found = at(patched, 0.1, call)
    expected = two_branches(model, call, negative, SPEC, in_order(sites(name)), batch=2, run=run)
    assert difference(found, [each[:2] for each in expected]) < 1e-5
    assert difference(found, base) > 0.05


def noise(value):
    if isinstance(value, (list, tuple)):
        return [noise(each) for each in value]
    return torch.randn(value.shape, generator=torch.Generator().manual_seed(value.shape[0]))


@pytest.mark.parametrize("name", IN_STEP)
def test_it_equals_two_calls_in_step(name):
    model, call = shared(name), MODELS[name].inputs()
    patched = sloth_fx.transform(model, SPEC, example_inputs=MODELS[name].inputs())
    notes = [site.note for site in sloth_fx.report(patched) if "NAG" in site.operators]
    assert all(note.endswith("what both texts have in common is computed once") for note in notes)
    arguments = Arguments(model, adapter_for(model))
    negative = {label.partition("[")[0]: None for label in arguments.text((), call)}
    negative = {label: noise(call[label]) for label in negative}
    sloth_fx.context(patched).set_negative(**negative)
    found = at(patched, 0.1, call)
    read = in_order(sites(name)), in_order(sites(name))
    expected = in_step(model, (call, {**call, **negative}), SPEC, read, run=run)
    assert difference(found, expected) < IN_STEP[name]
    assert difference(found, run(model, call)) > 0.05


@pytest.mark.parametrize("last", [False, True], ids=["before the image", "behind a reference"])
def test_learned_tokens_that_read_the_text_stand_for_it(last):
    """A perceiver's; other sites read text of their own."""
    name = "BriaFibo2Transformer2DModel" + ("/edit" if last else "")
    call, patched = MODELS[name].inputs(), sloth_fx.transform(shared(name), SPEC, example_inputs=MODELS[name].inputs())
    report = [site for site in sloth_fx.report(patched) if "NAG" in site.operators]
    assert not any("perceiver" in site.path for site in report)
    total = report[0].q_tokens
    image = slice(0, 99) if last else slice(total - 99, total)

    def read(query, key):
        if query.shape[-2] != total:
            return None
        return ReadsText(image, image if key.shape[-2] == total else None)

    negative = {TEXT: noise(call[TEXT])}
    sloth_fx.context(patched).set_negative(**negative)
    found = at(patched, 0.1, call)
    assert difference(found, in_step(shared(name), (call, {**call, **negative}), SPEC, (read, read), run=run)) < 1e-5
    assert difference(found, run(shared(name), call)) > 0.05


def test_one_of_a_list_of_texts_is_for_all_images():
    name = "ZImageTransformer2DModel"
    call, patched = MODELS[name].inputs(), sloth_fx.transform(shared(name), SPEC, example_inputs=MODELS[name].inputs())
    call["cap_feats"] = [call["cap_feats"][0], call["cap_feats"][0].flip(0)]  # the host asks each text for its len
    text, context = noise(call["cap_feats"][:1]), sloth_fx.context(patched)
    found = []
    for texts in (text, text * 2):
        context.set_negative(cap_feats=texts)
        found.append(at(patched, 0.1, call))
    assert difference(*found) == 0
    context.set_negative(cap_feats=text * 3)
    with pytest.raises(sloth_fx.SlothError, match="cap_feats has 3 texts: give 1, or one for each of the 2 images"):
        at(patched, 0.1, call)


@pytest.mark.parametrize("name", REFUSED)
def test_families_that_are_refused(name):
    with pytest.raises(sloth_fx.SlothError, match=REFUSED[name]):
        sloth_fx.transform(shared(name), SPEC, example_inputs=MODELS[name].inputs())
