"""A negative text that is shorter or longer than the other, against two separate calls in step
(:func:`tests.two_branches.in_step`): nothing is padded there."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import sloth_fx
from tests.two_branches import ReadsText, in_order, in_step
from tests.zoo.compare import at, difference
from tests.zoo.count import watch
from tests.zoo.registry import MODELS, run, shared

SPEC = sloth_fx.NAG(scale=4.0, tau=2.0, alpha=0.5)
TEXT, MASK = "encoder_hidden_states", "encoder_attention_mask"
# Besides the text, what has a place for each of its tokens: alone, or with all tokens of the image behind them.
FAMILIES = {
    "SD3Transformer2DModel/sd35": (),
    "AuraFlowTransformer2DModel": (),
    "FluxTransformer2DModel": ("txt_ids",),
    "FluxTransformer2DModel/kontext": ("txt_ids",),
    "Flux2Transformer2DModel/ref": ("txt_ids",),
    "QwenImageTransformer2DModel": ("encoder_hidden_states_mask",),
    "QwenImageTransformer2DModel/edit": ("encoder_hidden_states_mask",),
    "HunyuanVideoTransformer3DModel": (MASK,),
    "MotifVideoTransformer3DModel": (),
    "PRXTransformer2DModel": ("attention_mask",),
    "CogVideoXTransformer3DModel/1.5": (),
    "Krea2Transformer2DModel": ("encoder_attention_mask", "position_ids"),
}


def text_of(call: dict[str, Any], others: tuple[str, ...], tokens: int, rows: int) -> dict[str, Any]:
    """Another text of so many tokens, with a mask that hides its last two."""
    known = call[TEXT].shape[1]
    random = torch.Generator().manual_seed(tokens)
    found = {TEXT: torch.randn((rows, tokens, *call[TEXT].shape[2:]), generator=random)}
    for name in others:
        given = call[name]
        if name == "position_ids":  # of text and image
            found[name] = torch.cat([given[:1].expand(tokens, -1), given[known:]])
            continue
        axis = 1 if given.shape[0] == call[TEXT].shape[0] else 0
        if "mask" in name:
            mask = torch.ones((rows, tokens), dtype=given.dtype)
            mask[:, -2:] = 0
            found[name] = torch.cat([mask, given[:rows, known:]], 1)
        else:
            whole = torch.arange(tokens).to(given.dtype)
            found[name] = given.narrow(axis, 0, 1).expand(*given.shape[:axis], tokens, -1).clone()
            found[name][..., -1] = whole if "Flux2" in name else 0
    return found


def sites(name: str, tokens: int) -> list[ReadsText | None]:
    """What the attentions of a model are, with a text of so many ``tokens``."""
    with watch(shared(name)) as attentions:
        run(shared(name), MODELS[name].inputs())
    found: list[ReadsText | None] = []
    for known, attention in zip(MODELS[name].expected, attentions, strict=True):
        if known.kind == "cross" and known.text is not None:
            found.append(ReadsText())
        elif known.kind == "joint":
            first, last = known.image, known.image + math.prod(known.grid)
            if known.text is not None:
                first = 0 if 0 < first <= known.text[0] else first
                last = known.keys if known.text[1] <= last else last
                more = tokens - known.text[1] + known.text[0] if known.text[1] <= first else 0
                first, last = first + more, last + more
            image = slice(first, last)
            found.append(ReadsText(image if attention.query.shape[-2] == known.keys else None, image))
        else:
            found.append(None)
    return found


@pytest.mark.parametrize("tokens", [9, 17])
@pytest.mark.parametrize("name", FAMILIES)
def test_it_equals_two_calls_in_step(name, tokens):
    inputs, model = MODELS[name].inputs, shared(name)
    call = inputs()
    patched = sloth_fx.transform(model, SPEC, example_inputs=inputs())
    assert any("is computed once" in site.note for site in sloth_fx.report(patched))
    context = sloth_fx.context(patched)
    random = torch.Generator().manual_seed(3)
    call[TEXT] = torch.randn(call[TEXT].shape, generator=random)
    for rows in (2, 1):
        negative = text_of(call, FAMILIES[name], tokens, rows)
        context.set_negative(**negative)
        found = at(patched, 0.1, call)
        other = {
            key: each.expand(2, *each.shape[1:]) if each.shape[0] == rows and key in negative else each
            for key, each in (call | negative).items()
            if isinstance(each, torch.Tensor)
        }
        lengths = call[TEXT].shape[1], tokens
        read = tuple(in_order(sites(name, length)) for length in lengths)
        expected = in_step(model, (call, {**call, **other}), SPEC, read, run=run)
        assert difference(found, expected) < 1e-5
        assert difference(found, run(model, call)) > 0.02


@pytest.mark.parametrize("names", [("cond",), ("uncond", "cond")], ids=str)
@pytest.mark.parametrize("tokens", [(5, 5), (5, 40), (40,)], ids=str)
def test_texts_in_lists_have_rows_of_their_own(tokens, names):
    """A host that takes them asks each for its ``len``, and pads them itself."""
    name, rows = "ZImageTransformer2DModel", 2 * len(names)
    call = MODELS[name].inputs(rows)
    patched = sloth_fx.transform(shared(name), SPEC, example_inputs=MODELS[name].inputs())
    context, random = sloth_fx.context(patched), torch.Generator().manual_seed(2)
    context.rows = names
    negative = [torch.randn(each, call["cap_feats"][0].shape[1], generator=random) for each in tokens]
    context.set_negative(cap_feats=negative)
    found = at(patched, 0.1, call)
    other = {**call, "cap_feats": (negative * rows)[:rows]}
    read = tuple(in_order(sites(name, call["cap_feats"][0].shape[0])) for _ in range(2))
    guided = [row for row in range(rows) if names[row // 2] == "cond"]
    expected = in_step(shared(name), (call, other), SPEC, read, run=run, rows=guided)
    assert difference(found, expected) < 1e-5
    assert difference(found, run(shared(name), call)) > 0.02


def test_both_texts_are_longer_than_the_example():
    """Between the image and the text lie other tokens, before it its history."""
    name = "HunyuanVideoFramepackTransformer3DModel"
    call, random = MODELS[name].inputs(), torch.Generator().manual_seed(2)
    patched = sloth_fx.transform(shared(name), SPEC, example_inputs=MODELS[name].inputs())
    tokens = call[TEXT].shape[1] + 9
    texts = torch.randn(2, 2, tokens, call[TEXT].shape[2], generator=random)
    mask = torch.ones(2, tokens, dtype=call[MASK].dtype)
    sloth_fx.context(patched).set_negative(**{TEXT: texts[1]})
    calls = tuple({**call, TEXT: text, MASK: mask} for text in texts)
    read = tuple(in_order(sites(name, tokens)) for _ in range(2))
    assert difference(at(patched, 0.1, calls[0]), in_step(shared(name), calls, SPEC, read, run=run)) < 1e-5


def test_a_host_that_takes_one_length_says_so():
    name = "CogVideoXTransformer3DModel"
    call = MODELS[name].inputs()
    patched = sloth_fx.transform(shared(name), SPEC, example_inputs=MODELS[name].inputs())
    sloth_fx.context(patched).set_negative(**text_of(call, (), 9, 2))
    with pytest.raises(sloth_fx.SlothError, match=r"meets 310\|306 tokens\. .* or pad both to the same length"):
        at(patched, 0.1, call)


def test_with_classifier_free_guidance():
    """Rows that are not guided stay as they are, whatever the length of the negative text."""
    name = "SD3Transformer2DModel/sd35"
    call, model = MODELS[name].inputs(4), shared(name)
    context = sloth_fx.context(patched := sloth_fx.transform(model, SPEC, example_inputs=MODELS[name].inputs()))
    context.rows = ("uncond", "cond")
    negative = text_of(call, (), 9, 2)
    context.set_negative(**negative)
    found = at(patched, 0.1, call)
    other = {**call, TEXT: negative[TEXT].repeat(2, 1, 1)}
    read = tuple(in_order(sites(name, length)) for length in (call[TEXT].shape[1], 9))
    expected = in_step(model, (call, other), SPEC, read, run=run, rows=(2, 3))
    assert difference(found, expected) < 1e-5
    assert difference([each[:2] for each in found], [each[:2] for each in run(model, call)]) < 1e-5
