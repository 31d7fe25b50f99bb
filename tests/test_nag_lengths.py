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
}


def text_of(call: dict[str, Any], others: tuple[str, ...], tokens: int, rows: int) -> dict[str, Any]:
    """Another text of so many tokens, with a mask that hides its last two."""
    known = call[TEXT].shape[1]
    random = torch.Generator().manual_seed(tokens)
    found = {TEXT: torch.randn((rows, tokens, *call[TEXT].shape[2:]), generator=random)}
    for name in others:
        given = call[name]
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
