"""Attention of two branches equals two attentions, and attends once to what both have in common."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sloth_fx.branching import Pair, Tokens, attend_branches
from sloth_fx.branching.values import of

TEXT, IMAGE = 5, 11


class Pairs(TorchDispatchMode):
    """Counts pairs of queries and keys in attention kernels."""

    def __init__(self):
        super().__init__()
        self.pairs = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.startswith("_scaled_dot_product"):
            self.pairs += math.prod(args[0].shape[:3]) * args[1].shape[2]
        return func(*args, **(kwargs or {}))


def noise(tokens, heads=3):
    return torch.randn(2, heads, tokens, 8)


def sequence(order="text first"):
    parts = [Pair(noise(TEXT), noise(TEXT)), noise(IMAGE)]
    return Tokens(parts if order == "text first" else parts[::-1], 2)


def expected(query, key, value, branch, mask=None, **options):
    """In float64."""
    q, k, v = (of(each, branch).double() for each in (query, key, value))
    scores = q @ k.mT * options.get("scale", q.shape[-1] ** -0.5)
    scores = scores if mask is None else scores.masked_fill(~of(mask, branch), -torch.inf)
    return (scores.softmax(-1) @ v).float()


@pytest.mark.parametrize("order", ["text first", "image first"])
@pytest.mark.parametrize("queries", ["all", "image", "text"])
@pytest.mark.parametrize("options", [{}, {"scale": 0.3}])
def test_both_branches(order, queries, options):
    query = {"all": sequence(order), "image": noise(IMAGE), "text": Pair(noise(TEXT), noise(TEXT))}[queries]
    key, value = sequence(order), sequence(order)
    with torch.no_grad():
        found = attend_branches(F.scaled_dot_product_attention, query, key, value, **options)
    assert isinstance(found, Tokens if queries == "all" else Pair)
    for branch in range(2):
        torch.testing.assert_close(of(found, branch), expected(query, key, value, branch, **options))


def test_masks_and_other_functions():
    query, key, value = noise(IMAGE), sequence(), sequence()
    mask = Pair(torch.rand(2, 1, IMAGE, TEXT + IMAGE) > 0.3, torch.rand(2, 1, IMAGE, TEXT + IMAGE) > 0.3)

    def host(query, key, value, mask=None):
        return F.scaled_dot_product_attention(query, key, value, mask)

    for attend, hidden in ((F.scaled_dot_product_attention, mask), (host, mask), (host, None)):
        found = attend_branches(attend, query, key, value, hidden)
        for branch in range(2):
            torch.testing.assert_close(of(found, branch), expected(query, key, value, branch, hidden))
    keys = Pair(noise(TEXT), noise(TEXT))
    found = attend_branches(F.scaled_dot_product_attention, query, keys, keys)
    for branch in range(2):
        torch.testing.assert_close(of(found, branch), expected(query, keys, keys, branch))


def test_nothing_that_differs_is_the_hosts_own_attention():
    query, key, value = noise(7), noise(IMAGE), noise(IMAGE)
    found = attend_branches(F.scaled_dot_product_attention, query, key, value)
    assert torch.equal(found, F.scaled_dot_product_attention(query, key, value))


def test_image_and_image_meet_once():
    query, key, value = sequence(), sequence(), sequence()
    with torch.no_grad(), Pairs() as counter:
        attend_branches(F.scaled_dot_product_attention, query, key, value)
    image, text = IMAGE * IMAGE + 2 * IMAGE * TEXT, 2 * TEXT * (TEXT + IMAGE)
    assert counter.pairs == 2 * 3 * (image + text)  # of samples and heads


def test_gradients():
    query = noise(IMAGE).requires_grad_()
    key, value = sequence(), sequence()
    found = attend_branches(F.scaled_dot_product_attention, query, key, value)
    (found.positive - found.negative).square().sum().backward()
    assert query.grad.abs().max() > 0
