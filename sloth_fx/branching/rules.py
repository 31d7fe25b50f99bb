"""Sequences of tokens in other shapes, cut and joined, of which the parts that both branches share stay one.

Each rule returns NotImplemented where it does not hold: then both branches are computed for themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sloth_fx.branching.lengths import Length, bounds, number, product
from sloth_fx.branching.values import RULES, Part, Rule, Tokens, call


def _transpose(function: Any, args: Any, kwargs: Any) -> Any:
    tokens = args[0]
    one, other = (each % tokens.ndim for each in (*args[1:], *kwargs.values()))
    axis = {one: other, other: one}.get(tokens.axis, tokens.axis)
    return tokens.map(lambda part: call(function, part, *args[1:], **kwargs), axis)


def _permute(function: Any, args: Any, kwargs: Any) -> Any:
    tokens = args[0]
    order = kwargs.get("dims", args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:])
    axis = [each % tokens.ndim for each in order].index(tokens.axis)
    return tokens.map(lambda part: call(function, part, *args[1:], **kwargs), axis)


def _reshape(function: Any, args: Any, kwargs: Any) -> Any:
    tokens = args[0]
    given = kwargs.get("shape", kwargs.get("size", args[1:]))
    if len(given) == 1 and isinstance(given[0], (list, tuple)):
        given = given[0]
    if not all(isinstance(each, (int, Length)) for each in given):
        return NotImplemented
    return _reshaped(tokens, list(given))


def _unflatten(function: Any, args: Any, kwargs: Any) -> Any:
    tokens = args[0]
    dim, sizes = _given(("dim", "sizes"), args, kwargs)
    dim %= tokens.ndim
    if dim == tokens.axis:
        return NotImplemented
    return _reshaped(tokens, [*tokens.shape[:dim], *_resolved(sizes, tokens.shape[dim]), *tokens.shape[dim + 1 :]])


def _flatten(function: Any, args: Any, kwargs: Any) -> Any:
    tokens = args[0]
    first = kwargs.get("start_dim", args[1] if len(args) > 1 else 0) % tokens.ndim
    last = kwargs.get("end_dim", args[2] if len(args) > 2 else -1) % tokens.ndim
    merged = product(tokens.shape[first : last + 1])
    return _reshaped(tokens, [*tokens.shape[:first], merged, *tokens.shape[last + 1 :]])


def _reshaped(tokens: Tokens, shape: list[int]) -> Any:
    """The tokens in another shape, in which their axis is still an axis of its own."""
    shape = _resolved(shape, product(tokens.shape))
    before, size = product(tokens.shape[: tokens.axis]), tokens.shape[tokens.axis]
    axis = next(
        (index for index, each in enumerate(shape) if _same(each, size) and _same(product(shape[:index]), before)),
        None,
    )
    if axis is None:
        return NotImplemented
    parts = [part.reshape([*shape[:axis], part.shape[tokens.axis], *shape[axis + 1 :]]) for part in tokens.parts]
    return Tokens(parts, axis)


def _resolved(shape: Sequence[int], total: int) -> list[int]:
    known = product([each for each in shape if each != -1])
    return [total // known if each == -1 else each for each in shape]


def _same(one: Any, other: Any) -> bool:
    """Whether numbers are the same in each branch."""
    return all(number(one, branch) == number(other, branch) for branch in range(2))


def _given(names: Sequence[str], args: Any, kwargs: Any) -> list[Any]:
    """The arguments after the first one, of those ``names``."""
    return [*args[1:], *(kwargs[name] for name in names[len(args) - 1 :])]


def _unsqueeze(function: Any, args: Any, kwargs: Any) -> Any:
    tokens = args[0]
    dim = kwargs.get("dim", args[-1]) % (tokens.ndim + 1)
    return tokens.map(lambda part: call(function, part, dim), tokens.axis + (dim <= tokens.axis))


def _squeeze(function: Any, args: Any, kwargs: Any) -> Any:
    tokens, dim = args[0], kwargs.get("dim", args[1] if len(args) > 1 else None)
    if not isinstance(dim, int) or dim % tokens.ndim == tokens.axis:
        return NotImplemented
    dim %= tokens.ndim
    gone = tokens.shape[dim] == 1 and dim < tokens.axis
    return tokens.map(lambda part: call(function, part, dim), tokens.axis - gone)


def _split(function: Any, args: Any, kwargs: Any) -> Any:
    tokens = args[0]
    sizes = kwargs.get("split_size_or_sections", kwargs.get("split_size", args[1] if len(args) > 1 else None))
    dim = kwargs.get("dim", args[2] if len(args) > 2 else 0) % tokens.ndim
    if dim != tokens.axis:
        return tokens.map(lambda part: call(function, part, *args[1:], **kwargs))
    if not isinstance(sizes, (list, tuple)) or not _same(sum(sizes), tokens.shape[tokens.axis]):
        return NotImplemented
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return tuple(tokens.cut(start, start + size) for start, size in zip(starts, sizes, strict=True))


def _chunk(function: Any, args: Any, kwargs: Any) -> Any:
    tokens = args[0]
    dim = kwargs.get("dim", args[2] if len(args) > 2 else 0) % tokens.ndim
    if dim == tokens.axis:
        return NotImplemented
    return tokens.map(lambda part: call(function, part, *args[1:], **kwargs))


def _unbind(function: Any, args: Any, kwargs: Any) -> Any:
    tokens = args[0]
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % tokens.ndim
    if dim == tokens.axis:
        return NotImplemented
    return tokens.map(lambda part: call(function, part, *args[1:], **kwargs), tokens.axis - (dim < tokens.axis))


def _narrow_rule(function: Any, args: Any, kwargs: Any) -> Any:
    tokens = args[0]
    dim, start, length = _given(("dim", "start", "length"), args, kwargs)
    if dim % tokens.ndim != tokens.axis:
        return tokens.map(lambda part: call(function, part, dim, start, length))
    return tokens.cut(start, start + length)


def _cat(function: Any, args: Any, kwargs: Any) -> Any:
    values = args[0]
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % values[0].ndim
    first = next((each for each in values if isinstance(each, Tokens)), None)
    if first is None:  # pairs, and what is the same in both branches: tokens, unless these are samples or channels
        inner = 0 < dim < values[0].ndim - 1 and any(isinstance(each, Tensor) for each in values)
        return _concatenated(values, dim) if inner else NotImplemented
    if dim == first.axis and all(each.axis == dim for each in values if isinstance(each, Tokens)):
        return _concatenated(values, dim)
    if dim == first.axis or not _alike(values):
        return NotImplemented
    return Tokens([torch.cat([each.parts[i] for each in values], dim=dim) for i in range(len(first.parts))], first.axis)


def _stack(function: Any, args: Any, kwargs: Any) -> Any:
    values = args[0]
    first = values[0]
    if not _alike(values):
        return NotImplemented
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % (first.ndim + 1)
    parts = [torch.stack([each.parts[i] for each in values], dim=dim) for i in range(len(first.parts))]
    return Tokens(parts, first.axis + (dim <= first.axis))


def _alike(values: Sequence[Any]) -> bool:
    """Whether all are sequences of the same parts."""
    tokens = [each for each in values if isinstance(each, Tokens)]
    alike = all(each.axis == tokens[0].axis and each.sizes == tokens[0].sizes for each in tokens)
    return len(tokens) == len(values) and alike


def _getitem(function: Any, args: Any, kwargs: Any) -> Any:
    tokens, index = args
    indices = list(index) if isinstance(index, tuple) else [index]
    if not isinstance(tokens, Tokens) or any(
        not (each is ... or each is None or type(each) in (int, slice)) for each in indices
    ):
        return NotImplemented
    if ... in indices:
        place = indices.index(...)
        used = sum(each is not None and each is not ... for each in indices)
        indices[place : place + 1] = [slice(None)] * (tokens.ndim - used)
    found: Any = tokens
    axis, others = 0, []
    for each in indices:
        if each is not None and axis == tokens.axis:
            if not isinstance(each, slice) or each.step not in (None, 1):
                return NotImplemented
            start, stop = bounds(each, tokens.shape[axis])
            found = tokens.cut(start, stop)
            each = slice(None)
        axis += each is not None
        others.append(each)
    if all(each == slice(None) for each in others):
        return found
    moved = list(_before(others, tokens.axis))
    new = tokens.axis + sum(each is None for each in moved) - sum(isinstance(each, int) for each in moved)
    if isinstance(found, Tokens):
        return found.map(lambda part: part[tuple(others)], new)
    return found[tuple(others)]


def _before(indices: Sequence[Any], axis: int) -> Iterator[Any]:
    """The indices that come before an axis."""
    for each in indices:
        if axis == 0 and each is not None:
            return
        axis -= each is not None
        yield each


def _for_tokens(rule: Rule) -> Rule:
    """``rule``, which holds where the first argument is a sequence."""
    return lambda function, args, kwargs: (
        rule(function, args, kwargs) if isinstance(args[0], Tokens) else NotImplemented
    )


def _concatenated(values: Sequence[Any], axis: int) -> Tokens:
    """Parts one after another, of which some may be sequences themselves; as by torch, it is all new."""
    parts: list[Part] = []
    for value in values:
        parts += value.parts if isinstance(value, Tokens) else [value]
    dtype = functools.reduce(torch.promote_types, (part.dtype for part in parts))
    return Tokens([part.to(dtype).clone(memory_format=torch.contiguous_format) for part in parts], axis)


RULES |= {
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _for_tokens(_transpose)),
    **dict.fromkeys(("reshape", "view"), _for_tokens(_reshape)),
    **dict.fromkeys(("split", "split_with_sizes"), _for_tokens(_split)),
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    "permute": _for_tokens(_permute),
    "unflatten": _for_tokens(_unflatten),
    "flatten": _for_tokens(_flatten),
    "unsqueeze": _for_tokens(_unsqueeze),
    "squeeze": _for_tokens(_squeeze),
    "chunk": _for_tokens(_chunk),
    "unbind": _for_tokens(_unbind),
    "narrow": _for_tokens(_narrow_rule),
    "stack": _stack,
    "getitem": _getitem,
}
