"""What has values in a run of shapes: hosts steer by masks, lengths and coordinates, so these are computed."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

_LARGEST_REAL = 2**20  # elements of a tensor of whole numbers whose values are kept


def computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[torch.Tensor]) -> Any:
    """The result of ``func``: with values where its ``inputs`` have some, or it makes whole numbers of nothing."""
    if inputs and all(map(is_real, inputs)):
        with unset_fake_temporarily():
            return func(*args, **kwargs)
    result = func(*args, **kwargs)
    if not inputs and isinstance(result, torch.Tensor) and _may_steer(result):
        with unset_fake_temporarily():
            return func(*args, **kwargs)
    return result


def with_numbers(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of an indexing, with real masks as the numbers that they pick: then the result has a shape."""
    tensor, indices = args
    found: list[Any] = []
    for index in indices:
        if isinstance(index, torch.Tensor) and index.dtype == torch.bool and is_real(index):
            with unset_fake_temporarily():
                found.extend(index.nonzero(as_tuple=True))
        else:
            found.append(index)
    return tensor, found


def values_of(index: torch.Tensor) -> NDArray[Any]:
    """The values of a tensor that has some."""
    with unset_fake_temporarily():
        values: NDArray[Any] = index.cpu().numpy()
    return values


def is_real(index: Any) -> bool:
    """Whether a tensor has values; ``None`` among indices counts as a slice, which needs none."""
    return index is None or not isinstance(index, FakeTensor)


def _may_steer(made: torch.Tensor) -> bool:
    """Whole numbers that are made from nothing: positions, lengths, masks."""
    whole = not made.is_floating_point() and not made.is_complex()
    return whole and made.numel() <= _LARGEST_REAL and made.device.type != "meta"
