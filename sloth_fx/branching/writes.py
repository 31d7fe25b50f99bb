"""Writing into a sequence of tokens: a host rotates the image's among them in their place."""

from __future__ import annotations

from typing import Any

from sloth_fx.branching.lengths import bounds
from sloth_fx.branching.values import RULES, Tokens, narrowed


def _setitem(function: Any, args: Any, kwargs: Any) -> Any:
    """``tokens[:, first:last] = value`` exchanges whole parts. What else looks at the same data does not see it, which
    a host that writes into what it still needs would have to."""
    tokens, index, value = args
    if not isinstance(tokens, Tokens):
        return NotImplemented
    indices = list(index) if isinstance(index, tuple) else [index]
    if ... in indices:
        place = indices.index(...)
        indices[place : place + 1] = [slice(None)] * (tokens.ndim - len(indices) + 1)
    indices += [slice(None)] * (tokens.ndim - len(indices))
    along = indices.pop(tokens.axis)
    if any(not isinstance(each, slice) or each != slice(None) for each in indices) or not isinstance(along, slice):
        raise TypeError("some rows or channels of a sequence of tokens, which may differ in each branch, are written")
    start, stop = bounds(along, tokens.shape[tokens.axis])
    if along.step not in (None, 1) or value.shape != (
        *tokens.shape[: tokens.axis],
        stop - start,
        *tokens.shape[tokens.axis + 1 :],
    ):
        raise TypeError("what is written into a sequence of tokens, which may differ in each branch, has another shape")
    first: Any = 0
    for number, size in enumerate(tokens.sizes):
        last = first + size
        if start <= first and last <= stop:
            part = narrowed(value, tokens.axis, first - start, size)
            tokens.parts[number] = part.to(tokens.dtype)
        elif first < stop and start < last:
            raise TypeError("a piece of what is the same in each branch, or of what is not, is written")
        first = last
    return None


RULES["setitem"] = _setitem
