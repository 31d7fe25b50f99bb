"""Which functions of torch work on each row of a batch alone, and where the rows lie in what they return.

Rows lie along an axis, and a function works on each row alone if it does nothing along that axis. A tensor that meets
rows belongs to them as broadcasting says: where it has as many elements along their axis as there are rows it has one
for each; where it has one, or no such axis, it is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sloth_fx.branching.branched import name_of
from sloth_fx.branching.rows import ROW_RULES, Rows, picked_groups, rows_in

_ELEMENTWISE = (
    *("add", "sub", "rsub", "mul", "div", "true_divide", "floor_divide", "remainder", "fmod", "pow", "addcmul"),
    *("radd", "rmul", "rtruediv", "rfloordiv", "rmod", "rpow", "rand", "ror", "rxor"),
    *("addcdiv", "lerp", "neg", "abs", "square", "sqrt", "rsqrt", "reciprocal", "exp", "log", "sin", "cos", "sigmoid"),
    *("tanh", "relu", "relu6", "leaky_relu", "elu", "gelu", "silu", "mish", "softplus", "hardswish", "hardtanh", "erf"),
    *("clamp", "clip", "nan_to_num", "dropout", "contiguous", "clone", "detach", "float", "half", "bfloat16", "double"),
    *("int", "long", "bool", "round", "floor", "ceil", "sign", "eq", "ne", "lt", "le", "gt", "ge", "where"),
    *("masked_fill", "maximum", "minimum", "logical_and", "logical_or", "logical_not", "bitwise_and", "bitwise_or"),
    *("bitwise_not", "bitwise_xor", "isnan", "isinf", "isfinite", "zeros_like", "ones_like", "empty_like", "full_like"),
    *(
        "copy",
        "fill",
        "zero",
        "alpha_dropout",
        "feature_dropout",
        "logsigmoid",
        "expm1",
        "log1p",
        "clamp_min",
        "clamp_max",
    ),
)
# By name, which argument tells the dimensions, and what they are where it is missing.
_ALONG = {
    **dict.fromkeys(("mean", "sum", "var", "std", "var_mean", "softmax", "log_softmax", "cumsum"), (1, None)),
    **dict.fromkeys(("amax", "amin", "logsumexp", "prod", "argmax", "argmin", "max", "min", "all", "any"), (1, None)),
    **dict.fromkeys(("flip", "narrow", "select", "index_select"), (1, None)),
    **dict.fromkeys(("norm", "vector_norm", "linalg_vector_norm", "roll"), (2, None)),
    **dict.fromkeys(("sort", "argsort", "glu"), (1, -1)),
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), (2, 0)),
    "unbind": (1, 0),
    "normalize": (2, 1),
    "topk": (2, -1),
}
_OF_MAPS = {  # how many dimensions a batch of maps has
    **{f"{kind}{size}d": size + 2 for kind in ("conv", "conv_transpose", "avg_pool", "max_pool") for size in (1, 2, 3)},
    **{f"adaptive_{kind}_pool{size}d": size + 2 for kind in ("avg", "max") for size in (1, 2, 3)},
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle"), 4),
    **dict.fromkeys(("group_norm", "instance_norm", "batch_norm", "interpolate", "upsample"), None),
}
_ABOUT = (  # what is told of rows, or made like them: as of those of the one branch
    *("numel", "stride", "is_contiguous", "element_size", "is_floating_point", "is_complex", "get_device"),
    *("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor"),
)


def _wrong(what: str, rows: Rows) -> TypeError:
    return TypeError(f"{what} of rows along axis {rows.axis} of {tuple(rows.shape)}")


def _one(function: Any, args: Any, kwargs: Any) -> Rows:
    """The first argument, for functions of one."""
    if not isinstance(args[0], Rows) or next(rows_in((args[1:], kwargs)), None) is not None:
        raise TypeError(f"{name_of(function)} takes rows in another place than the first")
    return args[0]


def _meet(function: Any, args: Any, kwargs: Any, *, inner: int = 0, exact: bool = False) -> tuple[Any, Rows, bool]:
    """``function`` of all tensors as broadcasting brings them together, of which the last ``inner`` axes are no rows.

    Returns the result, the first of the rows, and whether the branches are parted in it. ``exact``: sizes along the
    axis are not broadcast.
    """
    given = list(rows_in((args, kwargs)))
    first, parted = given[0], any(each.parted for each in given)
    back = first.axis - first.ndim
    if any(each.axis - each.ndim != back or each.count != first.count for each in given) or -back <= inner:
        raise _wrong(name_of(function), first)

    def bring(value: Any) -> Any:
        if isinstance(value, Rows):
            return value.stacked() if parted else value.tensor
        if isinstance(value, (list, tuple)):
            return type(value)([bring(each) for each in value])
        if not isinstance(value, Tensor) or value.ndim < -back:
            return value
        size, axis = value.shape[back], value.ndim + back
        if size not in (1, first.count):
            raise _wrong(f"{name_of(function)} with {tuple(value.shape)}", first)
        widens = parted and size == first.count and (size > 1 or exact)
        return torch.cat([value, picked_groups(value, first.groups, axis)], axis) if widens else value

    found = function(*map(bring, args), **{name: bring(each) for name, each in kwargs.items()})
    return found, first, parted


def _elementwise(function: Any, args: Any, kwargs: Any) -> Any:
    found, first, parted = _meet(function, args, kwargs)
    axis = found.ndim + first.axis - first.ndim
    return first.with_tensor(found, axis) if parted == first.parted else Rows(found, first.groups, axis, parted)


def _batched(function: Any, args: Any, kwargs: Any) -> Any:
    """Products of matrices, which are the last two axes, and attention."""
    found, first, parted = _meet(function, args, kwargs, inner=2, exact=True)
    return Rows(found, first.groups, found.ndim + first.axis - first.ndim, parted)


def _matmul(function: Any, args: Any, kwargs: Any) -> Any:
    left, right = args
    if isinstance(left, Rows) and isinstance(right, Tensor) and right.ndim == 2 and left.axis < left.ndim - 1:
        return left.with_tensor(function(left.tensor, right))
    return _batched(function, args, kwargs)


def _einsum(function: Any, args: Any, kwargs: Any) -> Any:
    equation, operands = args[0], args[1] if isinstance(args[1], (list, tuple)) else args[1:]
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    letters = inputs.split(",")
    first = next(rows_in(operands))
    letter = letters[next(index for index, each in enumerate(operands) if each is first)][first.axis]
    if not arrow or "." in equation or letter not in output:
        raise _wrong(f"einsum {equation!r}", first)
    parted = any(each.parted for each in rows_in(operands))

    def bring(value: Any, names: str) -> Any:
        if letter not in names:
            if isinstance(value, Rows):
                raise _wrong(f"einsum {equation!r}", value)
            return value
        rows = value if isinstance(value, Rows) else Rows(value, first.groups, names.index(letter))
        if rows.axis != names.index(letter) or names.count(letter) > 1 or rows.count != first.count:
            raise _wrong(f"einsum {equation!r}", rows)
        return rows.stacked() if parted else rows.tensor

    found = function(equation, *map(bring, operands, letters), **kwargs)
    return Rows(found, first.groups, output.index(letter), parted)


def _along(function: Any, args: Any, kwargs: Any) -> Any:
    """What works along other dimensions than the rows'."""
    name = name_of(function)
    if name in ("max", "min") and len(args) > 1 and not isinstance(args[1], int):
        return _elementwise(function, args, kwargs)
    rows = _one(function, args, kwargs)
    place, default = _ALONG[name]
    dims = next((kwargs[each] for each in ("dim", "dims", "axis") if each in kwargs), default)
    if len(args) > place:
        dims = args[place:] if name == "flip" and isinstance(args[place], int) else args[place]
    named = [each % rows.ndim for each in ((dims,) if isinstance(dims, int) else dims or ())]
    if not named or rows.axis in named:
        raise _wrong(name, rows)
    found = function(rows.tensor, *args[1:], **kwargs)
    gone = sum(each < rows.axis for each in named)

    def as_rows(each: Tensor) -> Rows:
        return rows.with_tensor(each, rows.axis if each.ndim == rows.ndim else rows.axis - gone)

    return as_rows(found) if isinstance(found, Tensor) else type(found)([as_rows(each) for each in found])


