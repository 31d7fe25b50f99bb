"""What works on the parts of a sequence of tokens alike, so that what both branches share stays one.

Each rule returns NotImplemented where it does not hold: then both branches are computed for themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sloth_fx.branching.lengths import Length, bounds
from sloth_fx.branching.mode import one_if_equal
from sloth_fx.branching.values import RULES, Pair, Part, Rule, Tokens, call, name_of, narrowed

_MODULATIONS = frozenset({"add", "sub", "mul", "div", "true_divide", "addcmul"})
_ELEMENTWISE = frozenset(
    (
        *("add", "sub", "rsub", "mul", "div", "true_divide", "pow", "addcmul", "lerp", "neg", "abs", "square", "sqrt"),
        *("rsqrt", "exp", "sigmoid", "tanh", "relu", "gelu", "silu", "clamp", "nan_to_num", "dropout", "contiguous"),
        *("clone", "detach", "to", "type", "type_as", "float", "half", "bfloat16", "double"),
    )
)
_OF_CHANNELS = frozenset({"linear", "layer_norm", "rms_norm"})
_ALONG = frozenset({"mean", "sum", "var", "norm", "softmax", "cumsum", "amax", "amin", "vector_norm", "std"})


def _elementwise(function: Any, args: Any, kwargs: Any) -> Any:
    tokens = [each for each in (*args, *kwargs.values()) if isinstance(each, Tokens)]
    if not tokens:
        return _modulated(function, args, kwargs)
    first = tokens[0]
    back = first.axis - first.ndim  # the token axis, from the end
    if any(each.axis - each.ndim != back or each.sizes != first.sizes for each in tokens):
        return NotImplemented
    total = sum(first.sizes)

    def of_part(value: Any, index: int) -> Any:
        if isinstance(value, Tokens):
            return value.parts[index]
        if isinstance(value, (Tensor, Pair)) and value.ndim >= -back and value.shape[back] == total:
            part = narrowed(value, value.ndim + back, sum(first.sizes[:index]), first.sizes[index])
            in_both = isinstance(total, Length) and isinstance(first.parts[index], Tensor)  # positions of the image
            return one_if_equal(part) if in_both else part
        return value

    results = [
        call(function, *(of_part(each, i) for each in args), **{key: of_part(each, i) for key, each in kwargs.items()})
        for i in range(len(first.parts))
    ]
    return Tokens(results, results[0].ndim + back)


def _modulated(function: Any, args: Any, kwargs: Any) -> Any:
    """A vector of each text that modulates tokens (B, N, C) which are the same in both branches does so with that of
    the text itself: there is one image."""
    own = [each for each in args if isinstance(each, Tensor) and each.ndim == 3 and each.is_floating_point()]
    pairs = [each for each in args if isinstance(each, Pair)]
    if name_of(function) not in _MODULATIONS or not own or not all(_is_vector_of(each, own[0]) for each in pairs):
        return NotImplemented
    return function(*(each.positive if isinstance(each, Pair) else each for each in args), **kwargs)


def _is_vector_of(pair: Pair, tokens: Tensor) -> bool:
    """Whether ``pair`` is one vector for all ``tokens``, and not a row of a mask (B, N, N)."""
    count, channels = tokens.shape[1:]
    shape = (1, *pair.shape)[-2:]
    return count > 1 and count != channels and shape == (1, channels)


def _of_channels(function: Any, args: Any, kwargs: Any) -> Any:
    tokens = args[0]
    if not isinstance(tokens, Tokens) or tokens.axis == tokens.ndim - 1:
        return NotImplemented
    if name_of(function) in ("layer_norm", "rms_norm") and len(args[1]) >= tokens.ndim - tokens.axis:
        return NotImplemented
    return tokens.map(lambda part: call(function, part, *args[1:], **kwargs))


def _along(function: Any, args: Any, kwargs: Any) -> Any:
    """What reduces or normalises along other axes than the tokens'."""
    tokens, dim = args[0], kwargs.get("dim", args[1] if len(args) > 1 else None)
    if name_of(function) in ("norm", "vector_norm") and "dim" not in kwargs:
        dim = args[2] if len(args) > 2 else None
    if not isinstance(tokens, Tokens) or dim is None:
        return NotImplemented
    dims = [each % tokens.ndim for each in (dim if isinstance(dim, (list, tuple)) else [dim])]
    keep = kwargs.get("keepdim", name_of(function) in ("softmax", "cumsum") or True in args[2:])
    if tokens.axis in dims or (not keep and min(dims) < tokens.axis):
        return NotImplemented
    return tokens.map(lambda part: call(function, part, *args[1:], **kwargs))


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
    given = kwargs.get("shape", kwargs.get("size", args[1] if isinstance(args[1], (list, tuple)) else args[1:]))
    if not all(isinstance(each, int) for each in given):
        return NotImplemented
    return _reshaped(tokens, list(given))


