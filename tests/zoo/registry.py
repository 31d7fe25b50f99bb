"""The zoo: a tiny copy of every denoiser that diffusers has, randomly initialised, with inputs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tests.zoo import (
    audio,
    controlnets,
    cosmos,
    images,
    images_joint,
    packed,
    packed_more,
    unets,
    unets_other,
    unets_video,
    video,
    video_audio,
    video_joint,
    wan,
)
from tests.zoo.expected import EXPECTED, Expected
from tests.zoo.recipe import Inputs, Random, Recipe

_FAMILIES = (
    *(unets, unets_video, unets_other, controlnets, images, images_joint, packed, packed_more),
    *(wan, video, cosmos, video_joint, video_audio, audio),
)


@dataclass(frozen=True)
class Entry:
    """One model: ``name`` is its class, and after a slash the variant; ``expected`` is what attention it computes."""

    name: str
    recipe: Recipe
    expected: Expected

    def build(self) -> nn.Module:
        """The model, always with the same weights."""
        return self.recipe.build(self.name.partition("/")[0])

    def inputs(self, batch: int = 2, rows: int = 9, columns: int = 11) -> Inputs:
        """Arguments by keyword, always the same; every sample of the batch differs.

        ``rows`` and ``columns`` are those of the image tokens; a few classes round them up, or take one size only.
        """
        even = self.recipe.even
        return self.recipe.inputs(Random(batch, rows + (even and rows % 2), columns + (even and columns % 2)))


MODELS = {name: Entry(name, recipe, EXPECTED[name]) for family in _FAMILIES for name, recipe in family.RECIPES.items()}


@functools.cache
def shared(name: str) -> nn.Module:
    """One model of each kind for all tests, which leave it as it is."""
    return MODELS[name].build()


def run(model: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
    """All tensors that ``model`` returns, in order, without gradients."""
    if "return_dict" in inspect.signature(model.forward).parameters:
        inputs = {**inputs, "return_dict": False}
    with torch.no_grad():
        return list(_tensors(model(**inputs)))


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, (list, tuple, dict)):
        for each in output.values() if isinstance(output, dict) else output:
            yield from _tensors(each)
