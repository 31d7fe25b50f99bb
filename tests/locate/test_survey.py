"""Whole models: adapters, models that are hard to run, and what a survey holds."""

import pytest
import torch
from torch import nn

import sloth_fx
from sloth_fx import SlothError
from sloth_fx.locate import as_call, survey
from sloth_fx.model_adapters import adapter_for, register_adapter, registry
from tests.locate.tiny import Attention, Stack, tokens_of

SIZES = [(2, 13, 21), (3, 9, 6)]


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
    model = Stack(3).train()
    example, text = torch.randn(2, 4, 13, 21), torch.randn(2, 7, 4)
    before = example.clone()
    model.proj = nn.Linear(4, 4)
    state = {name: (id(each), each._version) for name, each in model.named_parameters()}
    sloth_fx.inspect(model, example_inputs={"sample": example, "text": text} if by_name else (example, text))
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
