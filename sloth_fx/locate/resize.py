"""The arguments of a trial run at another size: what depends on size differs, everything else is the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch._subclasses.fake_tensor import is_fake

from sloth_fx.capture.capture import Call
from sloth_fx.model_adapters import Arguments, ModelAdapter
from sloth_fx.site import LatentSize

_FACTORS = (
    (Fraction(2), Fraction(3)),
    (Fraction(1, 2), Fraction(1)),
)  # as many rows and columns; some models have a most
_MORE_TEXT = 3  # tokens


@dataclass(frozen=True)
class _Sizes:
    """What is known of the sizes of a call; ``packed`` are the tokens of a latent that is a sequence."""

    batch: int
    latent: LatentSize | None
    packed: int | None
    text: frozenset[int]


@dataclass(frozen=True)
class _Change:
    """What is changed: as many rows and columns, and how many images and tokens of text more."""

    rows: Fraction
    columns: Fraction
    images: int
    text: int

    def latent(self, size: LatentSize) -> LatentSize:
        return size._replace(
            rows=size.rows if size.rows == 1 else int(size.rows * self.rows), columns=int(size.columns * self.columns)
        )


def resized_calls(
    adapter: ModelAdapter,
    arguments: Arguments,
    call: Call,
    size: LatentSize | None,
    fake: Callable[[torch.Tensor], torch.Tensor],
) -> Iterator[tuple[Call, LatentSize | None]]:
    """``call`` with twice the rows, three times the columns, one image more and longer text; then, for models that
    refuse this, with less and less of it changed. Also the size that the latent has in it."""
    latent = arguments.latent(*call)
    if not isinstance(latent, torch.Tensor):
        return
    axes = adapter.axes or {3: "bnc"}.get(latent.ndim, "bchw")
    line = next((axes.index(letter) for letter in "nw" if letter in axes and "h" not in axes), None)
    packed = int(latent.shape[line]) if line is not None and line < latent.ndim else None
    text = frozenset(int(tensor.shape[1]) for tensor in arguments.text(*call).values() if tensor.ndim >= 2)
    sizes = _Sizes(int(latent.shape[0]), size, packed, text)
    for rows, columns in _FACTORS:
        for images, words in ((1, _MORE_TEXT), (1, 0), (0, 0)):
            change = _Change(rows, columns, images, words)
            yield _resized(call, adapter, sizes, fake, change), change.latent(size) if size is not None else None


def _resized(
    call: Call,
    adapter: ModelAdapter,
    sizes: _Sizes,
    fake: Callable[[torch.Tensor], torch.Tensor],
    change: _Change,
) -> Call:
    def tensor_like(tensor: torch.Tensor) -> torch.Tensor:
        shape = [_resized_axis(axis, size, tensor.ndim, sizes, change) for axis, size in enumerate(tensor.shape)]
        if sizes.latent is not None:
            shape = _resized_map(tuple(tensor.shape), shape, sizes.latent, change)
            if shape and shape[0] == sizes.batch * sizes.latent.frames and sizes.latent.frames > 1:
                shape[0] += change.images * sizes.latent.frames
        if shape and tensor.shape[0] == sizes.batch:
            shape[0] += change.images
        if not is_fake(tensor):  # has values, which are kept where they can be
            return tensor if list(tensor.shape) == shape else _repeated(tensor, shape)
        return fake(torch.empty(shape, dtype=tensor.dtype, device="meta"))

    def value_like(name: str | None, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return tensor_like(value)
        if name is not None and name == adapter.shapes:
            return _resized_shapes(value, change)
        if adapter.sizes is not None and name in adapter.sizes[-2:]:
            return int(value * (change.rows if name == adapter.sizes[-2] else change.columns))
        if isinstance(value, (list, tuple)):
            return type(value)(value_like(None, item) for item in value)
        if isinstance(value, dict):
            return {key: value_like(key, item) for key, item in value.items()}
        return value

    args, kwargs = call
    return (
        tuple(value_like(None, value) for value in args),
        {name: value_like(name, value) for name, value in kwargs.items()},
    )


def _repeated(tensor: torch.Tensor, shape: list[int]) -> torch.Tensor:
    """``tensor`` at another size: its last element along an axis again and again."""
    for axis, size in enumerate(shape):
        numbers = torch.arange(size, device=tensor.device).clamp(max=tensor.shape[axis] - 1)
        tensor = tensor.index_select(axis, numbers)
    return tensor


def _resized_axis(axis: int, size: int, ndim: int, sizes: _Sizes, change: _Change) -> int:
    if sizes.packed is not None and size == sizes.packed and (axis > 0 or ndim == 2):
        one_row = sizes.latent is not None and sizes.latent.rows == 1
        return int(size * change.columns * (1 if one_row else change.rows))
    if size in sizes.text and (axis == 1 or (axis == 0 and ndim == 2)) and ndim <= 3:
        return size + change.text
    return size


def _resized_map(old: tuple[int, ...], new: list[int], latent: LatentSize, change: _Change) -> list[int]:
    """A map (..., rows, columns) of the latent's size, or a whole multiple of it."""
    if len(old) < 4 or latent.rows == 1:
        return new
    times = old[-2] // latent.rows
    if times > 0 and old[-2:] == (latent.rows * times, latent.columns * times):
        new[-2:] = [int(old[-2] * change.rows), int(old[-1] * change.columns)]
    return new


def _resized_shapes(value: Any, change: _Change) -> Any:
    """Nested lists of (frames, rows, columns)."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, int) for item in value):
        *frames, rows, columns = value
        return type(value)((*frames, int(rows * change.rows), int(columns * change.columns)))
    return type(value)(_resized_shapes(item, change) for item in value) if isinstance(value, (list, tuple)) else value
