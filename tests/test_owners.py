"""Owners that a host calls several times in one run of the model."""

import copy

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

import sloth_fx
from sloth_fx import SlothError
from sloth_fx.schedule import Constant
from sloth_fx.spec import HyperTile, NearSightedTile, Reduction, SlothfulAttention, TokenDownsample, TokenMerging

FRAMES = 3
HALVE = Reduction(rate=4.0, depth_decay=0.0, temporal=2)  # every 2nd row and column, and every 2nd frame
POOL = SlothfulAttention(in_=HALVE, out=HALVE, schedule=Constant())
IDLE = Reduction(rate=1.0)
NEUTRAL = [
    SlothfulAttention(in_=IDLE, out=IDLE, schedule=Constant()),
    NearSightedTile(tile_size=4096),
    HyperTile(tile_size=8192, swap_size=1),
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


class MapOrTokens(Attend):
    """Takes (B, C, H, W) as well."""

    def forward(self, x, context=None, keep=None):
        if x.ndim < 4:
            return super().forward(x, context, keep)
        return super().forward(x.flatten(2).mT, context, keep).mT.unflatten(2, x.shape[2:])


class Forms(nn.Module):
    """One attention for a map, for text, and for the tokens of the map."""

    def __init__(self):
        super().__init__()
        self.proj_in, self.attend = nn.Conv2d(4, 16, 1), MapOrTokens()

    def forward(self, sample, text, by_hand=False):
        keep = {"keep": every_2nd(sample.shape[2])} if by_hand else {}
        x = self.attend(self.proj_in(sample), **keep)
        return self.attend(text).mean() + self.attend(x.flatten(2).mT, **keep)


TEXT = torch.Size([2, 7, 16])
CASES = {
    "video": (Video, [(2, 4, FRAMES, 5, 9)]),
    "video_of_three": (Video, [(3, 4, 4, 9, 5)]),
    "twice": (Twice, [(2, 4, 5, 9)]),
    "levels": (Levels, [(3, 4, 7, 13)]),
    "patterns": (Patterns, [(2, 4, 5, 9), TEXT]),
    "forms": (Forms, [(2, 4, 5, 9), TEXT]),
    "text_alone": (lambda: Patterns(alone=True), [(2, 4, 5, 9), TEXT]),
}


ACTING = {
    "video": ["self", "temporal"],
    "video_of_three": ["self", "temporal"],
    "patterns": ["self"],
    "text_alone": ["self"],
}


def inputs(shapes):
    return tuple(torch.randn(shape) for shape in shapes)


@pytest.mark.parametrize("name", CASES)
def test_each_call_gets_what_its_tokens_ask_for(name):
    build, shapes = CASES[name]
    model, given = build().eval(), inputs(shapes)
    patched = sloth_fx.transform(model, POOL, example_inputs=given)
    acting = [site.kind for site in sloth_fx.report(patched) if site.operators]
    assert acting == ACTING.get(name, ["self", "self"])
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(*(each.double() for each in given), by_hand=True)
        assert (patched(*given) - expected).abs().max() < 1e-5
        assert (model(*given) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_other_sizes_and_batches(name):
    """The calls are still told apart where the numbers of tokens are others."""
    build, shapes = CASES[name]
    model = build().eval()
    patched = sloth_fx.transform(model, POOL, example_inputs=inputs(shapes))
    first, *text = shapes
    given = inputs([(first[0] + 1, 4, *(size + 4 for size in first[2:])), *((first[0] + 1, 9, 16) for _ in text)])
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(*(each.double() for each in given), by_hand=True)
        assert (patched(*given) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("spec", NEUTRAL, ids=lambda spec: type(spec).__name__)
@pytest.mark.parametrize("name", CASES)
def test_neutral_is_the_same_to_the_bit(name, spec):
    build, shapes = CASES[name]
    model, given = build().eval(), inputs(shapes)
    patched = sloth_fx.transform(model, spec, example_inputs=given)
    with torch.no_grad():
        assert torch.equal(patched(*given), model(*given))


class TwoBlocks(nn.Module):
    """Blocks of the same structure."""

    def __init__(self):
        super().__init__()
        self.proj_in = nn.Conv2d(4, 16, 1)
        self.blocks = nn.ModuleList(Attend() for _ in range(2))

    def forward(self, sample, keep=((), ())):
        """``keep``: for each block, in which of its two calls keys are left out."""
        x = self.proj_in(sample).flatten(2).mT
        for block, calls in zip(self.blocks, keep, strict=True):
            for call in range(2):
                x = block(x, keep=every_2nd(sample.shape[2]) if call in calls else None)
        return x


def test_owners_of_one_structure_that_are_pooled_in_different_calls():
    """What differs between two calls of the same form and size cannot be told: both blocks are refused by name."""
    model, given = TwoBlocks().eval(), inputs([(2, 4, 5, 9)])
    selector = lambda site: site.name in ("blocks.0", "blocks.1[1]")  # noqa: E731
    spec = SlothfulAttention(in_=HALVE, out=HALVE, schedule=Constant(), where=selector)
    with pytest.raises(SlothError, match=r"blocks\.0.*called several times.*45 tokens"):
        sloth_fx.transform(model, spec, example_inputs=given)


class Mixed(nn.Module):
    """Blocks of the same structure, with and without a context that is the image as well."""

    def __init__(self):
        super().__init__()
        self.proj_in = nn.Conv2d(4, 16, 1)
        self.blocks = nn.ModuleList(Attend() for _ in range(2))

    def forward(self, sample, pooled=()):
        x = self.proj_in(sample).flatten(2).mT
        fewer = every_2nd(sample.shape[2])
        for index, block in enumerate(self.blocks):
            x = block(x, keep=fewer if (index, 0) in pooled else None)
            x = block(x, context=fewer(x) if (index, 1) in pooled else x)
        return x


def test_owners_of_one_structure_that_are_pooled_in_calls_of_different_form():
    model, given = Mixed().eval(), inputs([(2, 4, 5, 9)])
    chosen = {"blocks.0": (0, 0), "blocks.1[1]": (1, 1)}
    spec = SlothfulAttention(in_=HALVE, out=HALVE, schedule=Constant(), where=lambda site: site.name in chosen)
    patched = sloth_fx.transform(model, spec, example_inputs=given)
    assert [site.name for site in sloth_fx.report(patched) if site.operators] == [*chosen]
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(given[0].double(), pooled=chosen.values())
        assert (patched(*given) - expected).abs().max() < 1e-5


# Calls that cannot be told apart


@pytest.mark.parametrize("spec", [POOL, NearSightedTile(tile_size=3), TokenDownsample(), TokenMerging()])
def test_as_many_frames_as_pixels(spec):
    given = inputs([(2, 4, 15, 3, 5)])
    with pytest.raises(SlothError, match=r"attend.*15 tokens do not tell these calls apart.*another size"):
        sloth_fx.transform(Video().eval(), spec, example_inputs=given)


def test_as_many_words_as_pixels():
    given = inputs([(2, 4, 5, 7), (2, 35, 16)])
    with pytest.raises(SlothError, match=r"attend.*35 tokens"):
        sloth_fx.transform(Patterns(alone=True).eval(), POOL, example_inputs=given)


def test_calls_that_cannot_be_told_apart_are_left_alone_where_that_is_allowed():
    model, given = Video().eval(), inputs([(2, 4, 15, 3, 5)])
    with pytest.raises(SlothError):
        sloth_fx.transform(model, POOL, example_inputs=given)
    patched = sloth_fx.transform(model, POOL, example_inputs=given, strict=False)
    assert all("do not tell" in site.note for site in sloth_fx.report(patched))
    with torch.no_grad():
        assert torch.equal(patched(*given), model(*given))
