"""Perturbed attention against the same said with whole matrices, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from sloth_fx.errors import SlothError
from sloth_fx.operators.blur import blur_grid
from sloth_fx.operators.masks import additive
from sloth_fx.operators.perturbation import (
    blur_queries,
    difference,
    guided,
    identity_attention,
    joint_identity_attention,
    permutation,
    share_of,
    shuffle_tokens,
)
from sloth_fx.operators.self_attention_map import attention_received
from sloth_fx.site import Place

GRID, BATCH, HEADS, SIZE = (5, 7), 2, 3, 8
TOKENS = math.prod(GRID)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(7)


def normal(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def qkv(tokens=TOKENS, heads=HEADS, dtype=torch.float64):
    return (
        normal(BATCH, HEADS, tokens, SIZE, dtype=dtype),
        normal(BATCH, heads, tokens, SIZE, dtype=dtype),
        normal(BATCH, heads, tokens, SIZE, dtype=dtype),
    )


def softmax_attention(query, key, value, mask=0.0, scale=SIZE**-0.5):
    return ((query @ key.mT) * scale + mask).softmax(-1) @ value


def test_the_identity_gives_values():
    query, key, value = qkv()
    mask = torch.full((TOKENS, TOKENS), -math.inf).fill_diagonal_(0).double()
    torch.testing.assert_close(identity_attention(value, HEADS), softmax_attention(query, key, value, mask))


def test_the_identity_with_grouped_heads():
    value = normal(BATCH, 2, TOKENS, SIZE)
    found = identity_attention(value, 6)
    torch.testing.assert_close(found, torch.stack([value[:, head // 3] for head in range(6)], 1))


PLACES = {"image first": Place(0, False, False), "text first": Place(0, True, False), "between": Place(4, False, False)}


@pytest.mark.parametrize("heads", [HEADS, 1])
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("masked", [None, "added", "true"])
def test_the_identity_in_joint_attention(place, masked, heads):
    others, scale = 11, 0.4
    total = TOKENS + others
    first = place.start(total, TOKENS)
    query, key, value = qkv(total, heads)
    image = torch.zeros(total, dtype=torch.bool)
    image[first : first + TOKENS] = True
    hidden = image[:, None] & image & ~torch.eye(total, dtype=torch.bool)  # image from image, but for itself
    given, added = None, torch.zeros(BATCH, 1, total, total, dtype=torch.float64)
    if masked is not None:
        added = normal(BATCH, 1, total, total)
        given = added[:, :, image]
        if masked == "true":
            given = (given > -0.5) | image  # every query sees something
            added = torch.zeros_like(added)
            added[:, :, image] = added[:, :, image].masked_fill(~given, -math.inf)
    key_all, value_all = (each.repeat_interleave(HEADS // heads, 1) for each in (key, value))
    expected = softmax_attention(query, key_all, value_all, added.masked_fill(hidden, -math.inf), scale)
    found = joint_identity_attention(query[:, :, image], key, value, place, TOKENS, scale=scale, mask=given)
    torch.testing.assert_close(found, expected[:, :, image])


def test_the_identity_with_no_others():
    query, key, value = qkv()
    torch.testing.assert_close(joint_identity_attention(query, key, value, Place(), TOKENS), value)


def convolved(image, sigma, radii):
    """A blur of (..., rows, columns), by padding and a two-dimensional convolution."""
    kernels = [torch.exp(-0.5 * (torch.arange(-r, r + 1, dtype=image.dtype) / sigma) ** 2) for r in radii]
    rows, columns = (kernel / kernel.sum() for kernel in kernels)
    flat = image.reshape(-1, 1, *image.shape[-2:])
    padded = F.pad(flat, (radii[1], radii[1], radii[0], radii[0]), mode="reflect")
    return F.conv2d(padded, torch.outer(rows, columns)[None, None]).reshape(image.shape)


@pytest.mark.parametrize("grid", [(5, 7), (6, 3), (2, 9), (1, 4)], ids=str)
@pytest.mark.parametrize(("sigma", "length"), [(0.5, 3), (1.0, 7), (1.1, 7), (3.0, 19), (1e4, 60001)])
@pytest.mark.parametrize("frames", [1, 2])
def test_queries_blurred_on_their_grid(grid, sigma, length, frames):
    query = normal(BATCH, HEADS, frames * math.prod(grid), SIZE)
    radii = [min(length // 2, side // 2) for side in grid]
    image = query.unflatten(2, (frames, *grid)).movedim(-1, 3)
    expected = convolved(image, sigma, radii).movedim(3, -1).flatten(2, 4)
    torch.testing.assert_close(blur_queries(query, grid, sigma, frames), expected)


def test_blurring_queries_blurs_scores():
    query, key, _ = qkv()
    scores = (query @ key.mT).mT.unflatten(-1, GRID)
    found = (blur_queries(query, GRID, 1.0) @ key.mT).mT.unflatten(-1, GRID)
    torch.testing.assert_close(found, convolved(scores, 1.0, (2, 3)))


def test_an_endless_blur_is_the_mean_of_each_frame():
    query = normal(BATCH, HEADS, 2 * TOKENS, SIZE)
    found = blur_queries(query, GRID, math.inf, 2)
    first, second = query.chunk(2, 2)
    expected = [each.mean(2, keepdim=True).expand_as(each) for each in (first, second)]
    torch.testing.assert_close(found, torch.cat(expected, 2))
    # the fault of another implementation: the finite blur gives the mean, the endless one a kernel
    assert (blur_queries(query, GRID, 1.0, 2) - found).abs().max() > 0.5


def test_a_narrow_blur_changes_nothing():
    query, _, _ = qkv()
    torch.testing.assert_close(blur_queries(query, GRID, 0.05), query)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blurs_keep_the_dtype(dtype):
    query = normal(BATCH, HEADS, TOKENS, SIZE, dtype=dtype)
    found = blur_queries(query, GRID, 1.0)
    assert found.dtype == dtype
    expected = blur_queries(query.double(), GRID, 1.0)
    torch.testing.assert_close(found.double(), expected, atol=5 * torch.finfo(dtype).eps, rtol=0.01)


def test_a_blur_keeps_a_flat_grid_and_its_mean_inside():
    flat = torch.full((1, 1, 6, 9), 3.0, dtype=torch.float64)
    torch.testing.assert_close(blur_grid(flat, 2.0, (5, 8)), flat)


def test_shuffling():
    x = normal(BATCH, TOKENS, SIZE)
    found = shuffle_tokens(x, 3)
    order = permutation(TOKENS, 3, x.device)
    assert sorted(order.tolist()) == list(range(TOKENS))
    assert order.tolist() != list(range(TOKENS))
    torch.testing.assert_close(found, x[:, order], rtol=0, atol=0)
    torch.testing.assert_close(shuffle_tokens(x, torch.tensor(3)), found, rtol=0, atol=0)
    orders = {tuple(permutation(TOKENS, seed, x.device).tolist()) for seed in range(50)}
    assert len(orders) == 50
    torch.testing.assert_close(shuffle_tokens(x.mT, 3, dim=2), found.mT, rtol=0, atol=0)


def test_guidance_of_all_rows():
    prediction, perturbed = normal(BATCH, 4, *GRID), normal(BATCH, 4, *GRID)
    expected = 3.5 * prediction - 2.5 * perturbed
    torch.testing.assert_close(guided(prediction, perturbed, scale=2.5), expected)
    torch.testing.assert_close(guided(prediction, perturbed, (True, True), scale=2.5), expected)


@pytest.mark.parametrize("weight", [0.0, 1.0, 7.5])
def test_classifier_free_guidance_outside_gives_the_published_formula(weight):
    uncond, cond, perturbed = (normal(BATCH, 4, *GRID) for _ in range(3))
    found = guided(torch.cat([uncond, cond]), perturbed, (False, True), scale=3.0)
    u, c = found.chunk(2)
    expected = uncond + weight * (cond - uncond) + 3.0 * (cond - perturbed)
    torch.testing.assert_close(u + weight * (c - u), expected)
    if weight:  # the same for a call that holds one group, when the other does not change
        c = guided(cond, perturbed, scale=3.0, share=share_of(weight))
        torch.testing.assert_close(uncond + weight * (c - uncond), expected)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_several_groups_each_by_itself(rescale):
    """As if each had a call of its own, and the others none."""
    one, uncond, other, first, second = (normal(BATCH, 4, *GRID) for _ in range(5))
    how = {"scale": 3.0, "rescale": rescale, "share": share_of(7.5)}
    together = guided(
        torch.cat([one, uncond, other]), torch.cat([first, second]), (True, False, True), spread=False, **how
    )
    expected = torch.cat([guided(one, first, **how), uncond, guided(other, second, **how)])
    torch.testing.assert_close(together, expected)


def test_rescaled_it_is_the_same_in_one_call_and_in_two():
    uncond, cond, perturbed = (normal(BATCH, 4, *GRID) for _ in range(3))
    u, c = guided(torch.cat([uncond, cond]), perturbed, (False, True), scale=3.0, rescale=0.7).chunk(2)
    own = guided(cond, perturbed, scale=3.0, rescale=0.7, share=share_of(5.0))
    torch.testing.assert_close(uncond + 5 * (own - uncond), u + 5 * (c - u))
    assert share_of(None) == 1


def test_three_groups_of_an_edited_image():
    text, image, none, perturbed = (normal(BATCH, 4, *GRID) for _ in range(4))
    t, i, n = guided(torch.cat([text, image, none]), perturbed, (True, False, False), scale=2.0).chunk(3)
    expected = none + 7.5 * (text - image) + 1.5 * (image - none) + 2.0 * (text - perturbed)
    torch.testing.assert_close(n + 7.5 * (t - i) + 1.5 * (i - n), expected)


@pytest.mark.parametrize("rows", [(True, True, False), (False, False)])
def test_groups_that_are_not_clear(rows):
    with pytest.raises(SlothError, match=r"of the \d groups of this batch are guided"):
        guided(normal(6, 4, *GRID), normal(4, 4, *GRID), rows, scale=2.0)


def test_rescaling_keeps_the_deviation():
    prediction, perturbed = normal(BATCH, 4, *GRID), normal(BATCH, 4, *GRID)
    result = guided(prediction, perturbed, scale=4.0, rescale=1.0)
    dims = (1, 2, 3)
    torch.testing.assert_close(result.std(dims), prediction.std(dims))
    plain = guided(prediction, perturbed, scale=4.0)
    half = guided(prediction, perturbed, scale=4.0, rescale=0.5)
    torch.testing.assert_close(half, 0.5 * plain + 0.5 * result)
    torch.testing.assert_close(prediction + difference(prediction, perturbed, scale=4.0), plain)


@pytest.mark.parametrize("heads", [HEADS, 1])
@pytest.mark.parametrize("limit", [None, 300])
def test_what_each_key_receives(monkeypatch, heads, limit):
    if limit is not None:
        monkeypatch.setattr("sloth_fx.operators.self_attention_map._SCORES", limit)
    query, key, _ = qkv(heads=heads)
    matrix = (query @ key.repeat_interleave(HEADS // heads, 1).mT * 0.3).softmax(-1)
    found = attention_received(query, key, 0.3)
    torch.testing.assert_close(found, matrix.mean(1).sum(1))
    torch.testing.assert_close(found.mean(), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_masks_that_are_added(dtype):
    hides = torch.arange(15).view(3, 1, 1, 5) % 3 == 0
    assert additive(~hides, dtype).tolist() == torch.where(hides, -math.inf, 0.0).tolist()
    bias = normal(3, 1, 1, 5)
    assert torch.equal(additive(bias, dtype), bias.to(dtype))
    assert additive(~hides, dtype).dtype == additive(bias, dtype).dtype == dtype
