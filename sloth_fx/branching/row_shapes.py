"""Rows of a batch in other shapes: reshaped, moved, repeated and cut, as long as one axis has them one after another.

A host names sizes as the one branch has them. Where the rows of both branches lie in one tensor, the size along their
axis is a larger one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from sloth_fx.branching.branched import Method, name_of
from sloth_fx.branching.rows import ROW_RULES, Rows, rows_in


def _wrong(what: str, rows: Rows) -> TypeError:
    return TypeError(f"{what} of rows along axis {rows.axis} of {tuple(rows.shape)}")


def _rows(args: Any, kwargs: Any) -> Rows:
    if not isinstance(args[0], Rows) or next(rows_in((args[1:], kwargs)), None) is not None:
        raise TypeError("rows in another place than the first")
    return args[0]


def _numbers(given: Sequence[Any], rows: Rows) -> list[int]:
    """Sizes, or dimensions, given one by one or all together."""
    found = list(given[0]) if len(given) == 1 and isinstance(given[0], (list, tuple)) else list(given)
    if not found or not all(isinstance(each, int) for each in found):
        raise _wrong(f"sizes {found!r:.40}", rows)
    return found


def _sizes(args: Any, kwargs: Any, rows: Rows) -> list[int]:
    return _numbers(
        (*args[1:], *(kwargs[name] for name in ("shape", "size", "sizes", "repeats") if name in kwargs)), rows
    )


def reshaped(rows: Rows, shape: Sequence[int]) -> Rows:
    """``rows`` in another ``shape``, in which their groups are still one behind the other along one axis."""
    total, before = math.prod(rows.shape), math.prod(rows.shape[: rows.axis])
    known = math.prod([each for each in shape if each != -1])
    shape = [total // max(known, 1) if each == -1 else each for each in shape]
    fits = [
        index
        for index, size in enumerate(shape)
        if math.prod(shape[:index]) == before and size > 0 and size % len(rows.groups) == 0
    ]
    if math.prod(shape) != total or not fits:
        raise _wrong(f"the shape {tuple(shape)}", rows)
    axis = next((index for index in fits if shape[index] == rows.count), fits[0])
    if len(rows.groups) == 1:  # the whole batch is one after another along each that fits; one of one row may be folded
        axis = fits[0]
    if rows.parted:
        shape[axis] = shape[axis] * (len(rows.groups) + sum(rows.groups)) // len(rows.groups)
    return rows.with_tensor(rows.tensor.reshape(shape), axis)


def _reshape(function: Any, args: Any, kwargs: Any) -> Any:
    rows = _rows(args, kwargs)
    return reshaped(rows, _sizes(args, kwargs, rows))


def _flatten(function: Any, args: Any, kwargs: Any) -> Any:
    rows = _rows(args, kwargs)
    first = kwargs.get("start_dim", args[1] if len(args) > 1 else 0) % rows.ndim
    last = kwargs.get("end_dim", args[2] if len(args) > 2 else -1) % rows.ndim
    shape = rows.shape
    return reshaped(rows, [*shape[:first], math.prod(shape[first : last + 1]), *shape[last + 1 :]])


def _unflatten(function: Any, args: Any, kwargs: Any) -> Any:
    rows = _rows(args, kwargs)
    given: list[Any] = [*args[1:], *kwargs.values()]
    dim, sizes = given[0] % rows.ndim, list(given[1])
    known = math.prod([each for each in sizes if each != -1])
    sizes = [rows.shape[dim] // known if each == -1 else each for each in sizes]
    return reshaped(rows, [*rows.shape[:dim], *sizes, *rows.shape[dim + 1 :]])


def _expand(function: Any, args: Any, kwargs: Any) -> Any:
    if name_of(function) == "expand_as":
        args = (args[0], list(args[1].shape))
    rows = _rows(args, kwargs)
    sizes = _sizes(args, kwargs, rows)
    axis = rows.axis + len(sizes) - rows.ndim
    if sizes[axis] not in (-1, rows.count):
        raise _wrong(f"expansion to {tuple(sizes)}", rows)
    sizes[axis] = -1
    return rows.with_tensor(rows.tensor.expand(sizes), axis)


def _repeat(function: Any, args: Any, kwargs: Any) -> Any:
    rows = _rows(args, kwargs)
    times = _sizes(args, kwargs, rows)
    axis = rows.axis + len(times) - rows.ndim
    if times[axis] != 1:
        raise _wrong(f"repetition by {tuple(times)}", rows)
    return rows.with_tensor(rows.tensor.repeat(times), axis)


def _repeat_interleave(function: Any, args: Any, kwargs: Any) -> Any:
    """Each row several times, one after the other."""
    rows = _rows(args, kwargs)
    times = kwargs.get("repeats", args[1] if len(args) > 1 else None)
    dim = kwargs.get("dim", args[2] if len(args) > 2 else None)
    if not isinstance(times, int) or not isinstance(dim, int):
        raise _wrong("repetition", rows)
    return rows.with_tensor(rows.tensor.repeat_interleave(times, dim=dim))


def _transpose(function: Any, args: Any, kwargs: Any) -> Any:
    rows = _rows(args, kwargs)
    one, other = (each % rows.ndim for each in (*args[1:], *kwargs.values()))
    moved = {one: other, other: one}.get(rows.axis, rows.axis)
    return rows.with_tensor(rows.tensor.transpose(one, other), moved)


def _permute(function: Any, args: Any, kwargs: Any) -> Any:
    rows = _rows(args, kwargs)
    order = [each % rows.ndim for each in _numbers((*args[1:], *kwargs.values()), rows)]
    return rows.with_tensor(rows.tensor.permute(order), order.index(rows.axis))


def _movedim(function: Any, args: Any, kwargs: Any) -> Any:
    rows = _rows(args, kwargs)
    source, target = (each % rows.ndim for each in (*args[1:], *kwargs.values()))
    order = [each for each in range(rows.ndim) if each != source]
    order.insert(target, source)
    return rows.with_tensor(rows.tensor.permute(order), order.index(rows.axis))


def _unsqueeze(function: Any, args: Any, kwargs: Any) -> Any:
    rows = _rows(args, kwargs)
    dim = kwargs.get("dim", args[-1]) % (rows.ndim + 1)
    return rows.with_tensor(rows.tensor.unsqueeze(dim), rows.axis + (dim <= rows.axis))


def _squeeze(function: Any, args: Any, kwargs: Any) -> Any:
    rows = _rows(args, kwargs)
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if not isinstance(dim, int) or dim % rows.ndim == rows.axis:
        raise _wrong("squeezing", rows)
    found = rows.tensor.squeeze(dim)
    return rows.with_tensor(found, rows.axis - (found.ndim < rows.ndim and dim % rows.ndim < rows.axis))


def _getitem(function: Any, args: Any, kwargs: Any) -> Any:
    rows, index = args
    if not isinstance(rows, Rows):
        raise TypeError("rows as an index")
    indices, axis = _whole(rows, index)
    return rows.with_tensor(rows.tensor[tuple(indices)], axis)


def _whole(rows: Rows, index: Any) -> tuple[list[Any], int]:
    """An index that takes all rows, in full, and the axis on which they are then."""
    indices: list[Any] = list(index) if isinstance(index, tuple) else [index]
    used = sum(each is not None and each is not ... for each in indices)
    place = next((number for number, each in enumerate(indices) if each is ...), len(indices))
    indices[place : place + 1] = [slice(None)] * (rows.ndim - used)
    source = axis = 0
    found, by_number, moved = -1, 0, False
    for number, each in enumerate(indices):
        if each is None:
            axis += 1
            continue
        if source == rows.axis:
            if not isinstance(each, slice) or each.indices(rows.count) != (0, rows.count, 1):
                raise _wrong(f"part {each!r:.40}", rows)
            indices[number], found = slice(None), axis
        if isinstance(each, Tensor):
            by_number += 1
            moved |= each.ndim != 1 or each.dtype.is_floating_point or each.dtype.itemsize == 1
        elif not isinstance(each, (slice, int)) or isinstance(each, bool):
            raise _wrong(f"part {each!r:.40}", rows)
        axis += not isinstance(each, int)
        source += 1
    if moved or by_number > 1 or (by_number and any(isinstance(each, int) for each in indices)):
        raise _wrong("parts by several numbers", rows)
    return indices, found


def _setitem(function: Any, args: Any, kwargs: Any) -> Any:
    rows, index, value = args
    if not isinstance(rows, Rows):
        raise TypeError("rows are written into what has none")
    indices, axis = _whole(rows, index)
    if any(isinstance(each, Tensor) for each in indices):
        raise _wrong("writing by numbers", rows)
    rows.parted_for(value)
    part = rows.with_tensor(rows.tensor[tuple(indices)], axis)
    if isinstance(value, (Rows, Tensor)):
        Rows.applied(Method("copy_"), (part, value), {})
    else:
        part.tensor.fill_(value)


def _rule(rule: Callable[..., Any], *names: str) -> None:
    ROW_RULES.update(dict.fromkeys(names, rule))


_rule(_reshape, "reshape", "view")
_rule(_flatten, "flatten")
_rule(_unflatten, "unflatten")
_rule(_expand, "expand", "expand_as")
_rule(_repeat, "repeat")
_rule(_repeat_interleave, "repeat_interleave")
_rule(_transpose, "transpose", "swapaxes", "swapdims")
_rule(_permute, "permute")
_rule(_movedim, "movedim", "moveaxis")
_rule(_unsqueeze, "unsqueeze")
_rule(_squeeze, "squeeze")
_rule(_getitem, "getitem")
_rule(_setitem, "setitem")
