"""Whole models: stages, depth, adapters, and what a second size tells."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sloth_fx
from sloth_fx import SlothError
from sloth_fx.locate import as_call, survey
from sloth_fx.model_adapters import adapter_for, register_adapter, registry
from tests.locate.tiny import Attention

SIZES = [(2, 13, 21), (3, 9, 6)]


def tokens_of(x):
    return x.flatten(2).mT


# Stages


class Stack(nn.Module):
    """Self-attention and cross-attention by turns, at one scale."""

    def __init__(self, blocks):
        super().__init__()
        self.own, self.cross = (nn.ModuleList(Attention() for _ in range(blocks)) for _ in range(2))

    def forward(self, sample, text):
        x = tokens_of(sample)
        for own, cross in zip(self.own, self.cross, strict=True):
            x = cross(own(x), text)
        return x


@pytest.mark.parametrize(("blocks", "inputs"), [(1, 1), (2, 1), (5, 3), (6, 3)])
@pytest.mark.parametrize(("batch", "rows", "columns"), SIZES)
def test_the_first_half_of_a_stack_is_input(blocks, inputs, batch, rows, columns):
    example = torch.zeros(batch, 4, rows, columns), torch.zeros(batch, 7, 4)
    found = list(sloth_fx.inspect(Stack(blocks), example_inputs=example))
    assert [site.kind for site in found] == ["self", "cross"] * blocks
    assert [site.stage for site in found] == ["in"] * (2 * inputs) + ["out"] * (2 * (blocks - inputs))
    assert {site.depth for site in found} == {1}


class UNet(nn.Module):
    """Three levels; ``skips`` are added or concatenated, ``decoder`` may be missing."""

    def __init__(self, skips=True, decoder=True, halve="conv", double="nearest"):
        super().__init__()
        self.conv_in = nn.Conv2d(4, 8, 3, padding=1)
        self.inputs = nn.ModuleList(Attention() for _ in range(3))
        self.halve = nn.ModuleList(nn.Conv2d(8, 8, 3, stride=2, padding=1) for _ in range(2))
        self.middle = Attention()
        self.outputs = nn.ModuleList(Attention() for _ in range(3))
        self.join = nn.ModuleList(nn.Conv2d(16, 8, 1) for _ in range(3))
        self.skips, self.decoder, self.how, self.back = skips, decoder, halve, double

    def attend(self, attention, x):
        return x + attention(tokens_of(x)).mT.unflatten(2, x.shape[2:])

    def smaller(self, level, x):
        if self.how == "conv":
            return self.halve[level](x)
        return (
            F.avg_pool2d(x, 2, ceil_mode=True)
            if self.how == "pool"
            else F.interpolate(x, size=[(size + 1) // 2 for size in x.shape[2:]])
        )

    def forward(self, sample):
        x, kept = self.conv_in(sample), []
        for level, attention in enumerate(self.inputs):
            x = self.smaller(level - 1, x) if level else x
            x = self.attend(attention, x)
            kept.append(x)
        x = self.attend(self.middle, x)
        if not self.decoder:
            return x
        for attention, join in zip(self.outputs, self.join, strict=True):
            skip = kept.pop()
            if skip.shape[2:] != x.shape[2:]:
                x = F.interpolate(x, size=skip.shape[2:], mode=self.back)
            x = join(torch.cat([x, skip], 1)) if self.skips else x + skip
            x = self.attend(attention, x)
        return x


def grids(rows, columns):
    sizes = [(rows, columns)]
    for _ in range(2):
        sizes.append(tuple((size + 1) // 2 for size in sizes[-1]))
    return sizes


@pytest.mark.parametrize("double", ["nearest", "bilinear"])
@pytest.mark.parametrize("halve", ["conv", "pool", "interpolate"])
@pytest.mark.parametrize(("batch", "rows", "columns"), SIZES)
def test_stages_of_a_unet(halve, double, batch, rows, columns):
    model = UNet(halve=halve, double=double)
    found = list(sloth_fx.inspect(model, example_inputs=(torch.zeros(batch, 4, rows, columns),)))
    fine, half, quarter = grids(rows, columns)
    assert [(site.stage, site.depth, site.grid) for site in found] == [
        *(("in", 1, fine), ("in", 2, half), ("in", 4, quarter)),
        ("middle", 4, quarter),
        *(("out", 4, quarter), ("out", 2, half), ("out", 1, fine)),
    ]
    assert [site.divisors for site in found] == [(2**n,) * 2 for n in (0, 1, 2, 2, 2, 1, 0)]


@pytest.mark.parametrize(("batch", "rows", "columns"), SIZES)
def test_half_a_unet_is_input(batch, rows, columns):
    found = list(sloth_fx.inspect(UNet(decoder=False), example_inputs=(torch.zeros(batch, 4, rows, columns),)))
    assert [(site.stage, site.depth) for site in found] == [("in", 1), ("in", 2), ("in", 4), ("in", 4)]


@pytest.mark.parametrize(("batch", "rows", "columns"), SIZES)
def test_depth_of_an_attention_that_begins_below_the_latent(batch, rows, columns):
    model = UNet()
    model.inputs[0], model.outputs[2] = nn.Identity(), nn.Identity()
    found = list(sloth_fx.inspect(model, example_inputs=(torch.zeros(batch, 4, rows, columns),)))
    assert [(site.depth, site.downscale) for site in found] == [(1, 2), (2, 4), (2, 4), (2, 4), (1, 2)]


# Layouts of the latent


class Sound(nn.Module):
    """A waveform (B, C, L)."""

    def __init__(self):
        super().__init__()
        self.conv_in, self.down = nn.Conv1d(2, 4, 3, padding=1), nn.Conv1d(4, 4, 3, stride=2, padding=1)
        self.fine, self.coarse = Attention(), Attention()

    def forward(self, waveform):
        x = self.conv_in(waveform)
        return self.fine(x.mT), self.coarse(self.down(x).mT)


class Frames(nn.Module):
    """A sequence of feature vectors (B, L, C)."""

    def __init__(self):
        super().__init__()
        self.proj_in, self.attention = nn.Linear(6, 4), Attention()

    def forward(self, features, text):
        return self.attention(torch.cat([text, self.proj_in(features)], 1))


class Packed(nn.Module):
    """An image that comes as tokens (B, N, C), and whose size is said apart."""

    def __init__(self):
        super().__init__()
        self.proj_in, self.attention = nn.Linear(6, 4), Attention()

    def forward(self, tokens, text, rows, columns):
        return self.attention(torch.cat([self.proj_in(tokens), text], 1))


class ChannelsLast(nn.Module):
    """A map (B, H, W, C)."""

    def __init__(self):
        super().__init__()
        self.attention = Attention()

    def forward(self, image):
        return self.attention(image.flatten(1, 2))


@pytest.fixture
def adapters(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})


@pytest.mark.usefixtures("adapters")
@pytest.mark.parametrize("batch", [2, 3])
def test_a_waveform(batch):
    register_adapter(Sound, latent="waveform", axes="bcw")
    fine, coarse = sloth_fx.inspect(Sound(), example_inputs=(torch.zeros(batch, 2, 27),))
    assert [(site.kind, site.grid, site.q_tokens) for site in (fine, coarse)] == [
        ("self", (1, 27), 27),
        ("self", (1, 14), 14),
    ]
    assert fine.divisors == (1, 1)
    assert coarse.divisors is not None
    assert coarse.grid_at((1, 51)) == (1, 26)
    assert coarse.depth == 2


@pytest.mark.usefixtures("adapters")
@pytest.mark.parametrize("batch", [2, 3])
def test_a_sequence_of_features(batch):
    register_adapter(Frames, latent="features", axes="bwc", text=("text",))
    [site] = sloth_fx.inspect(Frames(), example_inputs=(torch.zeros(batch, 27, 6), torch.zeros(batch, 7, 4)))
    assert (site.kind, site.grid, site.divisors, site.text) == ("joint", (1, 27), (1, 1), (0, 7))
    assert site.key_place.start(34, 27) == 7


@pytest.mark.parametrize("batch", [2, 3])
def test_a_sequence_that_nobody_has_described(batch):
    """Its tokens may be an image in some order: their grid is not known."""
    [site] = sloth_fx.inspect(Frames(), example_inputs=(torch.zeros(batch, 27, 6), torch.zeros(batch, 7, 4)))
    assert (site.kind, site.text, site.divisors) == ("joint", (0, 7), None)
    assert site.on_image


@pytest.mark.usefixtures("adapters")
@pytest.mark.parametrize(("batch", "rows", "columns"), SIZES)
def test_an_image_in_tokens(batch, rows, columns):
    register_adapter(Packed, latent="tokens", sizes=("rows", "columns"))
    example = torch.zeros(batch, rows * columns, 6), torch.zeros(batch, 7, 4), rows, columns
    [site] = sloth_fx.inspect(Packed(), example_inputs=example)
    assert (site.kind, site.grid, site.divisors) == ("joint", (rows, columns), (1, 1))
    assert site.text == (rows * columns, rows * columns + 7)
    assert site.query_place.start(site.q_tokens, rows * columns) == 0


@pytest.mark.usefixtures("adapters")
@pytest.mark.parametrize(("batch", "rows", "columns"), SIZES)
def test_channels_last(batch, rows, columns):
    register_adapter(ChannelsLast, axes="bhwc")
    [site] = sloth_fx.inspect(ChannelsLast(), example_inputs=(torch.zeros(batch, rows, columns, 4),))
    assert (site.kind, site.grid, site.divisors) == ("self", (rows, columns), (1, 1))


# What a survey holds


def test_owners_of_one_structure():
    """Three of each: they are seen once more at another size, the first of each structure alone."""
    model = Stack(3)
    found = survey(model, adapter_for(model), ((torch.zeros(2, 4, 5, 9), torch.zeros(2, 7, 4)), {}))
    assert found.latent == (1, 5, 9)
    assert [len(visits) for visits in found.visits.values()] == [1] * 6
    own, cross = found.structure["own.0"], found.structure["cross.0"]
    assert [found.structure[f"own.{i}"] == own for i in range(3)] == [True] * 3
    assert [found.structure[f"cross.{i}"] == cross for i in range(3)] == [True] * 3
    assert own != cross
    [again] = found.resized[own]
    assert again.call[0][0].shape == (3, 10 * 27, 4)
    [again] = found.resized[cross]
    assert [tensor.shape for tensor in again.call[0]] == [(3, 10 * 27, 4), (3, 10, 4)]


class Fixed(Stack):
    """Runs at one size alone."""

    def forward(self, sample, text):
        if sample.shape != (2, 4, 5, 9):
            raise ValueError("this size is not supported")
        return super().forward(sample, text)


def test_a_model_that_runs_at_one_size_alone():
    model = Fixed(2)
    found = survey(model, adapter_for(model), ((torch.zeros(2, 4, 5, 9), torch.zeros(2, 7, 4)), {}))
    assert found.resized == {}
    assert [site.grid for site in found.sites] == [(5, 9)] * 4


class Experts(nn.Module):
    """Steered by what it computes: such a model is run on data, not on shapes alone."""

    def __init__(self):
        super().__init__()
        self.proj_in, self.attention = nn.Linear(4, 4), Attention()

    def forward(self, sample):
        x = self.proj_in(tokens_of(sample))
        return self.attention(x) if x.sum() < float("inf") else x


def test_a_model_that_is_steered_by_values():
    [site] = sloth_fx.inspect(Experts(), example_inputs=(torch.zeros(3, 4, 5, 9),))
    assert (site.kind, site.grid, site.divisors) == ("self", (5, 9), (1, 1))


def test_a_model_on_meta_has_no_values_to_be_steered_by():
    with pytest.raises(SlothError, match="Experts does not run on these inputs"):
        sloth_fx.inspect(Experts().to("meta"), example_inputs=(torch.zeros(3, 4, 5, 9),))


@pytest.mark.parametrize("by_name", [False, True])
def test_nothing_of_the_model_or_its_inputs_is_touched(by_name):
    model = UNet().train()
    example = torch.randn(2, 4, 13, 21)
    before = example.clone()
    state = {name: (id(each), each._version) for name, each in model.named_parameters()}
    sloth_fx.inspect(model, example_inputs={"sample": example} if by_name else (example,))
    assert {name: (id(each), each._version) for name, each in model.named_parameters()} == state
    assert torch.equal(example, before)
    assert vars(example) == {}
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# Example inputs


def test_forms_of_example_inputs():
    x, y = torch.zeros(2, 3), torch.zeros(1)
    assert as_call({"a": x})[1]["a"] is x
    assert as_call((x, y)) == ((x, y), {})
    assert as_call([x]) == ((x,), {})
    assert as_call(x)[0][0] is x
    for other in (3, "sample", None, {x}):
        with pytest.raises(SlothError, match=f"example_inputs is a {type(other).__name__}.*dict.*tuple"):
            as_call(other)
