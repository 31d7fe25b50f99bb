"""Which blocks can be left out, and what is said of others."""

import copy

import pytest
import torch
from torch import nn

import sloth_fx
from sloth_fx import SLG, SlothError
from tests.test_perturbed import BATCH, COND, SCALE, Block, dit_inputs, guided, patched, run


class Host(nn.Module):
    """Blocks of self-attention; ``way`` says how the host treats them."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.embed, self.out = nn.Conv2d(4, 12, 2, stride=2), nn.Linear(12, 16)
        self.blocks = nn.ModuleList(Scaled(way) for _ in range(3))
        if way == "in parts":
            self.blocks = nn.ModuleList(nn.ModuleList([each.block]) for each in self.blocks)

    def forward(self, latent, timestep, context):
        b, _, h, w = latent.shape
        x = self.embed(latent).flatten(2).transpose(1, 2)
        for block in self.blocks:
            if self.way == "steered":  # as a mixture of experts is: not known without data
                x = x[:, torch.nonzero(x.mean((0, 2)) == x.mean((0, 2))).flatten()]
            x = block[0](x, context, _time(context)) if self.way == "in parts" else block(x, context)
            x = {"in parts": lambda x: x[0], "text that ends": lambda x: x[1]}.get(self.way, lambda x: x)(x)
        x = self.out(x).reshape(b, h // 2, w // 2, 4, 2, 2)
        return torch.einsum("bhwcij->bchiwj", x).reshape(b, 4, h, w)


class Scaled(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.block = Block()
        self.way, self.by = way, {"divided by one": 1.0, "divided": 2.0}.get(way)

    def forward(self, x, context):
        x = self.block(x, context, _time(context))[0]
        if self.way == "text that ends":
            return None, x
        return x / self.by if self.by is not None else x


def _time(context):
    return context.mean(1).repeat(1, 2)[:, :12]


def host(way):
    torch.manual_seed(0)
    return Host(way).double().eval()


@pytest.mark.parametrize("way", ["as it is", "divided by one", "steered", "text that ends"])
def test_blocks_that_are_left_out(way):
    model, call = host(way), dit_inputs()
    found, _ = patched(model, SLG(layers=[1], scale=SCALE), dit_inputs(2), progress=0.1)
    note = sloth_fx.report(found).sites[1].note
    assert ("a call of its own: " if way == "steered" else "computed once") in note
    without = copy.deepcopy(model)
    del without.blocks[1]
    with torch.no_grad():
        expected = run(model, call), run(without, call)[COND]
        torch.testing.assert_close(run(found, call), guided(*expected))
    assert (expected[0][COND] - expected[1]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("divided", "which input of blocks.1 its output 0 continues is not clear"),
        ("in parts", "blocks.1 cannot be left out, because it is never called: it is a ModuleList"),
    ],
)
def test_blocks_that_cannot_be_left_out(way, message):
    """``in parts``: the list that holds an attention is no module that runs."""
    model = host(way)
    with pytest.raises(SlothError, match=message):
        sloth_fx.transform(model, SLG(layers=[1]), example_inputs=dit_inputs(2))
    with torch.no_grad():
        assert run(model, dit_inputs()).shape == (BATCH, 4, 10, 14)
