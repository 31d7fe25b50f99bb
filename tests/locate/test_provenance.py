"""Places of what is computed: maps at other scales, layers, sums, and attention that is spelled out."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from sloth_fx.locate.places import NOWHERE
from sloth_fx.locate.tags import places_of
from tests.locate.follow import IMAGE, SEQUENCE, TEXT, VIDEO, Run, numbered


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_a_border_of_copies(mode):
    """Padded by the host, and convolved without padding: every pixel once."""
    x = Run(lambda x: F.conv2d(F.pad(x, (1, 1, 1, 1), mode=mode), torch.empty(4, 3, 3, 3)), IMAGE).places
    assert (x[:, 0] == numbered(IMAGE)[0].numpy()[:, 0]).all()


def _patches(x):
    return rearrange(x, "b c (h p) (w q) -> b (c p q) h w", p=2, q=2)


SCALED = {
    "patches": lambda x: F.conv2d(x, torch.empty(4, 3, 2, 2), stride=2),
    "halved": lambda x: F.conv2d(x, torch.empty(4, 3, 3, 3), stride=2, padding=1),
    "padded_at_the_end": lambda x: F.conv2d(F.pad(x, (0, 1, 0, 1)), torch.empty(4, 3, 3, 3), stride=2),
    "wrapped_around": lambda x: _patches(F.pad(x[:, :, :5, :9], (0, 1, 0, 1), mode="circular")),
    "average": lambda x: F.avg_pool2d(x, 2),
    "maximum": lambda x: F.max_pool2d(x, 2),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, (3, 5)),
    "nearest": lambda x: F.interpolate(x, size=(3, 5)),
    "bilinear": lambda x: F.interpolate(x, scale_factor=0.5, mode="bilinear"),
    "strided": lambda x: x[:, :, ::2, ::2],
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "einops": _patches,
    "unfolded": lambda x: F.unfold(x, 2, stride=2).unflatten(-1, (3, 5)),
}


@pytest.mark.parametrize("name", SCALED)
def test_a_token_of_a_coarser_map_lies_in_its_cell(name):
    """Whatever made it: the places of (B, C, 3, 5) are 15 pixels, rows below rows and columns beside columns."""
    places = Run(SCALED[name], IMAGE).places.min(1, keepdims=True)
    batch, channel, row, column = np.unravel_index(places, IMAGE)
    assert places.shape == (2, 1, 3, 5)
    assert (batch == np.arange(2).reshape(2, 1, 1, 1)).all()
    assert (channel == 0).all()
    assert (row == row[:1, :, :, :1]).all()
    assert (column == column[:1, :, :1]).all()
    assert (np.diff(row, axis=2) > 0).all()
    assert (np.diff(column, axis=3) > 0).all()


def test_an_upsampled_map_has_the_places_of_the_one_that_it_joins():
    def decoder(x):
        fine = F.conv2d(x, torch.empty(3, 3, 3, 3), padding=1)
        coarse = F.conv2d(fine, torch.empty(3, 3, 3, 3), stride=2, padding=1)
        return torch.cat([F.interpolate(coarse, scale_factor=2), fine], 1), F.interpolate(coarse, scale_factor=2)

    run = Run(lambda x: decoder(x)[0], IMAGE)
    assert (run.places == numbered(IMAGE)[0].numpy()[:, :1]).all()
    assert (Run(lambda x: decoder(x)[1], IMAGE).places == numbered(IMAGE)[0].numpy()[:, :1]).all()


def test_an_upsampled_map_of_a_size_that_was_never_seen_repeats_places():
    [numbers] = numbered(IMAGE)
    places = Run(lambda x: F.interpolate(x, scale_factor=3), IMAGE).places
    assert (places[:, 0] == numbers.repeat_interleave(3, 2).repeat_interleave(3, 3).numpy()[:, 0]).all()


def test_a_causal_convolution_of_frames():
    """Two frames of nothing in front: the first result stands for the first frame."""
    convolve = lambda x: F.conv3d(F.pad(x, (1, 1, 1, 1, 2, 0)), torch.empty(4, 3, 3, 3, 3))  # noqa: E731
    assert (Run(convolve, VIDEO).places == numbered(VIDEO)[0].numpy()[:, :1]).all()


def test_a_convolution_of_a_sequence():
    waveform = (2, 3, 15)
    assert (
        Run(lambda x: F.conv1d(x, torch.empty(4, 3, 5), padding=2), waveform).places
        == numbered(waveform)[0].numpy()[:, :1]
    ).all()
    halved = Run(lambda x: F.conv1d(x, torch.empty(4, 3, 3), stride=2, padding=1), waveform).places
    assert halved.shape == (2, 4, 8)
    assert (np.diff(halved[:, 0], axis=1) > 0).all()


KEPT = {
    "linear": lambda x: F.linear(x, torch.empty(9, 4), torch.empty(9)),
    "matmul": lambda x: x @ torch.empty(4, 9),
    "einsum": lambda x: torch.einsum("bnc,cd->bnd", x, torch.empty(4, 9)),
    "einsum_with_heads": lambda x: torch.einsum("bnc,hcd->bhnd", x, torch.empty(2, 4, 9))[:, 1],
    "layer_norm": lambda x: F.layer_norm(x, (4,)),
    "rms_norm": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "group_norm": lambda x: F.group_norm(x.mT, 2).mT,
    "modulated": lambda x: x * (1 + torch.empty(3, 1, 4)) + torch.empty(15, 4),
    "residual": lambda x: x + F.gelu(F.linear(x, torch.empty(4, 4))),
    "in_place": lambda x: x.clone().mul_(2).add_(torch.empty(3, 1, 4)),
    "gated": lambda x: torch.cat([x, x], -1).chunk(2, -1)[0] * torch.sigmoid(x),
    "half": lambda x: x.to(torch.float16).float(),
    "rotated": lambda x: torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2),
    "rotated_by_complex_numbers": lambda x: torch.view_as_real(
        torch.view_as_complex(x.unflatten(-1, (2, 2))) * torch.polar(torch.ones(15, 2), torch.zeros(15, 2))
    ).flatten(-2),
    "attended": lambda x: F.scaled_dot_product_attention(x, x.flip(1), x.flip(1)),
    "attended_by_hand": lambda x: (x @ x.flip(1).mT).softmax(-1) @ x.flip(1),
    "masked": lambda x: x.masked_fill((torch.arange(15) > 9)[:, None], 0.0),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_works_on_each_token_keeps_its_place(name):
    expected = np.arange(45).reshape(3, 15) * 4
    places = Run(KEPT[name], SEQUENCE).places
    assert (places.min(-1) == expected).all()
    assert (places // 4 == expected[..., None] // 4).all()


THIN = {
    "linear": lambda x: x,
    "clone": lambda x: x.clone(),
    "heads": lambda x: x.unflatten(-1, (2, 3)).transpose(1, 2).transpose(1, 2).flatten(2),
    "gated": lambda x: torch.cat([x, x], -1),
    "rotated": lambda x: torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2),
    "attended": lambda x: F.scaled_dot_product_attention(x, x, x),
    "with_text": lambda x: torch.cat([x, x.roll(1, 1)], 1),
}


@pytest.mark.parametrize("name", THIN)
def test_channels_cost_nothing(name):
    """Of what a layer gives, all channels of a token have one place, which is kept once."""
    places = places_of(Run(lambda x: THIN[name](F.linear(x, torch.empty(6, 4))), SEQUENCE).result)
    assert places.strides[-1] == 0
    assert places.shape[-1] in (6, 12)


LOST = {
    "sum": lambda x: x.sum(1),
    "mean": lambda x: x.mean(1, keepdim=True).expand(3, 15, 4),
    "sorted": lambda x: x.sort(1).values,
    "gathered_by_what_was_computed": lambda x: x.gather(1, x.argsort(1)),
    "scattered_by_what_was_computed": lambda x: torch.empty_like(x).scatter(1, x.argsort(1), x),
    "picked_by_what_was_computed": lambda x: x[:, x[0, :, 0].argsort()],
    "rolled_along_everything": lambda x: x.roll(2),
    "an_unknown_shape": lambda x: x.as_strided((3, 15, 4), (60, 1, 15)),
}


@pytest.mark.parametrize("name", LOST)
def test_what_mixes_tokens_has_no_place(name):
    places = Run(LOST[name], SEQUENCE).places
    assert places is None or (places == NOWHERE).all()


def test_the_first_input_names_what_several_have_a_part_in():
    image, text = numbered(SEQUENCE, SEQUENCE)
    assert (Run(lambda x, y: y + x, SEQUENCE, SEQUENCE).places == image.numpy()).all()
    assert (Run(lambda x, y: torch.cat([y, x], 1), SEQUENCE, TEXT).places[:, 7:] == image.numpy()).all()
    assert (Run(lambda x, y: torch.cat([y, x], 1), SEQUENCE, SEQUENCE).places[:, :15] == text.numpy()).all()


# Attention that is spelled out


SPELLED_OUT = {
    "matmul": lambda q, k: (q @ k.mT / 3).softmax(-1) @ k,
    "bmm": lambda q, k: torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)), -1), k),
    "baddbmm": lambda q, k: torch.baddbmm(torch.empty(3, 15, 7), q, k.mT, beta=0).softmax(-1) @ k,
    "einsum": lambda q, k: torch.einsum("bij,bjd->bid", torch.einsum("bid,bjd->bij", q, k).softmax(-1), k),
    "masked": lambda q, k: (q @ k.mT).masked_fill(torch.empty(15, 7, dtype=torch.bool), -1e4).softmax(-1) @ k,
    "upcast": lambda q, k: (q.double() @ k.double().mT).softmax(-1, dtype=torch.float64).float() @ k,
    "transposed": lambda q, k: (k.mT @ (k @ q.mT).softmax(1)).mT,
    "dropout": lambda q, k: F.dropout((q @ k.mT).softmax(-1), 0.1) @ k,
}


@pytest.mark.parametrize("name", SPELLED_OUT)
def test_attention_that_is_spelled_out(name):
    run = Run(SPELLED_OUT[name], SEQUENCE, TEXT)
    assert len(run.attentions) == 1
    if name != "transposed":
        [scores] = run.attentions
        assert tuple(scores.query.shape[-2:]) == (15, 4)
        assert tuple(scores.key_transposed.shape[-2:]) == (4, 7)


class Pooled(nn.Module):
    """Tokens weighed by a score that each of them has by itself."""

    def __init__(self):
        super().__init__()
        self.score = nn.Linear(4, 1)

    def forward(self, x):
        return self.score(x).softmax(1).mT @ x


class Routed(nn.Module):
    """A mixture of experts: each token weighs them by itself."""

    def __init__(self):
        super().__init__()
        self.route, self.experts = nn.Linear(4, 2, bias=False), nn.Parameter(torch.zeros(2, 4))

    def forward(self, x):
        return self.route(x).softmax(-1) @ self.experts


@pytest.mark.parametrize("model", [Pooled, Routed])
def test_a_softmax_of_what_a_layer_gives_is_no_attention(model):
    assert Run(model(), SEQUENCE).attentions == []


LINEAR = {
    "relu": lambda q, k, v: F.relu(q) @ (F.relu(k).mT @ v),
    "normalised": lambda q, k, v: q.softmax(-1) @ (k.softmax(1).mT @ v),
    "einsum": lambda q, k, v: torch.einsum("bnd,bde->bne", q, torch.einsum("bnd,bne->bde", k, v)),
    "channels_first": lambda q, k, v: (v.mT @ k) @ q.mT,
}


class Projected(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.to_qkv, self.way = nn.Linear(4, 12), way

    def forward(self, x):
        return self.way(*self.to_qkv(x).chunk(3, -1))


@pytest.mark.parametrize("name", LINEAR)
def test_attention_without_a_softmax_over_keys(name):
    run = Run(Projected(LINEAR[name]), SEQUENCE)
    assert run.linear == 1
    assert run.attentions == []


def test_two_attentions_are_no_linear_one():
    run = Run(Projected(lambda q, k, v: (q @ k.mT).softmax(-1) @ ((k @ q.mT).softmax(-1) @ v)), SEQUENCE)
    assert (run.linear, len(run.attentions)) == (0, 2)