def _gather(function: Any, args: Any, kwargs: Any) -> Any:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if not isinstance(args[0], Rows) or not isinstance(dim, int) or dim % args[0].ndim == args[0].axis:
        raise TypeError("gather along rows")
    found, first, parted = _meet(function, args, kwargs, exact=True)
    return Rows(found, first.groups, first.axis, parted)


def _of_channels(function: Any, args: Any, kwargs: Any) -> Any:
    """What works on the last axes."""
    rows = _one(function, args, kwargs)
    inner = 1
    if name_of(function) in ("layer_norm", "rms_norm"):
        inner = len(kwargs.get("normalized_shape", args[1] if len(args) > 1 else ()))
    elif name_of(function) == "pad":
        inner = len(kwargs.get("pad", args[1] if len(args) > 1 else ())) // 2
    elif name_of(function) in ("embedding", "view_as_real"):
        inner = 0
    if rows.axis >= rows.ndim - inner:
        raise _wrong(name_of(function), rows)
    return rows.with_tensor(function(rows.tensor, *args[1:], **kwargs))


def _of_maps(function: Any, args: Any, kwargs: Any) -> Any:
    rows, name = _one(function, args, kwargs), name_of(function)
    learning = name == "batch_norm" and (kwargs.get("training") or True in args[3:])
    if rows.axis != 0 or _OF_MAPS[name] not in (None, rows.ndim) or rows.ndim < 3 or learning:
        raise _wrong(name, rows)
    return rows.with_tensor(function(rows.tensor, *args[1:], **kwargs))


