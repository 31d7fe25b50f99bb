"""Follow the tokens: which element of which input does each element of each tensor stand for?

A :class:`Provenance` watches a shape-only run operation by operation and carries an array of places
(:mod:`sloth_fx.locate.places`) along with every tensor. What moves data moves places; what works on each token alone
keeps them; the result of a matrix product stands for what its rows stand for. So at an attention the places of the keys
say which of them are pixels, where these lie, and which are text, whatever the code in between was written like.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sloth_fx.locate.moves import MOVES, put, write
from sloth_fx.locate.places import NOWHERE, Places, collapse, narrow, pick, reshape, smallest, spread, varies
from sloth_fx.locate.tags import mark, note_followers, places_of, set_places
from sloth_fx.locate.values import computed, with_numbers

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
class Packed:
    """Which tokens of a packed input, ``start`` to ``stop`` along ``axis``, are the latent's; others may be text."""

    axis: int
    start: int
    stop: int

    def alone(self, places: Places) -> Places:
        index = np.arange(places.shape[self.axis]).reshape(-1, *[1] * (places.ndim - self.axis - 1))
        return np.where((index >= self.start) & (index < self.stop), places, NOWHERE)


@dataclass(frozen=True)
class Scores:
    """The product of queries (..., N, D) and transposed keys (..., D, M)."""

    query: torch.Tensor
    key_transposed: torch.Tensor


