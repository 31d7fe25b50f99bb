"""A model of which one attention has a mask made of blocks, and one has none: the other one can be changed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import sloth_fx
from sloth_fx import SlothError
from sloth_fx.analysis import whole_graph

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
HEADS, CHANNELS = 2, 32  # flex_attention takes no heads of less than 16 channels


class Attention(nn.Module):
    """Attends twice: as a mask says, and freely."""

    def __init__(self):
        super().__init__()
        self.to_qkv = nn.ModuleList([nn.Linear(CHANNELS, CHANNELS) for _ in range(6)])

    def forward(self, x, mask):
        heads = [layer(x).unflatten(2, (HEADS, -1)).transpose(1, 2) for layer in self.to_qkv]
        masked = flex_attention(*heads[:3], block_mask=mask)
        free = F.scaled_dot_product_attention(*heads[3:])
        return x + (masked + free).transpose(1, 2).flatten(2)


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(4, CHANNELS), nn.Linear(CHANNELS, 4)
        self.blocks = nn.ModuleList([Attention(), Attention()])

    def forward(self, sample, timestep):
        _, _, rows, columns = sample.shape
        x = self.into(sample.flatten(2).transpose(1, 2)) + timestep.view(-1, 1, 1) * 1e-3
        place = torch.arange(rows * columns, device=x.device) // columns + sample[0, 0, 0, 0].sign()
        mask = self.mask(place, columns)
        for block in self.blocks:
            x = block(x, mask)
        return self.out(x).transpose(1, 2).unflatten(2, (rows, columns))

    @staticmethod
    def mask(row, columns):
        def mask_mod(b, h, query, key):
            return (row[query] >= row[key]) | (key < columns)

        return create_block_mask(mask_mod, None, None, len(row), len(row), device=row.device, BLOCK_SIZE=16)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Denoiser().eval()


def call(batch=3, rows=7, columns=11):
    return {"sample": torch.randn(batch, 4, rows, columns), "timestep": torch.tensor([500.0] * batch)}


def run(model, inputs):
    with torch.no_grad():
        return model(**inputs)


def quarter(stride):
    reduction = sloth_fx.Reduction(rate=stride, depth_decay=0, k_blend=1, v_blend=1)
    return sloth_fx.SlothfulAttention(in_=reduction, out=reduction, schedule=sloth_fx.Constant(), keep_middle=False)


def known_variants(owner):
    cells = [cell.cell_contents for cell in owner.forward.__func__.__closure__]
    return next(cell.known for cell in cells if hasattr(cell, "known"))


def test_the_attention_without_a_mask_is_changed(model):
    inputs = call()
    expected = run(model, inputs)
    patched = sloth_fx.transform(model, quarter(4), example_inputs=call(2, 5, 9))
    assert not torch.equal(run(patched, inputs), expected)
    assert torch.equal(run(model, inputs), expected)
    for _ in range(3):
        run(patched, call())
    assert len(known_variants(patched.blocks[0])) <= 2  # a mask that is made anew is no other call


def test_neutral_is_the_same_to_the_bit(model):
    patched = sloth_fx.transform(model, quarter(1), example_inputs=call(2, 5, 9))
    for inputs in (call(), call(2, 5, 9), call(1, 8, 3)):
        assert torch.equal(run(patched, inputs), run(model, inputs))


def test_the_one_with_a_mask_is_refused_and_the_report_says_why(model):
    patched = sloth_fx.transform(model, quarter(4), example_inputs=call())
    assert "mask is made of blocks" in str(sloth_fx.report(patched))
    with pytest.raises(SlothError, match="mask is made of blocks"):
        sloth_fx.transform(
            model, sloth_fx.NearSightedTile(tile_size=3, where=lambda site: site.core == 0), example_inputs=call()
        )


def test_the_whole_model_is_one_graph(model):
    whole = whole_graph(model, **call())
    inputs = call()
    with torch.no_grad():
        assert torch.equal(whole(model, **inputs), model(**inputs))
