"""Follow the tokens: which element of which input does each element of each tensor stand for?

A :class:`Provenance` watches a shape-only run operation by operation and carries an array of places
(:mod:`sloth_fx.locate.places`) along with every tensor. What moves data moves places; what works on each token alone
keeps them; the result of a matrix product stands for what its rows stand for. So at an attention the places of the keys
say which of them are pixels, where these lie, and which are text, whatever the code in between was written like.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sloth_fx.locate.places import (
    NOWHERE,
    Places,
    collapse,
    concatenate,
    narrow,
    pick,
    reshape,
    smallest,
    spread,
    varies,
)

_LARGEST_REAL = 2**20  # elements of a tensor of whole numbers whose values are kept
_LARGEST_BUFFER = 2**24  # elements of an empty tensor whose places are followed as it is filled


@dataclass(frozen=True)
class Source:
    """An input of the model, whose elements are the places ``first``, ``first + 1``, ... in row-major order."""

    name: str
    shape: tuple[int, ...]
    first: int

    def coordinates(self, places: Places) -> list[Places]:
        """Per axis of the input, the coordinate of each place; all of them have to be this source's."""
        return list(np.unravel_index(places - self.first, self.shape))

    def holds(self, places: Places) -> NDArray[np.bool_]:
        return (places >= self.first) & (places < self.first + math.prod(self.shape))


@dataclass(frozen=True)
class Scores:
    """The product of queries (..., N, D) and transposed keys (..., D, M)."""

    query: torch.Tensor
    key_transposed: torch.Tensor


