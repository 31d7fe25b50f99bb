"""Owners that a host calls several times in one run of the model, and torch's own attention module."""

import copy

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

import sloth_fx
from sloth_fx.schedule import Constant
from sloth_fx.spec import HyperTile, NearSightedTile, Reduction, SlothfulAttention, TokenMerging

FRAMES = 3
HALVE = Reduction(rate=4.0, depth_decay=0.0, temporal=2)  # every 2nd row and column, and every 2nd frame
POOL = SlothfulAttention(in_=HALVE, out=HALVE, schedule=Constant())
IDLE = Reduction(rate=1.0)
NEUTRAL = [
    SlothfulAttention(in_=IDLE, out=IDLE),
    NearSightedTile(tile_size=4096),
    HyperTile(tile_size=8192),
    TokenMerging(ratio=0.0),
]


class Attend(nn.Module):
    """Of (B, N, C); ``keep(tokens)`` are those that are keys and values, for the models that we compare with."""

    def __init__(self, dim=16, heads=2):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x, context=None, keep=None):
        kept = (x if keep is None else keep(x)) if context is None else context
        split = lambda t: t.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # noqa: E731
        q, k, v = split(self.to_q(x)), split(self.to_k(kept)), split(self.to_v(kept))
        return x + self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def every_2nd(rows):
    """Of tokens (B, rows * columns, C), every 2nd row and column."""
    return lambda x: x.unflatten(1, (rows, -1))[:, ::2, ::2].flatten(1, 2)


class Video(nn.Module):
    """One attention for the pixels of each frame, and for the frames of each pixel."""

    def __init__(self):
        super().__init__()
        self.proj_in, self.attend = nn.Conv3d(4, 16, 1), Attend()

    def forward(self, sample, by_hand=False):
        frames, rows = sample.shape[2:4]
        spatial = {"keep": every_2nd(rows)} if by_hand else {}
        temporal = {"keep": lambda x: x[:, ::2]} if by_hand else {}
        x = rearrange(self.proj_in(sample), "b c t h w -> (b t) (h w) c")
        x = self.attend(x, **spatial)
        x = rearrange(x, "(b t) (h w) c -> (b h w) t c", t=frames, h=rows)
        x = self.attend(x, **temporal)
        return rearrange(x, "(b h w) t c -> b c t h w", h=rows, w=sample.shape[4])


class Twice(nn.Module):
    """One attention, called again for the same grid."""

    def __init__(self):
        super().__init__()
        self.proj_in, self.attend = nn.Conv2d(4, 16, 1), Attend()

    def forward(self, sample, by_hand=False):
        keep = {"keep": every_2nd(sample.shape[2])} if by_hand else {}
        x = self.proj_in(sample).flatten(2).mT
        for _ in range(2):
            x = self.attend(x, **keep)
        return x.mT.unflatten(2, sample.shape[2:])


class Levels(Twice):
    """One attention for two levels."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(16, 16, 3, stride=2, padding=1)

    def forward(self, sample, by_hand=False):
        x = self.proj_in(sample)
        for step in range(2):
            x = self.down(x) if step else x
            keep = {"keep": every_2nd(x.shape[2])} if by_hand else {}
            x = self.attend(x.flatten(2).mT, **keep).mT.unflatten(2, x.shape[2:])
        return x


class Patterns(nn.Module):
    """One attention, called with and without text, and for text alone."""

    def __init__(self, alone=False):
        super().__init__()
        self.proj_in, self.attend, self.alone = nn.Conv2d(4, 16, 1), Attend(), alone

    def forward(self, sample, text, by_hand=False):
        keep = {"keep": every_2nd(sample.shape[2])} if by_hand else {}
        x = self.attend(self.proj_in(sample).flatten(2).mT, **keep)
        text = self.attend(text) if self.alone else text
        return self.attend(x, context=text).mT.unflatten(2, sample.shape[2:])


TEXT = torch.Size([2, 7, 16])
CASES = {
    "video": (Video, [(2, 4, FRAMES, 5, 9)]),
    "video_of_three": (Video, [(3, 4, 4, 9, 5)]),
    "twice": (Twice, [(2, 4, 5, 9)]),
    "levels": (Levels, [(3, 4, 7, 13)]),
    "patterns": (Patterns, [(2, 4, 5, 9), TEXT]),
    "text_alone": (lambda: Patterns(alone=True), [(2, 4, 5, 9), TEXT]),
}


def inputs(shapes):
    return tuple(torch.randn(shape) for shape in shapes)


@pytest.mark.parametrize("name", CASES)
def test_each_call_gets_what_its_tokens_ask_for(name):
    build, shapes = CASES[name]
    model, given = build().eval(), inputs(shapes)
    patched = sloth_fx.transform(model, POOL, example_inputs=given)
    acting = [site.kind for site in sloth_fx.report(patched) if site.operators]
    assert acting == {"video": ["self", "temporal"], "twice": ["self"] * 2, "levels": ["self"] * 2}.get(
        name.removesuffix("_of_three"), ["self"]
    )
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(*(each.double() for each in given), by_hand=True)
        assert (patched(*given) - expected).abs().max() < 1e-5
        assert (model(*given) - expected).abs().max() > 1e-3
