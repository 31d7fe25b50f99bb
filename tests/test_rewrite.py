"""A rewrite that would not run with fewer keys is noticed, and done another way."""

import pytest
import torch

import sloth_fx
from sloth_fx.passes.core import attention_cores
from tests.passes.test_passes import CHANNELS, FixedReshape


class Denoiser(torch.nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.enter, self.leave = torch.nn.Conv2d(4, CHANNELS, 1), torch.nn.Conv2d(CHANNELS, 4, 1)
        self.attention = attention

    def forward(self, x, timestep=None):
        x = self.enter(x)
        tokens = self.attention(x.flatten(2).transpose(1, 2))
        return self.leave(tokens.transpose(1, 2).reshape(x.shape))


def test_reduction_moves_to_the_core_where_reshapes_count_queries():
    model, x = Denoiser(FixedReshape()), torch.randn(2, 4, 9, 11)
    spec = sloth_fx.SlothfulAttention(in_=sloth_fx.Reduction(rate=4.0), schedule=sloth_fx.Constant())
    patched = sloth_fx.transform(model, spec, example_inputs=(x,))
    (site,) = sloth_fx.report(patched)
    assert site.note == "keys and values reduced at the attention's keys and values"
    (core,) = attention_cores(sloth_fx.graph(patched, "attention"))
    q, k, v = (
        to(model.enter(x).flatten(2).transpose(1, 2)).unflatten(-1, (2, 6)).transpose(1, 2)
        for to in (model.attention.to_q, model.attention.to_k, model.attention.to_v)
    )
    k, v = (each.unflatten(2, (9, 11))[:, :, ::2, ::2].flatten(2, 3) for each in (k, v))
    out = core.attend(q, k, v).transpose(1, 2).flatten(2)
    expected = model.leave(out.transpose(1, 2).reshape(2, CHANNELS, 9, 11))
    assert torch.allclose(patched(x), expected, atol=1e-6)


class Masked(FixedReshape):
    def forward(self, x):
        q, k, v = (self.heads(each(x)) for each in (self.to_q, self.to_k, self.to_v))
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def test_masked_attention_is_refused_by_name():
    model = Denoiser(Masked())
    with pytest.raises(sloth_fx.SlothError, match=r"attention: .*masked or causal"):
        sloth_fx.transform(model, sloth_fx.SlothfulAttention(), example_inputs=(torch.randn(2, 4, 9, 11),))
    patched = sloth_fx.transform(
        model, sloth_fx.SlothfulAttention(), example_inputs=(torch.randn(2, 4, 9, 11),), strict=False
    )
    (site,) = sloth_fx.report(patched)
    assert site.operators == ()
    assert "masked" in site.note
    x = torch.randn(2, 4, 9, 11)
    assert torch.equal(patched(x), model(x))