class Provenance(TorchDispatchMode):
    """Follows places, and reports attention that is spelled out.

    ``on_attention(scores)`` is called where the softmax of a product of two activations is multiplied with a third;
    ``on_linear()`` where keys and values are multiplied over all tokens, before any query. ``inputs`` are the tensors
    that have places, by name, the most telling first: where elements of several meet, the first one names the result.
    """

    def __init__(
        self, inputs: Mapping[str, torch.Tensor], on_attention: Callable[[Scores], None], on_linear: Callable[[], None]
    ) -> None:
        super().__init__()
        self.sources: list[Source] = []
        self.on_attention = on_attention
        self.on_linear = on_linear
        self._maps: dict[tuple[Any, ...], Places] = {}
        first = 0
        for name, tensor in inputs.items():
            source = Source(name, tuple(tensor.shape), first)
            self.sources.append(source)
            first += tensor.numel()
            set_places(tensor, np.arange(source.first, first).reshape(source.shape))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name == "index":
            args = _with_numbers(args)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        result = _computed(func, args, kwargs, inputs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if not outputs or outputs[0].numel() == 0:
            return result
        if any(hasattr(tensor, "_sloth_fx_places") for tensor in inputs):
            self._follow(name, func, args, kwargs, inputs, outputs)
        elif name in _FACTORIES:
            set_places(outputs[0], _buffer(outputs[0]))
        self._follow_scores(name, args, inputs, outputs[0])
        return result

    def _follow(
        self,
        name: str,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        inputs: list[torch.Tensor],
        outputs: list[torch.Tensor],
    ) -> None:
        if name in _MOVES:
            names = [argument.name for argument in func._schema.arguments]
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            tensor = given.pop(names[0])
            for output, places in zip(outputs, _MOVES[name](tensor, outputs, **given), strict=False):
                set_places(output, places)
        elif name in _PRODUCTS:
            set_places(outputs[0], self._product(inputs, outputs[0]))
        elif name == "copy_":
            _write(outputs[0], inputs[1])
        elif name.strip("_") in _PUTS:
            set_places(outputs[0], _put(*args[:3]))
        elif name.strip("_") == "index_copy":
            target, dim, index, value = args
            set_places(outputs[0], _put(target, [*[None] * (dim % target.ndim), index], value))
        elif name in _FACTORIES:
            set_places(outputs[0], _buffer(outputs[0]))
        elif name == "convolution" or name.startswith(_SCALING):
            places = places_of(inputs[0])
            set_places(outputs[0], self._scaled(places, outputs[0].shape) if places is not None else None)
        elif name in _REDUCTIONS:
            set_places(outputs[0], _reduced(places_of(inputs[0]), outputs[0].shape))
        elif name.startswith("_scaled_dot_product"):
            query = places_of(inputs[0])
            set_places(outputs[0], spread(collapse(query, -1), outputs[0].shape) if query is not None else None)
        elif name == "embedding":
            places = places_of(inputs[1])
            set_places(outputs[0], spread(places[..., None], outputs[0].shape) if places is not None else None)
        elif name not in _UNORDERED:
            for output in outputs:
                set_places(output, _elementwise(inputs, output.shape))

    def _product(self, inputs: list[torch.Tensor], output: torch.Tensor) -> Places | None:
        """Rows of the left factor, or columns of the right one; a sum over tokens of both stands for none."""
        left, right = (places_of(tensor) for tensor in inputs[-2:])
        shape = output.shape
        if left is not None and right is not None and varies(left, -1) and varies(right, -2):
            if not varies(left, -2) and not varies(right, -1):
                if not any(hasattr(tensor, "_sloth_fx_probabilities") for tensor in inputs[-2:]):
                    self.on_linear()
                return None
            left = right if varies(right, -1) and not varies(left, -2) else left
            return spread(collapse(left, -1 if left is not right else -2), shape)
        rows = collapse(left, -1) if left is not None else None
        columns = collapse(right, -2) if right is not None else None
        if rows is not None and (columns is None or varies(rows, -2) or not varies(columns, -1)):
            return spread(rows, shape)
        return spread(columns, shape) if columns is not None else None

    def _scaled(self, places: Places, shape: torch.Size) -> Places | None:
        """A map (B, C, ...) at another scale; where a map of this size was seen before, its places are used again."""
        if len(shape) != places.ndim or shape[0] != places.shape[0]:
            return None
        places = narrow(collapse(places, 1))
        source = next((index for index, each in enumerate(self.sources) if each.holds(places.min())), None)
        key = source, shape[0], tuple(shape[2:])
        if key in self._maps and any(new > old for new, old in zip(shape[2:], _sizes(places, shape), strict=True)):
            return spread(self._maps[key], shape)
        for axis in range(2, len(shape)):
            places = pick(places, axis, shape[axis]) if places.shape[axis] != shape[axis] else places
        self._maps[key] = places
        return spread(places, shape)

    def _follow_scores(
        self, name: str, args: tuple[Any, ...], inputs: list[torch.Tensor], output: torch.Tensor
    ) -> None:
        """Carry along what scores and probabilities were made of, as long as they keep their number of elements."""
        if name in _PRODUCTS:
            factors = inputs[-2:]
            for factor in factors:
                scores = getattr(factor, "_sloth_fx_probabilities", None)
                if scores is not None:
                    self.on_attention(scores)
                    return
            if all(tensor.ndim >= 2 and not isinstance(tensor, torch.nn.Parameter) for tensor in factors):
                _mark(output, "_sloth_fx_scores", Scores(*factors))
            return
        for tensor in inputs:
            if tensor.numel() != output.numel():
                continue
            scores = getattr(tensor, "_sloth_fx_scores", None)
            if scores is not None:
                _mark(output, "_sloth_fx_probabilities" if name in _SOFTMAX else "_sloth_fx_scores", scores)
            probabilities = getattr(tensor, "_sloth_fx_probabilities", None)
            if probabilities is not None:
                _mark(output, "_sloth_fx_probabilities", probabilities)


def _computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[torch.Tensor]) -> Any:
    """What has values keeps them: hosts steer by masks, lengths and coordinates."""
    if inputs and all(map(_is_real, inputs)):
        with unset_fake_temporarily():
            return func(*args, **kwargs)
    result = func(*args, **kwargs)
    if not inputs and isinstance(result, torch.Tensor) and _has_values(result):
        with unset_fake_temporarily():
            return func(*args, **kwargs)
    return result


def _has_values(made: torch.Tensor) -> bool:
    """Whole numbers that are made from nothing (positions, lengths, masks) stay real: hosts steer by them."""
    whole = not made.is_floating_point() and not made.is_complex()
    return whole and made.numel() <= _LARGEST_REAL and made.device.type != "meta"


