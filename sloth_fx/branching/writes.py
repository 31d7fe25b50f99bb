"""Writing into a sequence of tokens by an index: a host rotates the image's among them in their place."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sloth_fx.branching.branched import Branched, Method
from sloth_fx.branching.lengths import Length, bounds, number, overlap
from sloth_fx.branching.values import WRITES, call, narrowed


def _setitem(function: Any, args: Any, kwargs: Any) -> Any:
    """``tokens[:, first:last, ...] = value`` writes into the parts, so that what else looks at them sees it."""
    tokens, index, value = args
    indices = list(index) if isinstance(index, tuple) else [index]
    if not all(each is ... or type(each) is slice for each in indices):
        return NotImplemented
    if ... in indices:
        place = indices.index(...)
        indices[place : place + 1] = [slice(None)] * (tokens.ndim - len(indices) + 1)
    indices += [slice(None)] * (tokens.ndim - len(indices))
    along, indices[tokens.axis] = indices[tokens.axis], slice(None)
    if along.step not in (None, 1):
        return NotImplemented
    start, stop = bounds(along, tokens.shape[tokens.axis])
    back = tokens.axis - tokens.ndim
    each_has_own = isinstance(value, (Tensor, Branched)) and value.ndim >= -back and value.shape[back] != 1
    done: Any = 0  # of what is written
    for part, size in zip(tokens.parts, tokens.sizes, strict=True):
        first, length = overlap(start, stop, size)
        if any(number(length, branch) > 0 for branch in range(2)):
            if isinstance(part, Tensor) and any(isinstance(each, Length) for each in (first, length)):
                return NotImplemented  # another piece in each branch of what is one for both
            into = narrowed(part, tokens.axis, first, length)[tuple(indices)]
            piece = narrowed(value, value.ndim + back, done, length) if each_has_own else value
            call(Method("copy_" if isinstance(piece, (Tensor, Branched)) else "fill_"), into, piece)
        start, stop, done = start - size, stop - size, done + length
    return None


WRITES["setitem"] = _setitem
