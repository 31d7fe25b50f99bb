"""How to make a tiny denoiser, with weights that let attention be seen, and inputs for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Inputs = dict[str, Any]
FRAMES = 3  # of a video, where a recipe does not say otherwise


class Random:
    """A source of random tensors that knows the size of what it makes.

    ``rows`` and ``columns`` are those of the image tokens at the shallowest attention level, ``height`` and ``width``
    of a latent of twice that size, as patches of 2 x 2 or one downsampling need it.
    """

    def __init__(self, batch: int, rows: int, columns: int, seed: int = 1) -> None:
        self.batch, self.rows, self.columns = batch, rows, columns
        self.grid = rows, columns
        self.tokens = rows * columns
        self.height, self.width = 2 * rows, 2 * columns
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator)

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=self._generator)

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        """0 to ``high`` - 1."""
        return torch.randint(0, high, shape, generator=self._generator)

    def timesteps(self) -> torch.Tensor:
        """Another for every sample of the batch."""
        return 100 + 300 * torch.arange(self.batch)

    def lengths(self, longest: int, shortest: int) -> list[int]:
        """Of texts: the first of the batch is the shortest."""
        return [shortest] + [longest] * (self.batch - 1)

    def valid(self, longest: int, shortest: int, dtype: torch.dtype) -> torch.Tensor:
        """(B, ``longest``): which tokens of padded texts are text."""
        return (torch.arange(longest) < torch.tensor(self.lengths(longest, shortest))[:, None]).to(dtype)


@dataclass(frozen=True)
class Recipe:
    """The config of a tiny model, what its inputs are made of, and what is done to it once it is built.

    ``even`` says that the class takes no odd number of rows or columns.
    """

    config: dict[str, Any]
    inputs: Callable[[Random], Inputs]
    prepare: Callable[[Any], None] = lambda model: None
    even: bool = False

    def build(self, class_name: str) -> nn.Module:
        """The class is one of diffusers' models."""
        from diffusers import models

        torch.manual_seed(0)
        model = getattr(models, class_name)(**self.config).float()
        randomise(model)
        self.prepare(model)
        return model.eval()


def randomise(model: nn.Module, seed: int = 17) -> None:
    """Weights that preserve variance, everywhere.

    Torch's own are smaller, which makes q.k tiny, attention uniform, and pooling invisible; and gates, modulations and
    last layers that start at zero would hide attention from the output. Scales of norms stay near one.
    """
    random = torch.Generator().manual_seed(seed)

    def fill(parameter: torch.Tensor, deviation: float, mean: float = 0.0) -> None:
        parameter.copy_(mean + deviation * torch.randn(parameter.shape, generator=random))

    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))]
    weights = {id(layer.weight) for layer in layers}
    biases = {id(layer.bias) for layer in layers}
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
            if id(parameter) in weights:
                fill(parameter, fan_in**-0.5)
            elif id(parameter) in biases:
                fill(parameter, 0.1)
            elif not parameter.isfinite().all() or not parameter.any() or parameter.abs().max() > 1e6:
                fill(parameter, fan_in**-0.5)  # empty memory, or a gate
            elif parameter.ndim == 1 and (parameter == 1).all():
                fill(parameter, 0.1, mean=1.0)


def grid_ids(rows: int, columns: int, frame: int = 0, axes: int = 3) -> torch.Tensor:
    """(rows * columns, axes) position ids: frame, row, column, and zeros."""
    ids = torch.cartesian_prod(torch.tensor([float(frame)]), torch.arange(float(rows)), torch.arange(float(columns)))
    return torch.nn.functional.pad(ids, (0, axes - 3))
