"""Running models, patched or with attention that is changed from outside, and comparing what they give."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import sloth_fx
from tests.zoo.count import Bias, watch
from tests.zoo.recipe import Inputs
from tests.zoo.registry import run


def at(patched: nn.Module, progress: float, inputs: Inputs) -> list[Tensor]:
    """What a patched model gives when the run is at ``progress``."""
    sloth_fx.context(patched).at(progress)
    return run(patched, inputs)


def biased(model: nn.Module, inputs: Inputs, bias: Bias) -> list[Tensor]:
    """What a model gives with attention in float64, whose scores are changed."""
    with watch(model, bias):
        return run(model, inputs)


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    """To the bit."""
    return len(one) == len(other) > 0 and all(map(Tensor.equal, one, other))


def difference(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest, in units of the other's standard deviation; not a number where something is not."""
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a.is_floating_point()]
    return float(torch.stack([(a - b).abs().max() / b.std() for a, b in pairs]).max())
