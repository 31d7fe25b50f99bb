"""Normalized guidance against the formula once more: numpy, float64, one token at a time."""

import math
from itertools import product

import numpy as np
import pytest
import torch

from sloth_fx.operators import normalized_guidance

SETTINGS = [
    {"scale": 5.0, "tau": 2.5, "alpha": 0.25},
    {"scale": 11.0, "tau": 3.5, "alpha": 0.5},
    {"scale": 1.5, "tau": 0.5, "alpha": 1.0},  # shorter than before
    {"scale": 4.0, "tau": math.inf, "alpha": 0.375},
]


def by_hand(positive, negative, *, scale, tau, alpha, norm="l1", channels=(-1,)):
    plus, minus = (each.double().numpy() for each in (positive, negative))
    axes = [axis % plus.ndim for axis in channels]
    found = np.empty(plus.shape)
    for place in product(*(range(1) if axis in axes else range(n) for axis, n in enumerate(plus.shape))):
        token = tuple(slice(None) if axis in axes else index for axis, index in enumerate(place))
        wanted, unwanted = plus[token], minus[token]
        moved = wanted + (scale - 1) * (wanted - unwanted)
        before, after = (sum(abs(x) ** (1 if norm == "l1" else 2) for x in each.ravel()) for each in (wanted, moved))
        ratio = (after / before) ** (1 if norm == "l1" else 0.5)
        found[token] = alpha * min(ratio, tau) / ratio * moved + (1 - alpha) * wanted
    return torch.from_numpy(found)


def pair(*shape, dtype=torch.float32):
    """Tokens of a negative text that differ from little to a lot, so that tau holds back some and not others."""
    positive, noise = torch.randn(shape), torch.randn(shape)
    amount = torch.linspace(0.01, 3, shape[-2])[:, None]
    return positive.to(dtype), (positive + amount * noise).to(dtype)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize(("shape", "channels"), [((3, 7, 10), (-1,)), ((3, 2, 7, 5), (1, 3)), ((3, 2, 7, 5), (-1, -3))])
def test_the_formula(setting, norm, shape, channels):
    positive, negative = pair(*shape)
    found = normalized_guidance(positive, negative, **setting, norm=norm, channels=channels)
    expected = by_hand(positive, negative, **setting, norm=norm, channels=channels)
    assert found.dtype == positive.dtype
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_tau_holds_back_some_tokens_and_leaves_others():
    positive, negative = pair(3, 7, 10)
    free, held = (
        normalized_guidance(positive, negative, scale=5.0, tau=tau, alpha=1.0).abs().sum(-1) / positive.abs().sum(-1)
        for tau in (math.inf, 2.5)
    )
    assert (free > 2.6).any()
    assert (free < 2.4).any()
    assert torch.allclose(held, free.clamp(max=2.5))


def test_all_heads_of_a_token_have_one_norm():
    positive, negative = pair(3, 2, 7, 5)
    setting = {"scale": 5.0, "tau": 1.5, "alpha": 0.5}
    together = normalized_guidance(positive, negative, **setting, channels=(1, 3))
    flat = [each.transpose(1, 2).flatten(2) for each in (positive, negative)]
    assert torch.allclose(together.transpose(1, 2).flatten(2), normalized_guidance(*flat, **setting), atol=1e-6)
    assert not torch.allclose(together, normalized_guidance(positive, negative, **setting), atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_half_precision(dtype, norm):
    """Norms are not taken in half precision: of many channels, that of L1 exceeds the largest float16."""
    positive, negative = (300 * each for each in pair(3, 7, 999, dtype=dtype))
    found = normalized_guidance(positive, negative, **SETTINGS[0], norm=norm)
    expected = by_hand(positive, negative, **SETTINGS[0], norm=norm)
    assert found.dtype == dtype
    assert (found - expected).abs().max() < 4 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("neutral", [{"scale": 1.0, "tau": 2.5, "alpha": 0.7}, {"scale": 9.0, "tau": 2.5, "alpha": 0}])
def test_neutral_to_the_bit(dtype, neutral):
    positive, negative = pair(3, 7, 10, dtype=dtype)
    assert torch.equal(normalized_guidance(positive, negative, **neutral), positive)


def test_the_same_text_changes_next_to_nothing():
    positive, _ = pair(3, 7, 10)
    found = normalized_guidance(positive, positive.clone(), **SETTINGS[1])
    assert (found - positive).abs().max() < 1e-6


@pytest.mark.parametrize("tau", [2.5, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tokens_of_zeros(tau, dtype):
    positive, negative = pair(3, 7, 10, dtype=dtype)
    positive[:, 2] = 0  # nothing to read: no length to go by
    positive[:, 4] = negative[:, 4] = 0
    negative[:, 5] = 0
    found = normalized_guidance(positive, negative, scale=5.0, tau=tau, alpha=0.25)
    assert found.isfinite().all()
    assert not found[:, 4].any()
    if tau < math.inf:
        assert not found[:, 2].any()
    expected = by_hand(positive[:, [5]], negative[:, [5]], scale=5.0, tau=tau, alpha=0.25)
    assert (found[:, [5]] - expected).abs().max() < 4 * torch.finfo(dtype).eps * expected.abs().max()


def test_neither_argument_is_written_to():
    positive, negative = pair(3, 7, 10)
    before = positive.clone(), negative.clone()
    normalized_guidance(positive, negative, **SETTINGS[0])
    assert torch.equal(positive, before[0])
    assert torch.equal(negative, before[1])


def test_gradients():
    positive, negative = (each.double().requires_grad_() for each in pair(2, 3, 4))
    assert torch.autograd.gradcheck(
        lambda one, other: normalized_guidance(one, other, scale=5.0, tau=1.5, alpha=0.5, norm="l2"),
        (positive, negative),
    )
