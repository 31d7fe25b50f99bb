"""Operations that move data move places along: one function for each, by the name of the operation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from sloth_fx.locate.places import NOWHERE, Places, collapse, concatenate, narrow, reshape, smallest, spread, varies
from sloth_fx.locate.tags import places_of, places_or_nowhere, set_places
from sloth_fx.locate.values import is_real, values_of


def _viewed(tensor: torch.Tensor, outputs: list[torch.Tensor], **_: Any) -> list[Places]:
    return [reshape(places_or_nowhere(tensor), outputs[0].shape)]


def _copied(tensor: torch.Tensor, outputs: list[torch.Tensor], **_: Any) -> list[Places]:
    """Memory of its own: hosts write other tokens into it."""
    places = places_or_nowhere(tensor)
    slim = narrow(places).copy()
    strides = [new if old else 0 for new, old in zip(slim.strides, places.strides, strict=True)]
    return [np.lib.stride_tricks.as_strided(slim, places.shape, strides)]


def _permuted(tensor: torch.Tensor, outputs: list[torch.Tensor], dims: list[int] | None = None, **_: Any) -> list[Any]:
    return [places_or_nowhere(tensor).transpose(dims)]


def _transposed(tensor: torch.Tensor, outputs: list[torch.Tensor], dim0: int = 0, dim1: int = 1) -> list[Places]:
    return [places_or_nowhere(tensor).swapaxes(dim0, dim1) if tensor.ndim > 1 else places_or_nowhere(tensor)]


def _expanded(tensor: torch.Tensor, outputs: list[torch.Tensor], **_: Any) -> list[Places]:
    return [spread(places_or_nowhere(tensor), outputs[0].shape)]


def _sliced(
    tensor: torch.Tensor,
    outputs: list[torch.Tensor],
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> list[Places]:
    return [places_or_nowhere(tensor)[(slice(None),) * (dim % tensor.ndim) + (slice(start, end, step),)]]


def _selected(tensor: torch.Tensor, outputs: list[torch.Tensor], dim: int, index: int) -> list[Places]:
    return [places_or_nowhere(tensor)[(slice(None),) * (dim % tensor.ndim) + (index,)]]


def _split(tensor: torch.Tensor, outputs: list[torch.Tensor], dim: int = 0, **_: Any) -> list[Places]:
    ends = list(itertools.accumulate(output.shape[dim] for output in outputs))
    starts = [0, *ends[:-1]]
    return [_sliced(tensor, [], dim, start, end)[0] for start, end in zip(starts, ends, strict=True)]


def _unbound(tensor: torch.Tensor, outputs: list[torch.Tensor], dim: int = 0) -> list[Places]:
    return [_selected(tensor, [], dim, index)[0] for index in range(len(outputs))]


def _concatenated(tensors: list[torch.Tensor], outputs: list[torch.Tensor], dim: int = 0) -> list[Places]:
    shape = outputs[0].shape
    dim %= len(shape)
    parts = [places_or_nowhere(tensor) for tensor in tensors if tensor.numel() > 0]
    channels = dim == len(shape) - 1 or (dim == 1 and len(shape) >= 4)
    if channels and not any(varies(part, dim) for part in parts):
        finest = _finest([collapse(part, dim) for part in parts])
        return [spread(smallest(finest, (*shape[:dim], 1, *shape[dim + 1 :])), shape)]
    return [concatenate(parts, dim)]


def _finest(parts: list[Places]) -> list[Places]:
    """Of feature maps that meet, those that tell most pixels apart: one that was scaled up tells fewer."""
    counts = [len(np.unique(narrow(part))) for part in parts] if parts[0].ndim >= 4 else [0] * len(parts)
    return [part for part, count in zip(parts, counts, strict=True) if count == max(counts)]


def _stacked(tensors: list[torch.Tensor], outputs: list[torch.Tensor], dim: int = 0) -> list[Places]:
    shape = outputs[0].shape
    dim %= len(shape)
    parts = [np.expand_dims(places_or_nowhere(tensor), dim) for tensor in tensors]
    if dim == len(shape) - 1:
        return [smallest(parts, shape)]
    return [concatenate(parts, dim)]


def _repeated(tensor: torch.Tensor, outputs: list[torch.Tensor], repeats: list[int]) -> list[Places]:
    places = places_or_nowhere(tensor)
    places = places.reshape((1,) * (len(repeats) - places.ndim) + places.shape)
    times = [count if varies(places, axis) else 1 for axis, count in enumerate(repeats)]
    slim = np.tile(narrow(places), times)
    return [spread(slim, outputs[0].shape)] if _broadcasts(slim.shape, outputs[0].shape) else []


def _broadcasts(old: tuple[int, ...], new: torch.Size) -> bool:
    return all(size in (1, other) for size, other in zip(old, new, strict=True))


def _padded(tensor: torch.Tensor, outputs: list[torch.Tensor], pad: list[int], value: Any = 0) -> list[Places]:
    places = places_or_nowhere(tensor)
    for number in range(len(pad) // 2):
        axis, (before, after) = places.ndim - 1 - number, pad[2 * number : 2 * number + 2]
        if before < 0 or after < 0:
            places = places[(slice(None),) * axis + (slice(max(0, -before), min(0, after) or None),)]
        if places.shape[axis] > 1 and places.strides[axis] == 0:  # channels: what is added to them is of the same token
            longer = (
                *places.shape[:axis],
                places.shape[axis] + max(0, before) + max(0, after),
                *places.shape[axis + 1 :],
            )
            places = spread(collapse(places, axis), longer)
            continue
        first, last = (
            spread(np.array(NOWHERE), (*places.shape[:axis], max(0, extra), *places.shape[axis + 1 :]))
            for extra in (before, after)
        )
        places = concatenate([part for part in (first, places, last) if part.shape[axis]], axis)
    return [places]


def _bordered(tensor: torch.Tensor, outputs: list[torch.Tensor], padding: list[int]) -> list[Places]:
    """A border of copies stands for nothing new."""
    return _padded(tensor, outputs, padding)


def _rolled(
    tensor: torch.Tensor, outputs: list[torch.Tensor], shifts: list[int], dims: Sequence[int] = ()
) -> list[Places]:
    if not dims:  # along the flattened elements
        return []
    places = places_or_nowhere(tensor)
    return [spread(np.roll(narrow(places), _where_wide(places, shifts, dims), tuple(dims)), places.shape)]


def _where_wide(places: Places, shifts: list[int], dims: Sequence[int]) -> tuple[int, ...]:
    return tuple(shift if places.strides[dim] else 0 for shift, dim in zip(shifts, dims, strict=True))


def _flipped(tensor: torch.Tensor, outputs: list[torch.Tensor], dims: list[int]) -> list[Places]:
    return [np.flip(places_or_nowhere(tensor), tuple(dims))]


def _windowed(tensor: torch.Tensor, outputs: list[torch.Tensor], dimension: int, size: int, step: int) -> list[Any]:
    windows = np.lib.stride_tricks.sliding_window_view(places_or_nowhere(tensor), size, dimension)
    return [windows[(slice(None),) * (dimension % tensor.ndim) + (slice(None, None, step),)]]


def _unshuffled(tensor: torch.Tensor, outputs: list[torch.Tensor], downscale_factor: int) -> list[Places]:
    corner = collapse(places_or_nowhere(tensor), -3)[..., ::downscale_factor, ::downscale_factor]
    return [spread(corner, outputs[0].shape)]


def _patches(
    tensor: torch.Tensor,
    outputs: list[torch.Tensor],
    kernel_size: list[int],
    dilation: list[int],
    padding: list[int],
    stride: list[int],
) -> list[Places]:
    """``F.unfold``: (B, C, H, W) -> (B, C * window, windows), each known by the pixel in its middle."""
    places = collapse(places_or_nowhere(tensor), -3)
    for axis in (0, 1):
        size, reach = tensor.shape[axis - 2], dilation[axis] * (kernel_size[axis] - 1)
        count = (size + 2 * padding[axis] - reach - 1) // stride[axis] + 1
        middles = np.arange(count) * stride[axis] + reach // 2 - padding[axis]
        places = places.take(middles.clip(0, size - 1), axis - 2)
    shape = outputs[0].shape
    return [spread(places.reshape(*shape[:-2], 1, shape[-1]), shape)]


def _indexed(tensor: torch.Tensor, outputs: list[torch.Tensor], indices: list[Any]) -> list[Places]:
    places = places_or_nowhere(tensor)
    axes = [axis for axis, index in enumerate(indices) if index is not None]
    if all(is_real(index) for index in indices):
        chosen = tuple(slice(None) if index is None else values_of(index) for index in indices)
        slim = tuple(
            slice(0, 1) if axis not in axes and not stride else slice(None)
            for axis, stride in enumerate(places.strides)
        )
        return [spread(places[slim][chosen], outputs[0].shape)]
    # By numbers that nobody knows: what does not depend on the axis that is indexed stays.
    if any(varies(places, axis) for axis in axes) or outputs[0].ndim != places.ndim:
        return []
    for axis in axes:
        places = collapse(places, axis)
    return [spread(places, outputs[0].shape)] if _broadcasts(places.shape, outputs[0].shape) else []


def _index_selected(tensor: torch.Tensor, outputs: list[torch.Tensor], dim: int, index: torch.Tensor) -> list[Places]:
    return _indexed(tensor, outputs, [*[None] * (dim % tensor.ndim), index])


def _gathered(tensor: torch.Tensor, outputs: list[torch.Tensor], dim: int, index: Any, **_: Any) -> list[Places]:
    if not is_real(index):
        return []
    return [np.take_along_axis(places_or_nowhere(tensor), values_of(index), dim)]


def _scattered(
    tensor: torch.Tensor, outputs: list[torch.Tensor], dim: int, index: Any, src: Any = None, **_: Any
) -> list[Places]:
    if not is_real(index) or not isinstance(src, torch.Tensor):
        return []
    places, chosen = np.array(places_or_nowhere(tensor)), values_of(index)
    np.put_along_axis(places, chosen, places_or_nowhere(src)[tuple(map(slice, chosen.shape))], dim)
    return [places]


def _real_parts(tensor: torch.Tensor, outputs: list[torch.Tensor]) -> list[Places]:
    return [spread(places_or_nowhere(tensor)[..., None], outputs[0].shape)]


def _complex(tensor: torch.Tensor, outputs: list[torch.Tensor]) -> list[Places]:
    return [places_or_nowhere(tensor)[..., 0]]


def write(target: torch.Tensor, value: torch.Tensor) -> None:
    """``target[...] = value``; a view of a buffer shares its places with it. Copies within one buffer (a border that
    wraps around) stand for nothing new."""
    if target.untyped_storage()._cdata == value.untyped_storage()._cdata:
        return
    places, new = places_of(target), spread(places_or_nowhere(value), target.shape)
    if places is not None and places.flags.writeable:
        places[...] = new
    else:
        set_places(target, new)


def put(target: torch.Tensor, indices: list[Any] | torch.Tensor, values: torch.Tensor) -> Places | None:
    """``target[indices] = values``, or of the elements that a mask picks."""
    places = np.array(places_or_nowhere(target))
    if isinstance(indices, torch.Tensor):  # a mask, and values in order
        if not is_real(indices):
            return None
        mask = np.broadcast_to(values_of(indices), places.shape)
        places[mask] = np.asarray(places_or_nowhere(values)).ravel()[: int(mask.sum())]
    elif all(map(is_real, indices)):
        chosen = tuple(slice(None) if index is None else values_of(index) for index in indices)
        places[chosen] = places_or_nowhere(values)
    else:
        return None
    return places


MOVES: Mapping[str, Callable[..., list[Places]]] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "unsqueeze"), _viewed),
    **dict.fromkeys(("alias", "detach", "lift_fresh", "view_as"), _viewed),
    **dict.fromkeys(("clone", "_to_copy", "contiguous"), _copied),
    **dict.fromkeys(("permute", "t", "numpy_T"), _permuted),
    **dict.fromkeys(("transpose", "swapaxes"), _transposed),
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), _split),
    "index": _indexed,
    "index_select": _index_selected,
    "gather": _gathered,
    "expand": _expanded,
    "slice": _sliced,
    "select": _selected,
    "unbind": _unbound,
    "cat": _concatenated,
    "stack": _stacked,
    "repeat": _repeated,
    "constant_pad_nd": _padded,
    "roll": _rolled,
    "flip": _flipped,
    "unfold": _windowed,
    "pixel_unshuffle": _unshuffled,
    "im2col": _patches,
    "scatter": _scattered,
    **dict.fromkeys((f"{kind}_pad{ndim}d" for kind in ("reflection", "replication") for ndim in (1, 2, 3)), _bordered),
    "view_as_real": _real_parts,
    "view_as_complex": _complex,
}
