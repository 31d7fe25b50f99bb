"""A rewrite that would not run with fewer keys is noticed, and done another way."""

import pytest
import torch

import sloth_fx
from sloth_fx.passes.core import attention_cores
from tests import models
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
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class Causal(FixedReshape):
    def forward(self, x):
        q, k, v = (self.heads(each(x)) for each in (self.to_q, self.to_k, self.to_v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("attention", [Masked, Causal])
def test_masks_are_reduced_with_the_keys(attention):
    model, x = Denoiser(attention()), torch.randn(2, 4, 9, 11)
    spec = sloth_fx.SlothfulAttention(in_=sloth_fx.Reduction(rate=4.0), schedule=sloth_fx.Constant())
    patched = sloth_fx.transform(model, spec, example_inputs=(x,))
    q, k, v = (
        to(model.enter(x).flatten(2).transpose(1, 2)).unflatten(-1, (2, 6)).transpose(1, 2).double()
        for to in (model.attention.to_q, model.attention.to_k, model.attention.to_v)
    )
    picked = [row * 11 + column for row in range(0, 9, 2) for column in range(0, 11, 2)]
    scores = q @ k[:, :, picked].mT / 6**0.5
    scores = scores.masked_fill(torch.tensor(picked) > torch.arange(99)[:, None], -torch.inf)
    tokens = (scores.softmax(-1) @ v[:, :, picked]).transpose(1, 2).flatten(2).float()
    expected = model.leave(tokens.transpose(1, 2).reshape(2, CHANNELS, 9, 11))
    assert torch.allclose(patched(x), expected, atol=1e-6)
    assert not torch.allclose(model(x), expected, atol=1e-3)


class Dropout(FixedReshape):
    """Drops attention in training only, scales by a traced number, and holds a plain tensor."""

    def __init__(self):
        super().__init__()
        self.table = torch.arange(5.0)

    def forward(self, x):
        q, k, v = (self.heads(each(x)) for each in (self.to_q, self.to_k, self.to_v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, dropout_p=0.9 if self.training else 0.0, scale=q.shape[-1] ** -0.5
        )
        return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("tile", [2, 4096])
def test_training_is_followed_and_so_are_the_options_of_the_host(training, tile):
    model, x = Denoiser(Dropout()).train(training), torch.randn(2, 4, 9, 11)
    patched = sloth_fx.transform(model, sloth_fx.NearSightedTile(tile_size=tile, global_ratio=0), example_inputs=(x,))
    for mode in (True, False, True):
        model.train(mode)
        patched.train(mode)
        torch.manual_seed(0)
        first = patched(x)
        torch.manual_seed(1)
        assert torch.equal(patched(x), first) is not mode
        if tile == 4096:
            torch.manual_seed(0)
            assert torch.equal(model(x), first)


def test_a_concatenation_before_the_blocks_is_no_skip_connection():
    class Concatenating(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = torch.nn.Conv2d(4, 2, 1), torch.nn.Conv2d(4, 2, 1)
            self.unet = models.shared("sd15")

        def forward(self, sample, timestep, text):
            both = torch.cat([self.one(sample), self.two(sample)], 1)
            return self.unet(both, timestep, text).sample

    values = models.inputs(models.shared("sd15"))
    report = sloth_fx.inspect(Concatenating(), example_inputs=(values["sample"], 500, values["encoder_hidden_states"]))
    stages = [site.stage for site in sloth_fx.inspect(models.shared("sd15"))]
    assert [site.stage for site in report] == stages


def test_sites_without_a_grid_are_left_alone_unless_they_are_named():
    class Both(torch.nn.Module):
        """Attention over the image, and over rows of tokens that no feature map has."""

        def __init__(self):
            super().__init__()
            self.image, self.other = Denoiser(FixedReshape()), FixedReshape()

        def forward(self, x):
            return self.image(x) + self.other(torch.ones(2, 17, CHANNELS)).mean()

    x = torch.randn(2, 4, 9, 11)
    with pytest.raises(sloth_fx.SlothError, match=r"other: .* grid of its 17 tokens is unknown"):
        sloth_fx.transform(Both(), sloth_fx.SlothfulAttention(where="self"), example_inputs=(x,))
    report = sloth_fx.report(sloth_fx.transform(Both(), sloth_fx.SlothfulAttention(), example_inputs=(x,)))
    assert [site.operators for site in report] == [("SlothfulAttention",), ()]
    assert "unknown" in report.sites[1].note
