"""Stages and depth: of stacks of blocks, of UNets, and of half a UNet."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sloth_fx
from tests.locate.tiny import Attention, Stack, tokens_of

SIZES = [(2, 13, 21), (3, 9, 6)]


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
