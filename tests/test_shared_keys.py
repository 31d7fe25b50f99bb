"""Keys that more than one reduced attention uses, and a model that is its own owner."""

import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sloth_fx
from sloth_fx.spec import SlothfulAttention, TokenDownsample

LATENT = (2, 4, 5, 9)


class Twice(nn.Module):
    """Two attentions over the same keys and values; the keys are given out, too."""

    def __init__(self):
        super().__init__()
        self.proj_in, self.to_out = nn.Conv2d(4, 16, 1), nn.Linear(16, 4)
        self.to_q, self.to_other, self.to_k, self.to_v = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, sample, cache=None):
        x = self.proj_in(sample).flatten(2).mT
        layers = (self.to_q, self.to_other, self.to_k, self.to_v)
        query, other, key, value = (layer(x).unflatten(-1, (2, 8)).transpose(1, 2) for layer in layers)
        if cache is not None:
            cache[:] = key
        first = F.scaled_dot_product_attention(query, key, value)
        second = F.scaled_dot_product_attention(other, key, value)
        return key, first, second, self.to_out((first + second).transpose(1, 2).flatten(2))


def model_and_inputs():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Twice().eval().requires_grad_(False), torch.randn(LATENT)


def every_2nd(tensor):
    return tensor.unflatten(2, LATENT[2:])[:, :, ::2, ::2].flatten(2, 3)


@pytest.mark.parametrize("stage", ["in", "out"])
def test_the_other_attention_keeps_its_keys(stage):
    model, latent = model_and_inputs()
    spec = TokenDownsample(factors=(2,), where={"stage": stage})
    patched = sloth_fx.transform(model, spec, example_inputs=(latent,))
    expected, found = list(model(latent)), patched(latent)
    query = model.to_q if stage == "in" else model.to_other
    tokens = model.proj_in(latent).flatten(2).mT
    query, key, value = (
        layer(tokens).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (query, model.to_k, model.to_v)
    )
    scores = query.double() @ every_2nd(key).double().mT / 8**0.5
    reduced = scores.softmax(-1) @ every_2nd(value).double()
    expected[1 if stage == "in" else 2] = reduced.to(latent.dtype)
    for each, other in zip(found[:3], expected[:3], strict=True):
        torch.testing.assert_close(each, other, atol=1e-5, rtol=0)
    assert not torch.allclose(found[3], expected[3], atol=1e-4)


def test_a_cache_gets_all_keys():
    model, latent = model_and_inputs()
    caches = [torch.zeros(2, 2, 45, 8) for _ in range(2)]
    patched = sloth_fx.transform(model, SlothfulAttention(), example_inputs=(latent, caches[1]))
    sloth_fx.context(patched).at(0.4)
    for each, cache in zip((model, patched), caches, strict=True):
        each(latent, cache)
    assert caches[0].abs().sum() > 0
    torch.testing.assert_close(caches[1], caches[0])


def test_the_first_call_of_a_model_that_is_its_own_owner():
    model, latent = model_and_inputs()
    patched = sloth_fx.transform(model, TokenDownsample(factors=(2,)))
    assert "first call" in str(sloth_fx.report(patched))
    with pytest.raises(sloth_fx.SlothError):  # nothing is lost by a call that does not work
        patched(latent[:, :3])
    first, second = patched(latent), patched(latent)
    assert all(map(torch.equal, first, second))
    assert not torch.equal(first[3], model(latent)[3])


def test_a_forward_of_its_own_comes_back():
    model, latent = model_and_inputs()
    model.forward = types.MethodType(lambda self, sample: Twice.forward(self, sample)[3], model)
    patched = sloth_fx.transform(model, TokenDownsample(factors=(2,)))
    assert patched(latent).shape == (2, 45, 4)
    assert model(latent).shape == (2, 45, 4)