def _with_numbers(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of an indexing, with real masks as the numbers that they pick: then the result has a shape."""
    tensor, indices = args
    numbers: list[Any] = []
    for index in indices:
        if isinstance(index, torch.Tensor) and index.dtype == torch.bool and not isinstance(index, FakeTensor):
            with unset_fake_temporarily():
                numbers.extend(index.nonzero(as_tuple=True))
        else:
            numbers.append(index)
    return tensor, numbers


def places_of(tensor: torch.Tensor) -> Places | None:
    """The places of a tensor's elements; ``None`` where no input has a part in it, or nobody knows."""
    places: Places | None = getattr(tensor, "_sloth_fx_places", None)
    return places


def set_places(tensor: torch.Tensor, places: Places | None) -> None:
    if places is not None and tuple(places.shape) == tuple(tensor.shape):
        _mark(tensor, "_sloth_fx_places", places)
    elif hasattr(tensor, "_sloth_fx_places"):
        del tensor._sloth_fx_places


def _mark(tensor: torch.Tensor, name: str, value: Any) -> None:
    setattr(tensor, name, value)


def _sizes(places: Places, shape: torch.Size) -> tuple[int, ...]:
    return places.shape[2 : len(shape)]


def _elementwise(inputs: list[torch.Tensor], shape: torch.Size) -> Places | None:
    """Of inputs that broadcast to the result: what an operation on each element alone gives."""
    parts = []
    for tensor in inputs:
        places = places_of(tensor)
        fits = tensor.ndim <= len(shape) and all(
            size in (1, other) for size, other in zip(reversed(tensor.shape), reversed(shape), strict=False)
        )
        if places is not None and fits:
            parts.append(places)
    return smallest(parts, shape) if parts else None


def _buffer(tensor: torch.Tensor) -> Places | None:
    """An empty tensor may be filled with tokens later, slice by slice."""
    return np.full(tuple(tensor.shape), NOWHERE) if tensor.ndim >= 2 and tensor.numel() <= _LARGEST_BUFFER else None


def _write(target: torch.Tensor, value: torch.Tensor) -> None:
    """``target[...] = value``; a view of a buffer shares its places with it."""
    places, new = places_of(target), spread(_places(value), target.shape)
    if places is not None and places.flags.writeable:
        places[...] = new
    else:
        set_places(target, new)


def _reduced(places: Places | None, shape: torch.Size) -> Places | None:
    """A sum or mean over axes along which places do not differ keeps them."""
    if places is None:
        return None
    kept = iter(shape)
    expected = next(kept, None)
    axes = []
    for axis, size in enumerate(places.shape):
        if len(shape) == places.ndim:
            reduced = shape[axis] != size
        else:
            reduced = size != expected
            expected = expected if reduced else next(kept, None)
        if reduced:
            axes.append(axis)
    if any(varies(places, axis) for axis in axes):
        return None
    for axis in axes:
        places = collapse(places, axis)
    return reshape(places, shape) if math.prod(places.shape) == math.prod(shape) else None


def _put(target: torch.Tensor, indices: list[Any] | torch.Tensor, values: torch.Tensor) -> Places | None:
    """``target[indices] = values``, or of the elements that a mask picks."""
    places = np.array(_places(target))
    if isinstance(indices, torch.Tensor):  # a mask, and values in order
        if not _is_real(indices):
            return None
        mask = np.broadcast_to(_numbers(indices), places.shape)
        places[mask] = np.asarray(_places(values)).ravel()[: int(mask.sum())]
    elif all(map(_is_real, indices)):
        numbers = tuple(slice(None) if index is None else _numbers(index) for index in indices)
        places[numbers] = _places(values)
    else:
        return None
    return places


def _viewed(tensor: torch.Tensor, outputs: list[torch.Tensor], **_: Any) -> list[Places]:
    return [reshape(_places(tensor), outputs[0].shape)]


def _permuted(tensor: torch.Tensor, outputs: list[torch.Tensor], dims: list[int] | None = None, **_: Any) -> list[Any]:
    return [_places(tensor).transpose(dims)]


def _transposed(tensor: torch.Tensor, outputs: list[torch.Tensor], dim0: int = 0, dim1: int = 1) -> list[Places]:
    return [_places(tensor).swapaxes(dim0, dim1) if tensor.ndim > 1 else _places(tensor)]


def _expanded(tensor: torch.Tensor, outputs: list[torch.Tensor], **_: Any) -> list[Places]:
    return [spread(_places(tensor), outputs[0].shape)]


def _sliced(
    tensor: torch.Tensor,
    outputs: list[torch.Tensor],
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> list[Places]:
    return [_places(tensor)[(slice(None),) * (dim % tensor.ndim) + (slice(start, end, step),)]]


def _selected(tensor: torch.Tensor, outputs: list[torch.Tensor], dim: int, index: int) -> list[Places]:
    return [_places(tensor)[(slice(None),) * (dim % tensor.ndim) + (index,)]]


def _split(tensor: torch.Tensor, outputs: list[torch.Tensor], dim: int = 0, **_: Any) -> list[Places]:
    ends = list(itertools.accumulate(output.shape[dim] for output in outputs))
    starts = [0, *ends[:-1]]
    return [_sliced(tensor, [], dim, start, end)[0] for start, end in zip(starts, ends, strict=True)]


def _unbound(tensor: torch.Tensor, outputs: list[torch.Tensor], dim: int = 0) -> list[Places]:
    return [_selected(tensor, [], dim, index)[0] for index in range(len(outputs))]


def _concatenated(tensors: list[torch.Tensor], outputs: list[torch.Tensor], dim: int = 0) -> list[Places]:
    shape = outputs[0].shape
    dim %= len(shape)
    parts = [_places(tensor) for tensor in tensors if tensor.numel() > 0]
    channels = dim == len(shape) - 1 or (dim == 1 and len(shape) >= 4)
    if channels and not any(varies(part, dim) for part in parts):
        return [spread(smallest([collapse(part, dim) for part in parts], (*shape[:dim], 1, *shape[dim + 1 :])), shape)]
    return [concatenate(parts, dim)]


def _stacked(tensors: list[torch.Tensor], outputs: list[torch.Tensor], dim: int = 0) -> list[Places]:
    shape = outputs[0].shape
    dim %= len(shape)
    parts = [np.expand_dims(_places(tensor), dim) for tensor in tensors]
    if dim == len(shape) - 1:
        return [smallest(parts, shape)]
    return [concatenate(parts, dim)]


def _repeated(tensor: torch.Tensor, outputs: list[torch.Tensor], repeats: list[int]) -> list[Places]:
    places = _places(tensor)
    places = places.reshape((1,) * (len(repeats) - places.ndim) + places.shape)
    times = [count if varies(places, axis) else 1 for axis, count in enumerate(repeats)]
    slim = np.tile(narrow(places), times)
    return [spread(slim, outputs[0].shape)] if _broadcasts(slim.shape, outputs[0].shape) else []


def _broadcasts(old: tuple[int, ...], new: torch.Size) -> bool:
    return all(size in (1, other) for size, other in zip(old, new, strict=True))


def _padded(tensor: torch.Tensor, outputs: list[torch.Tensor], pad: list[int], value: Any = 0) -> list[Places]:
    places = _places(tensor)
    for number in range(len(pad) // 2):
        axis, (before, after) = places.ndim - 1 - number, pad[2 * number : 2 * number + 2]
        if before < 0 or after < 0:
            places = places[(slice(None),) * axis + (slice(max(0, -before), min(0, after) or None),)]
        first, last = (
            spread(np.int64(NOWHERE), (*places.shape[:axis], max(0, extra), *places.shape[axis + 1 :]))
            for extra in (before, after)
        )
        places = concatenate([part for part in (first, places, last) if part.shape[axis]], axis)
    return [places]


def _rolled(tensor: torch.Tensor, outputs: list[torch.Tensor], shifts: list[int], dims: list[int]) -> list[Places]:
    places = _places(tensor)
    return [spread(np.roll(narrow(places), _where_wide(places, shifts, dims), tuple(dims)), places.shape)]


def _where_wide(places: Places, shifts: list[int], dims: list[int]) -> tuple[int, ...]:
    return tuple(shift if places.strides[dim] else 0 for shift, dim in zip(shifts, dims, strict=True))


def _flipped(tensor: torch.Tensor, outputs: list[torch.Tensor], dims: list[int]) -> list[Places]:
    return [np.flip(_places(tensor), dims)]


def _windowed(tensor: torch.Tensor, outputs: list[torch.Tensor], dimension: int, size: int, step: int) -> list[Any]:
    windows = np.lib.stride_tricks.sliding_window_view(_places(tensor), size, dimension)
    return [windows[(slice(None),) * (dimension % tensor.ndim) + (slice(None, None, step),)]]


def _unshuffled(tensor: torch.Tensor, outputs: list[torch.Tensor], downscale_factor: int) -> list[Places]:
    corner = collapse(_places(tensor), -3)[..., ::downscale_factor, ::downscale_factor]
    return [spread(corner, outputs[0].shape)]


def _indexed(tensor: torch.Tensor, outputs: list[torch.Tensor], indices: list[Any]) -> list[Places]:
    places = _places(tensor)
    axes = [axis for axis, index in enumerate(indices) if index is not None]
    if all(_is_real(index) for index in indices):
        numbers = tuple(slice(None) if index is None else _numbers(index) for index in indices)
        slim = tuple(
            slice(0, 1) if axis not in axes and not stride else slice(None)
            for axis, stride in enumerate(places.strides)
        )
        return [spread(places[slim][numbers], outputs[0].shape)]
    # By numbers that nobody knows: what does not depend on the axis that is indexed stays.
    if any(varies(places, axis) for axis in axes) or outputs[0].ndim != places.ndim:
        return []
    for axis in axes:
        places = collapse(places, axis)
    return [spread(places, outputs[0].shape)] if _broadcasts(places.shape, outputs[0].shape) else []


def _index_selected(tensor: torch.Tensor, outputs: list[torch.Tensor], dim: int, index: torch.Tensor) -> list[Places]:
    return _indexed(tensor, outputs, [*[None] * (dim % tensor.ndim), index])


def _gathered(tensor: torch.Tensor, outputs: list[torch.Tensor], dim: int, index: Any, **_: Any) -> list[Places]:
    if not _is_real(index):
        return []
    return [np.take_along_axis(_places(tensor), _numbers(index), dim)]


def _numbers(index: torch.Tensor) -> NDArray[Any]:
    with unset_fake_temporarily():
        return index.cpu().numpy()


def _is_real(index: Any) -> bool:
    return index is None or not isinstance(index, FakeTensor)


def _real_parts(tensor: torch.Tensor, outputs: list[torch.Tensor]) -> list[Places]:
    return [spread(_places(tensor)[..., None], outputs[0].shape)]


def _complex(tensor: torch.Tensor, outputs: list[torch.Tensor]) -> list[Places]:
    return [_places(tensor)[..., 0]]


def _places(tensor: torch.Tensor) -> Places:
    places = places_of(tensor)
    return places if places is not None else np.broadcast_to(np.int64(NOWHERE), tuple(tensor.shape))


_MOVES: Mapping[str, Callable[..., list[Places]]] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "unsqueeze"), _viewed),
    **dict.fromkeys(("clone", "alias", "detach", "contiguous", "lift_fresh", "_to_copy", "view_as"), _viewed),
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
    "view_as_real": _real_parts,
    "view_as_complex": _complex,
}
_PRODUCTS = frozenset({"mm", "bmm", "addmm", "baddbmm"})
_FACTORIES = frozenset(
    prefix + kind + suffix
    for kind in ("empty", "zeros", "ones", "full")
    for prefix, suffix in (("", ""), ("new_", ""), ("", "_like"))
)
_PUTS = frozenset({"index_put", "index_put_impl", "masked_scatter"})
_SOFTMAX = frozenset({"softmax", "_softmax", "_safe_softmax"})
_SCALING = ("upsample", "_upsample", "avg_pool", "max_pool", "adaptive", "_adaptive", "pixel_shuffle", "reflection_pad")
_REDUCTIONS = frozenset({"sum", "mean", "amax", "amin", "max", "min", "var", "prod", "logsumexp", "linalg_vector_norm"})
_UNORDERED = frozenset({"sort", "topk", "argsort", "nonzero", "masked_select", "multinomial", "as_strided"})