def _cat(function: Any, args: Any, kwargs: Any) -> Any:
    values = kwargs.get("tensors", args[0] if args else ())
    rows = next(rows_in(values))
    dim = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0))
    stacks = name_of(function) == "stack"
    dim %= rows.ndim + stacks
    if dim == rows.axis and not stacks:
        raise _wrong("cat", rows)
    found, first, parted = _meet(lambda each: function(each, dim=dim), (list(values),), {}, exact=True)
    return Rows(found, first.groups, first.axis + (stacks and dim <= first.axis), parted)


def _cast(function: Any, args: Any, kwargs: Any) -> Any:
    """To a dtype or a device, maybe those of another."""
    plain = [each.tensor if isinstance(each, Rows) else each for each in args]
    kwargs = {name: each.tensor if isinstance(each, Rows) else each for name, each in kwargs.items()}
    found = function(*plain, **kwargs)
    return args[0].with_tensor(found) if isinstance(args[0], Rows) and isinstance(found, Tensor) else found


def _about(function: Any, args: Any, kwargs: Any) -> Any:
    return function(_one(function, args, kwargs).positive, *args[1:], **kwargs)


def _attribute(function: Any, args: Any, kwargs: Any) -> Any:
    rows, name = args
    found = getattr(rows.tensor, name)
    if not isinstance(found, Tensor):
        return found
    if name in ("data", "real", "imag") or (name in ("mT", "mH") and rows.axis < rows.ndim - 2):
        return rows.with_tensor(found)
    raise _wrong(name, rows)


def _rule(rule: Callable[..., Any], *names: str) -> None:
    ROW_RULES.update(dict.fromkeys(names, rule))


_rule(_elementwise, *_ELEMENTWISE)
_rule(_batched, "scaled_dot_product_attention", "bmm", "baddbmm")
_rule(_matmul, "matmul")
_rule(_einsum, "einsum")
_rule(_along, *_ALONG)
_rule(_gather, "gather", "take_along_dim")
_rule(_of_channels, "linear", "layer_norm", "rms_norm", "pad", "embedding", "view_as_complex", "view_as_real")
_rule(_of_maps, *_OF_MAPS)
_rule(_cat, "cat", "concat", "concatenate", "stack")
_rule(_cast, "to", "type", "type_as", "cpu", "cuda")
_rule(_about, *_ABOUT)
_rule(_attribute, "getattr")
