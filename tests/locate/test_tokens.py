"""What tokens are found to be, however the host made them: kind, grid, divisors, text, places and heads."""

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from sloth_fx.site import Place
from tests.locate.tiny import only, sites

SIZES = [(2, 18, 10), (3, 6, 26)]  # batch, rows, columns; halved, both are odd
LATENTS = [(batch, 4, rows, columns) for batch, rows, columns in SIZES]
FRAMES = 3

tokens = lambda x: x.flatten(2).mT  # noqa: E731 - (B, C, ...) -> (B, N, C)

# Images. By name: how many latent rows one token has, how tokens are made, and the layers for that.
PATCHED = {
    "pixels": (1, lambda m, x: tokens(x), {}),
    "pixels_after_convolutions": (1, lambda m, x: tokens(m.conv(x)), {"conv": nn.Conv2d(4, 6, 3, padding=1)}),
    "a_patch_convolution": (2, lambda m, x: tokens(m.patch(x)), {"patch": nn.Conv2d(4, 6, 2, 2)}),
    "a_strided_convolution": (2, lambda m, x: tokens(m.down(x)), {"down": nn.Conv2d(4, 6, 3, 2, 1)}),
    "einops": (
        2,
        lambda m, x: m.embed(rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=2, q=2)),
        {"embed": nn.Linear(16, 6)},
    ),
    "views": (
        2,
        lambda m, x: m.embed(
            x.view(len(x), 4, x.shape[2] // 2, 2, x.shape[3] // 2, 2).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        ),
        {"embed": nn.Linear(16, 6)},
    ),
    "unshuffled": (2, lambda m, x: m.embed(tokens(F.pixel_unshuffle(x, 2))), {"embed": nn.Linear(16, 6)}),
    "unfolded": (2, lambda m, x: F.unfold(x, 2, stride=2).mT, {}),
    "einsum": (
        2,
        lambda m, x: torch.einsum("bchw,cd->bhwd", x[..., ::2, ::2], m.weight.weight).flatten(1, 2),
        {"weight": nn.Linear(6, 4, bias=False)},
    ),
    "pooled": (2, lambda m, x: tokens(F.avg_pool2d(x, 2)), {}),
    "positions_and_time": (
        1,
        lambda m, x: tokens(x) + m.embedding(torch.arange(x[0, 0].numel()))[None] + torch.zeros(len(x), 1, 4),
        {"embedding": nn.Embedding(500, 4)},
    ),
    "a_mask_channel": (1, lambda m, x: tokens(torch.cat([x, torch.ones_like(x[:, :2])], 1)), {}),
    "chunks": (1, lambda m, x: torch.cat([part * 2 for part in tokens(x).split(7, 1)], 1), {}),
    "packed_projections": (1, lambda m, x: m.qkv(tokens(x)).chunk(3, -1)[1], {"qkv": nn.Linear(4, 12)}),
    "stacked_projections": (
        1,
        lambda m, x: m.qkv(tokens(x)).unflatten(-1, (3, 4)).permute(2, 0, 1, 3).unbind(0)[2],
        {"qkv": nn.Linear(4, 12)},
    ),
    "rotated": (1, lambda m, x: torch.stack([-tokens(x)[..., 1::2], tokens(x)[..., ::2]], -1).flatten(-2), {}),
}


@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("name", PATCHED)
def test_an_image(name, latent):
    divisor, way, layers = PATCHED[name]
    site = only(lambda m, x, text: m.attention(way(m, x)), latent, **layers)
    grid = latent[2] // divisor, latent[3] // divisor
    assert (site.kind, site.grid, site.divisors) == ("self", grid, (divisor, divisor))
    assert site.q_tokens == site.kv_tokens == grid[0] * grid[1]
    assert (site.text, site.query_place, site.key_place, site.on_image) == (None, Place(), Place(), True)
    assert (site.stage, site.depth, site.path, site.owner) == ("in", 1, "attention", "Attention")
    assert site.heads == 2


@pytest.mark.parametrize("latent", LATENTS)
def test_a_border_added_to_make_whole_patches_is_counted(latent):
    """(h, w) padded by one row and one column to be divided by 2: the last patches have one row, or column."""
    latent = (*latent[:2], latent[2] - 1, latent[3] - 1)
    site = only(
        lambda m, x, text: m.attention(tokens(m.patch(F.pad(x, (0, 1, 0, 1))))), latent, patch=nn.Conv2d(4, 6, 2, 2)
    )
    assert (site.grid, site.divisors) == (((latent[2] + 1) // 2, (latent[3] + 1) // 2), (2, 2))


# Text and image in one sequence

JOINED = {
    "text_first": (lambda m, image, text: torch.cat([text, image], 1), (0, 7), 7, 0),
    "image_first": (lambda m, image, text: torch.cat([image, text], 1), None, 0, 7),
    "registers_between": (
        lambda m, image, text: torch.cat([text, m.registers.weight.expand(len(image), -1, -1), image], 1),
        (0, 7),
        12,
        0,
    ),
    "registers_last": (
        lambda m, image, text: torch.cat([image, m.registers.weight.expand(len(image), -1, -1)], 1),
        None,
        0,
        5,
    ),
    "padded": (lambda m, image, text: F.pad(torch.cat([text, image], 1), (0, 0, 0, 3)), (0, 7), 7, 3),
    "into_a_buffer": (lambda m, image, text: _in_a_buffer(image, text), (0, 7), 7, 0),
    "index_copy": (lambda m, image, text: _copied(image, text), (0, 7), 7, 0),
    "index_put": (lambda m, image, text: _put(image, text), (0, 7), 7, 0),
    "masked_scatter": (lambda m, image, text: _scattered(image, text), (0, 7), 7, 0),
    "heads_apart": (
        lambda m, image, text: torch.cat([text.unflatten(-1, (2, -1)), image.unflatten(-1, (2, -1))], 1).flatten(2),
        (0, 7),
        7,
        0,
    ),
    "channels_first": (lambda m, image, text: torch.cat([text.mT, image.mT], 2).mT, (0, 7), 7, 0),
    "swapped": (lambda m, image, text: torch.cat([image, text], 1).roll(7, 1), (0, 7), 7, 0),
    "by_numbers": (
        lambda m, image, text: torch.cat([image, text], 1)[:, torch.arange(-7, image.shape[1])],
        (0, 7),
        7,
        0,
    ),
    "by_a_mask": (
        lambda m, image, text: F.pad(torch.cat([text, image], 1), (0, 0, 0, 9))[
            :, torch.arange(7 + image.shape[1] + 9) < 7 + image.shape[1]
        ],
        (0, 7),
        7,
        0,
    ),
}


def _in_a_buffer(image, text):
    out = image.new_zeros(len(image), 7 + image.shape[1], 4)
    out[:, :7] = text
    out[:, 7:] = image
    return out


def _copied(image, text):
    out = torch.zeros(len(image), 7 + image.shape[1], 4)
    out.index_copy_(1, torch.arange(7), text)
    return out.index_copy(1, torch.arange(7, out.shape[1]), image)


def _put(image, text):
    out = torch.zeros(len(image), 7 + image.shape[1], 4)
    out[:, torch.arange(7)] = text
    out[:, torch.arange(7, out.shape[1])] = image
    return out


def _scattered(image, text):
    out = torch.cat([torch.zeros_like(text), image], 1)
    is_text = (torch.arange(out.shape[1]) < 7)[None, :, None].expand_as(out)
    return out.masked_scatter(is_text, text)


@pytest.mark.parametrize("latent", LATENTS)
@pytest.mark.parametrize("name", JOINED)
def test_one_sequence_of_text_and_image(name, latent):
    way, text, before, after = JOINED[name]
    site = only(lambda m, x, words: m.attention(way(m, tokens(x), words)), latent, text=7, registers=nn.Embedding(5, 4))
    image = latent[2] * latent[3]
    assert (site.grid, site.divisors) == (latent[2:], (1, 1))
    assert site.q_tokens == site.kv_tokens == before + image + after
    for place in (site.query_place, site.key_place):
        assert place.start(site.kv_tokens, image) == before
        assert not place.alone
    if name == "registers_last":
        assert (site.kind, site.text) == ("self", None)
    else:
        assert (site.kind, site.text) == ("joint", text or (image, image + 7))


@pytest.mark.parametrize("latent", LATENTS)
def test_image_queries_and_joint_keys(latent):
    site = only(lambda m, x, text: m.attention(tokens(x), torch.cat([text, tokens(x)], 1)), latent, text=7)
    image = latent[2] * latent[3]
    assert (site.kind, site.grid, site.text) == ("joint", latent[2:], (0, 7))
    assert (site.q_tokens, site.kv_tokens) == (image, image + 7)
    assert site.query_place == Place()
    assert site.key_place.start(site.kv_tokens, image) == 7


@pytest.mark.parametrize("latent", LATENTS)
def test_cross_attention_and_attention_among_text(latent):
    cross, words = sites(lambda m, x, text: (m.attention(tokens(x), text), m.attention(text)), latent, text=7)[:2]
    assert (cross.kind, cross.grid, cross.text, cross.on_image) == ("cross", latent[2:], (0, 7), False)
    assert (words.kind, words.grid, words.text, words.on_image) == ("self", None, (0, 7), False)
    assert (cross.name, words.name) == ("attention", "attention[1]")


def test_text_that_is_as_long_as_the_image():
    site = only(lambda m, x, text: m.attention(tokens(x), text), (2, 4, 5, 7), text=35)
    assert (site.kind, site.on_image) == ("cross", False)


# Video: (B, C, T, H, W)

VIDEO = {
    "all_at_once": (lambda x: rearrange(x, "b c t h w -> b (t h w) c"), "self", (FRAMES, 18, 10), (1, 1, 1)),
    "frames_by_themselves": (lambda x: rearrange(x, "b c t h w -> (b t) (h w) c"), "self", (18, 10), (1, 1)),
    "over_frames": (lambda x: rearrange(x, "b c t h w -> (b h w) t c"), "temporal", (FRAMES, 1, 1), (1, None, None)),
    "windows": (
        lambda x: rearrange(x, "b c t (h p) (w q) -> (b t h w) (p q) c", p=3, q=5),
        "self",
        (3, 5),
        (None, None),
    ),
    "windows_over_frames": (
        lambda x: rearrange(x, "b c t (h p) (w q) -> (b h w) (t p q) c", p=3, q=5),
        "self",
        (FRAMES, 3, 5),
        (1, None, None),
    ),
    "columns": (lambda x: rearrange(x, "b c t h w -> (b t w) h c"), "self", (18, 1), (1, None)),
}


@pytest.mark.parametrize("batch", [2, 3])
@pytest.mark.parametrize("name", VIDEO)
def test_a_video(name, batch):
    way, kind, grid, divisors = VIDEO[name]
    site = only(lambda m, x, text: m.attention(way(x)), (batch, 4, FRAMES, 18, 10))
    assert (site.kind, site.grid, site.divisors) == (kind, grid, divisors)


@pytest.mark.parametrize("batch", [2, 3])
def test_a_video_of_patches(batch):
    patch = nn.Conv3d(4, 6, (1, 2, 2), (1, 2, 2))
    site = only(lambda m, x, text: m.attention(tokens(m.patch(x))), (batch, 4, FRAMES, 18, 10), patch=patch)
    assert (site.kind, site.grid, site.divisors) == ("self", (FRAMES, 9, 5), (1, 2, 2))


def test_frames_and_text_are_joint():
    way = lambda m, x, text: m.attention(torch.cat([text, rearrange(x, "b c t h w -> b (t h w) c")], 1))  # noqa: E731
    site = only(way, (2, 4, FRAMES, 9, 5), text=7)
    assert (site.kind, site.grid, site.text) == ("joint", (FRAMES, 9, 5), (0, 7))
    assert site.key_place.start(site.kv_tokens, FRAMES * 45) == 7


# Windows of an image

WINDOWS = {
    "unfold": lambda x: x.unfold(2, 3, 3).unfold(3, 5, 5).permute(0, 2, 3, 4, 5, 1).reshape(-1, 15, 4),
    "permute": lambda x: rearrange(x, "b c (h p) (w q) -> (b h w) (p q) c", p=3, q=5),
    "shifted": lambda x: rearrange(x.roll((-1, -2), (2, 3)), "b c (h p) (w q) -> (b h w) (p q) c", p=3, q=5),
}


@pytest.mark.parametrize("batch", [2, 3])
@pytest.mark.parametrize("name", WINDOWS)
def test_windows_do_not_grow_with_the_latent(name, batch):
    site = only(lambda m, x, text: m.attention(WINDOWS[name](x)), (batch, 4, 9, 20))
    assert (site.kind, site.grid, site.divisors) == ("self", (3, 5), (None, None))
    assert site.grid_at((90, 200)) == (3, 5)


def test_tokens_in_an_order_that_is_unknown_have_no_grid():
    for way in (
        lambda x: tokens(x).flip(1),
        lambda x: tokens(x)[:, torch.arange(45).roll(20)],
        lambda x: tokens(x)[:, :44],
        lambda x: torch.cat([tokens(x)[:, :30], torch.zeros(2, 1, 4), tokens(x)[:, 30:]], 1),
    ):
        site = only(lambda m, x, text, way=way: m.attention(way(x)), (2, 4, 9, 5))
        assert (site.kind, site.grid, site.divisors, site.on_image) == ("self", None, None, True)


def test_samples_that_are_packed_differently_have_no_grid():
    """As hosts do that pack prompts of several lengths."""

    def pack(m, x, text):
        rows = torch.arange(52).view(1, -1) - torch.tensor([[0], [7]])
        both = torch.cat([tokens(x), text], 1)
        return m.attention(both.gather(1, rows.remainder(52)[..., None].expand(-1, -1, 4)))

    assert only(pack, (2, 4, 9, 5), text=7).grid is None
