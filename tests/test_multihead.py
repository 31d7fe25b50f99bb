"""Owners that are torch's own attention module."""

import copy

import pytest
import torch
from torch import nn

import sloth_fx
from sloth_fx.spec import TokenDownsample
from tests.test_owners import NEUTRAL, every_2nd, inputs


class Torch(nn.Module):
    def __init__(self, batch_first=True, bias=True, context=None):
        super().__init__()
        self.proj_in, self.batch_first = nn.Conv2d(4, 16, 1), batch_first
        widths = {} if context is None else {"kdim": context, "vdim": context}
        self.attend = nn.MultiheadAttention(16, 2, bias=bias, batch_first=batch_first)
        self.cross = nn.MultiheadAttention(16, 2, bias=bias, batch_first=batch_first, **widths)

    def forward(self, sample, text):
        x = self.proj_in(sample).flatten(2).mT
        x, text = (x, text) if self.batch_first else (x.transpose(0, 1), text.transpose(0, 1))
        x = x + self.attend(x, x, x, need_weights=False)[0]
        x = x + self.cross(x, text, text, need_weights=False)[0]
        return x if self.batch_first else x.transpose(0, 1)


TORCH = [{}, {"batch_first": False}, {"bias": False}, {"context": 24}]


def torch_inputs(options):
    return inputs([(3, 4, 5, 9), (3, 7, options.get("context", 16))])


@pytest.mark.parametrize("options", TORCH, ids=str)
def test_sites_of_multihead_attention(options):
    found = list(sloth_fx.inspect(Torch(**options), example_inputs=torch_inputs(options)))
    assert [(site.path, site.kind, site.heads, site.head_dim) for site in found] == [
        ("attend", "self", 2, 8),
        ("cross", "cross", 2, 8),
    ]
    assert {(site.grid, site.q_tokens) for site in found} == {((5, 9), 45)}
    assert [(site.kv_tokens, site.text) for site in found] == [(45, None), (7, (0, 7))]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("spec", NEUTRAL, ids=lambda spec: type(spec).__name__)
@pytest.mark.parametrize("options", TORCH, ids=str)
def test_multihead_attention_is_the_same_to_the_bit_when_neutral(options, spec, grad):
    model, given = Torch(**options).eval(), torch_inputs(options)
    patched = sloth_fx.transform(model, spec, example_inputs=given)
    with torch.set_grad_enabled(grad):
        assert torch.equal(patched(*given), model(*given))


@pytest.mark.parametrize("options", TORCH, ids=str)
def test_multihead_attention_over_fewer_keys(options):
    model, given = Torch(**options).eval(), torch_inputs(options)
    patched = sloth_fx.transform(model, TokenDownsample(), example_inputs=given)
    with torch.no_grad():
        exact, (sample, text) = copy.deepcopy(model).double(), (each.double() for each in given)
        x = exact.proj_in(sample).flatten(2).mT
        few = every_2nd(5)(x)
        if not exact.batch_first:
            x, few, text = (each.transpose(0, 1) for each in (x, few, text))
        x = x + exact.attend(x, few, few)[0]
        x = x + exact.cross(x, text, text)[0]
        expected = x if exact.batch_first else x.transpose(0, 1)
        assert (patched(*given) - expected).abs().max() < 1e-5
        assert (model(*given) - expected).abs().max() > 1e-3
