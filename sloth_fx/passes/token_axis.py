"""Along which axis the image's tokens lie, from their projection to the attention."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from torch import fx

from sloth_fx.passes.walk import ahead, name_of, tensor_of


class Sizes(NamedTuple):
    """How many tokens the image has, and the sequence of keys that it is part of."""

    image: int
    total: int


class TokenAxes:
    """The axes of all that is made of image tokens, alone or in the whole sequence.

    An axis is known by its size. Where other axes have that size too, it is the one that the axis of the input becomes:
    a transposition moves it, and all else leaves as many elements before it as there were.
    """

    def __init__(self, sizes: Sizes, projections: Iterable[fx.Node]) -> None:
        self.sizes = sizes
        self._of: dict[fx.Node, int] = {}
        if sizes.total == 2 * sizes.image:  # as many others: nothing tells them apart
            return
        sources: dict[fx.Node, fx.Node] = {}  # what a tuple of tensors was cut from
        for node in ahead(projections):
            known = [parent for parent in node.all_input_nodes if parent in self._of or parent in sources]
            source = sources.get(known[0], known[0]) if known else None
            if tensor_of(node) is not None:
                axis = self._axis(node, source)
                if axis is not None:
                    self._of[node] = axis
            elif source is not None and isinstance(node.meta.get("hint"), (tuple, list)):
                sources[node] = source

    def of(self, node: fx.Node) -> int | None:
        return self._of.get(node)

    def of_operand(self, other: fx.Node, user: fx.Node) -> int | None:
        """The axis of what ``user`` takes from elsewhere, if it has one value for each token."""
        hint, result = tensor_of(other), tensor_of(user)
        axis = self._of.get(user)
        if hint is None or result is None or axis is None:
            return None
        place = hint.ndim - (result.ndim - axis)
        return place if place >= 0 and hint.shape[place] in self.sizes else None

    def _axis(self, node: fx.Node, source: fx.Node | None) -> int | None:
        hint = tensor_of(node)
        assert hint is not None
        found = [axis for axis, size in enumerate(hint.shape) if size in self.sizes]
        if len(found) < 2:
            return found[0] if found else None
        if source is None:  # a projection
            return 1 if hint.ndim == 3 and 1 in found else None
        axis, before = self._of[source], tensor_of(source)
        assert before is not None
        moved = _moved(node, axis, before.ndim)
        if moved is not None:
            return moved
        same = [place for place in found if math.prod(hint.shape[:place]) == math.prod(before.shape[:axis])]
        return same[0] if same else None


def _moved(node: fx.Node, axis: int, ndim: int) -> int | None:
    """Where a transposition moves an axis; ``None`` for anything else."""
    if name_of(node) not in ("permute", "transpose", "swapaxes", "swapdims"):
        return None
    given = [*node.args[1:], *node.kwargs.values()]
    dims: list[int] = [
        dim % ndim
        for each in given
        for dim in (each if isinstance(each, (tuple, list)) else [each])
        if isinstance(dim, int)
    ]
    if name_of(node) == "permute":
        return dims.index(axis)
    one, other = dims
    return other if axis == one else one if axis == other else axis