def _unflatten(function: Any, args: Any, kwargs: Any) -> Any:
    tokens = args[0]
    given: list[Any] = [*args[1:], *kwargs.values()]
    dim, sizes = given
    dim %= tokens.ndim
    if dim == tokens.axis:
        return NotImplemented
    return _reshaped(tokens, [*tokens.shape[:dim], *_resolved(sizes, tokens.shape[dim]), *tokens.shape[dim + 1 :]])


def _flatten(function: Any, args: Any, kwargs: Any) -> Any:
    tokens = args[0]
    first = kwargs.get("start_dim", args[1] if len(args) > 1 else 0) % tokens.ndim
    last = kwargs.get("end_dim", args[2] if len(args) > 2 else -1) % tokens.ndim
    merged = math.prod(tokens.shape[first : last + 1])
    return _reshaped(tokens, [*tokens.shape[:first], merged, *tokens.shape[last + 1 :]])


def _reshaped(tokens: Tokens, shape: list[int]) -> Any:
    """The tokens in another shape, in which their axis is still an axis of its own."""
    shape = _resolved(shape, math.prod(tokens.shape))
    before = math.prod(tokens.shape[: tokens.axis])
    axis = next(
        (
            index
            for index, size in enumerate(shape)
            if size == tokens.shape[tokens.axis] and math.prod(shape[:index]) == before
        ),
        None,
    )
    if axis is None:
        return NotImplemented
    parts = [part.reshape([*shape[:axis], part.shape[tokens.axis], *shape[axis + 1 :]]) for part in tokens.parts]
    return Tokens(parts, axis)


def _resolved(shape: Sequence[int], total: int) -> list[int]:
    known = math.prod([each for each in shape if each != -1])
    return [total // known if each == -1 else each for each in shape]


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
    if not isinstance(sizes, (list, tuple)):
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
    given: list[Any] = [*args, *kwargs.values()]
    tokens, dim, start, length = given
    if dim % tokens.ndim != tokens.axis:
        return tokens.map(lambda part: call(function, part, dim, start, length))
    return tokens.cut(start, start + length)


def _cat(function: Any, args: Any, kwargs: Any) -> Any:
    values = args[0]
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % values[0].ndim
    first = next((each for each in values if isinstance(each, Tokens)), None)
    if first is None:  # pairs, and what is the same in both branches: tokens, unless these are samples or channels
        inner = 0 < dim < values[0].ndim - 1 and any(isinstance(each, Tensor) for each in values)
        return concatenated(values, dim) if inner else NotImplemented
    if dim == first.axis:
        return concatenated(values, dim)
    if any(not isinstance(each, Tokens) or each.axis != first.axis or each.sizes != first.sizes for each in values):
        return NotImplemented
    return Tokens([torch.cat([each.parts[i] for each in values], dim=dim) for i in range(len(first.parts))], first.axis)


def _stack(function: Any, args: Any, kwargs: Any) -> Any:
    values = args[0]
    first = values[0]
    if any(not isinstance(each, Tokens) or each.axis != first.axis or each.sizes != first.sizes for each in values):
        return NotImplemented
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % (first.ndim + 1)
    parts = [torch.stack([each.parts[i] for each in values], dim=dim) for i in range(len(first.parts))]
    return Tokens(parts, first.axis + (dim <= first.axis))


def _getitem(function: Any, args: Any, kwargs: Any) -> Any:
    tokens, index = args
    indices = list(index) if isinstance(index, tuple) else [index]
    if not isinstance(tokens, Tokens) or any(
        not (each is ... or each is None or isinstance(each, (int, slice))) for each in indices
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
            found = tokens.cut(start, max(start, stop))
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


def concatenated(values: Sequence[Any], axis: int) -> Tokens:
    """Parts one after another, of which some may be sequences themselves."""
    parts: list[Part] = []
    for value in values:
        parts += value.parts if isinstance(value, Tokens) else [value]
    return Tokens(parts, axis)


RULES |= {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(_OF_CHANNELS, _of_channels),
    **dict.fromkeys(_ALONG, _along),
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