class Provenance(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows places, and reports attention that is spelled out.

    ``on_attention(scores)`` is called where the softmax of a product of two activations is multiplied with a third;
    ``on_linear(keys)`` where keys (..., N, D) meet values before any query. ``inputs`` are the tensors that have
    places, by name, the most telling first: where elements of several meet, the first one names the result. Of the
    first one, the latent, ``packed`` tells which tokens it is.
    """

    def __init__(
        self,
        inputs: Mapping[str, torch.Tensor],
        on_attention: Callable[[Scores], None],
        on_linear: Callable[[torch.Tensor], None],
        packed: Packed | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sources: list[Source] = []
        self.on_attention = on_attention
        self.on_linear = on_linear
        self._maps: dict[tuple[Any, ...], Places] = {}
        first = 0
        for name, tensor in inputs.items():
            source = Source(name, tuple(tensor.shape), first)
            self.sources.append(source)
            first += tensor.numel()
            places = np.arange(source.first, first).reshape(source.shape)
            if packed is not None and len(self.sources) == 1:
                places = packed.alone(places)
            set_places(tensor, places)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name == "index":
            args = with_numbers(args)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        result = computed(func, args, kwargs, inputs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if not outputs or outputs[0].numel() == 0:
            return result
        note_followers(outputs, inputs)
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
        if name in MOVES:
            names = [argument.name for argument in func._schema.arguments]
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            tensor = given.pop(names[0])
            for output, moved in zip(outputs, MOVES[name](tensor, outputs, **given), strict=False):
                set_places(output, moved)
        elif name in _PRODUCTS:
            set_places(outputs[0], self._product(inputs, outputs[0]))
        elif name == "copy_":
            write(outputs[0], inputs[1])
        elif name.strip("_") in _PUTS:
            set_places(outputs[0], put(*args[:3]))
        elif name.strip("_") == "index_copy":
            target, dim, index, value = args
            set_places(outputs[0], put(target, [*[None] * (dim % target.ndim), index], value))
        elif name in _FACTORIES:
            set_places(outputs[0], _buffer(outputs[0]))
        elif name == "convolution" or name.startswith(_SCALING):
            places = places_of(inputs[0])
            if places is not None:
                centres = _centres(args, places, outputs[0].shape) if name == "convolution" else None
                places = self._scaled(places, outputs[0].shape, centres)
            set_places(outputs[0], places)
        elif name in _REDUCTIONS:
            set_places(outputs[0], _reduced(places_of(inputs[0]), outputs[0].shape))
        elif name.startswith("_scaled_dot_product"):
            places = places_of(inputs[0])
            set_places(outputs[0], spread(collapse(places, -1), outputs[0].shape) if places is not None else None)
        elif name == "embedding":
            places = places_of(inputs[1])
            words = spread(places[..., None], outputs[0].shape) if places is not None else None
            # Hosts write images into the places that the text keeps for them.
            set_places(outputs[0], np.array(words) if words is not None and words.size <= _LARGEST_BUFFER else words)
        elif name not in _WITHOUT_PLACES:
            unordered = name.strip("_") in _UNORDERED
            for output in outputs:
                set_places(output, _left_alone(inputs) if unordered else _elementwise(inputs, output.shape))

    def _product(self, inputs: list[torch.Tensor], output: torch.Tensor) -> Places | None:
        """Rows of the left factor, or columns of the right one; a sum over tokens of both stands for none."""
        left, right = (places_of(tensor) for tensor in inputs[-2:])
        shape = output.shape
        if left is not None and right is not None and varies(left, -1) and varies(right, -2):
            if not varies(left, -2) and not varies(right, -1):
                if not any(hasattr(tensor, "_sloth_fx_probabilities") for tensor in inputs[-2:]):
                    self.on_linear(inputs[-1])
                    return None
                return spread(right.min(-2, keepdims=True), shape)  # learned tokens stand for the first that they read
            by_column = varies(right, -1) and not varies(left, -2)
            return spread(collapse(right, -2) if by_column else collapse(left, -1), shape)
        rows = collapse(left, -1) if left is not None else None
        columns = collapse(right, -2) if right is not None else None
        if rows is not None and (columns is None or varies(rows, -2) or not varies(columns, -1)):
            return spread(rows, shape)
        return spread(columns, shape) if columns is not None else None

    def _scaled(
        self, places: Places, shape: torch.Size, centres: list[NDArray[np.int64]] | None = None
    ) -> Places | None:
        """A map (B, C, ...) at another scale, by default spread evenly; where a map of this size was seen before, its
        places are used again."""
        if len(shape) != places.ndim or shape[0] != places.shape[0]:
            return None
        places = narrow(collapse(places, 1))
        source = next((index for index, each in enumerate(self.sources) if each.holds(places.min())), None)
        key = source, shape[0], tuple(shape[2:])
        if key in self._maps and any(new > old for new, old in zip(shape[2:], _sizes(places, shape), strict=True)):
            return spread(self._maps[key], shape)
        for axis in range(2, len(shape)):
            if centres is not None:
                places = places.take(centres[axis - 2], axis) if places.shape[axis] > 1 else places
            elif places.shape[axis] != shape[axis]:
                places = pick(places, axis, shape[axis])
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
            if all(tensor.ndim >= 2 and not _is_weight(tensor) for tensor in factors):
                mark(output, "_sloth_fx_scores", Scores(*factors))
            return
        for tensor in inputs:
            if tensor.numel() != output.numel():
                continue
            scores = getattr(tensor, "_sloth_fx_scores", None)
            if scores is not None:
                mark(output, "_sloth_fx_probabilities" if name in _SOFTMAX else "_sloth_fx_scores", scores)
            probabilities = getattr(tensor, "_sloth_fx_probabilities", None)
            if probabilities is not None:
                mark(output, "_sloth_fx_probabilities", probabilities)


def _is_weight(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is a parameter, or a view of one."""
    return isinstance(tensor, torch.nn.Parameter) or isinstance(tensor._base, torch.nn.Parameter)


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


def _centres(args: tuple[Any, ...], places: Places, shape: torch.Size) -> list[NDArray[np.int64]] | None:
    """Along each axis of a convolution's result, which element of its input lies under the middle of the kernel.

    Where a host has padded by itself, it is elsewhere under the kernel if that gives more than padding: causal
    convolutions have nothing in front.
    """
    tensor, weight, _, stride, padding, dilation, transposed = args[:7]
    if transposed:
        return None
    centres = []
    for axis, (kernel, step, pad, apart) in enumerate(
        zip(weight.shape[2:], stride, padding, dilation, strict=True), start=2
    ):
        starts, middle = np.arange(shape[axis]) * step - pad, (kernel - 1) // 2
        parts = [middle]
        if pad == 0 and varies(places, axis):
            known = (narrow(places) != NOWHERE).any(tuple(other for other in range(places.ndim) if other != axis))
            parts = sorted(range(kernel), key=lambda part: abs(part - middle))
            parts.sort(key=lambda part: -int(known[starts + part * apart].sum()))
        centres.append(np.clip(starts + parts[0] * apart, 0, tensor.shape[axis] - 1))
    return centres


def _left_alone(inputs: list[torch.Tensor]) -> Places | None:
    """What is put where nobody knows leaves the places of the tokens as they are, if it has none itself."""
    return places_of(inputs[0]) if all(places_of(tensor) is None for tensor in inputs[1:]) else None


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


_PRODUCTS = frozenset({"mm", "bmm", "addmm", "baddbmm"})
_FACTORIES = frozenset(
    prefix + kind + suffix
    for kind in ("empty", "zeros", "ones", "full")
    for prefix, suffix in (("", ""), ("new_", ""), ("", "_like"))
)
_PUTS = frozenset({"index_put", "index_put_impl", "masked_scatter"})
_SOFTMAX = frozenset({"softmax", "_softmax", "_safe_softmax"})
_SCALING = ("upsample", "_upsample", "avg_pool", "max_pool", "adaptive", "_adaptive", "pixel_shuffle")
_REDUCTIONS = frozenset({"sum", "mean", "amax", "amin", "max", "min", "var", "prod", "logsumexp", "linalg_vector_norm"})
_UNORDERED = frozenset({"scatter", "scatter_add", "scatter_reduce", "index_add", "index_reduce", "put"})
_WITHOUT_PLACES = frozenset({"sort", "topk", "argsort", "nonzero", "masked_select", "multinomial", "as_strided"})
