"""What works on each token alone, and so on the parts of a sequence of tokens: on each element, or along channels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sloth_fx.branching.branched import SWAPPED, Branched, name_of
from sloth_fx.branching.images import NoImageError, is_no_image
from sloth_fx.branching.lengths import Length, number
from sloth_fx.branching.mode import one_if_equal
from sloth_fx.branching.values import RULES, WRITES, Pair, Tokens, call, narrowed

_MODULATIONS = frozenset({"add", "sub", "mul", "div", "true_divide", "addcmul", *SWAPPED})
_ELEMENTWISE = frozenset(
    (
        *("add", "sub", "rsub", "mul", "div", "true_divide", "pow", "addcmul", "lerp", "neg", "abs", "square", "sqrt"),
        *("rsqrt", "reciprocal", "exp", "log", "sin", "cos", "sigmoid", "tanh", "erf", "clamp", "clip", "nan_to_num"),
        *("relu", "relu6", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "softplus", "hardswish"),
        *("hardtanh", "hardsigmoid", "logsigmoid", "dropout", "masked_fill", "where", "fill", "zero", "copy"),
        *("contiguous", "clone", "detach", "to", "type", "type_as", "float", "half", "bfloat16", "double", *SWAPPED),
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
        if isinstance(value, (Tensor, Pair)) and value.ndim >= -back and _as_many(value.shape[back], total):
            part = narrowed(value, value.ndim + back, sum(first.sizes[:index]), first.sizes[index])
            in_both = isinstance(total, Length) and isinstance(first.parts[index], Tensor)  # positions of the image
            return one_if_equal(part) if in_both else part
        return value

    results = [
        call(function, *(of_part(each, i) for each in args), **{key: of_part(each, i) for key, each in kwargs.items()})
        for i in range(len(first.parts))
    ]
    return Tokens(results, results[0].ndim + back)


def _as_many(size: int, total: int) -> bool:
    """Whether something has a place for each token. Raises TypeError where that is so in one of the branches."""
    same = [number(size, branch) == number(total, branch) for branch in range(2)]
    if any(same) and not all(same):
        raise TypeError(f"what has a place for each of {size!r} tokens meets {total!r} tokens")
    return all(same)


def _modulated(function: Any, args: Any, kwargs: Any) -> Any:
    """A vector of each text that modulates tokens (B, N, C) which are the same in both branches does so with that of
    the text itself: there is one image."""
    own = [each for each in args if isinstance(each, Tensor) and each.ndim == 3 and each.is_floating_point()]
    pairs = [each for each in args if isinstance(each, Pair)]
    if (
        name_of(function) not in _MODULATIONS
        or not own
        or any(isinstance(each, Branched) for each in kwargs.values())
        or not all(_is_vector_of(each, own[0]) for each in pairs)
    ):
        return NotImplemented
    if is_no_image(own[0]):
        raise NoImageError("learned tokens are modulated by the text, as an image is")
    return function(*(each.positive if isinstance(each, Pair) else each for each in args), **kwargs)


def _is_vector_of(pair: Pair, tokens: Tensor) -> bool:
    """Whether ``pair`` is one vector for all ``tokens``, and not a row of a mask (B, N, N)."""
    count, channels = tokens.shape[1:]
    shape = (1, *pair.shape)[-2:]
    return pair.ndim <= tokens.ndim and count > 1 and count != channels and shape == (1, channels)


def _of_channels(function: Any, args: Any, kwargs: Any) -> Any:
    tokens = args[0]
    if not isinstance(tokens, Tokens) or tokens.axis == tokens.ndim - 1:
        return NotImplemented
    shape = kwargs.get("normalized_shape", args[1] if len(args) > 1 else ())
    if name_of(function) in ("layer_norm", "rms_norm") and len(shape) >= tokens.ndim - tokens.axis:
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
    if tokens.axis in dims:
        return NotImplemented
    parts = [call(function, part, *args[1:], **kwargs) for part in tokens.parts]
    gone = sum(each < tokens.axis for each in dims) if parts[0].ndim < tokens.ndim else 0
    return Tokens(parts, tokens.axis - gone)


RULES |= {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(_OF_CHANNELS, _of_channels),
    **dict.fromkeys(_ALONG, _along),
}
WRITES |= dict.fromkeys(_ELEMENTWISE, _elementwise)
