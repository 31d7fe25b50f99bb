"""Rows of a batch that pass a model in one branch or in both, and are computed once as long as both agree.

The one branch has all rows of the batch, the other has some of its groups (those that are conditioned, say). As long as
nothing tells the branches apart, the rows of the other are among those of the one. Afterwards those of both lie one
behind the other in one tensor, so that a function which works on each row alone is still called once.

What is not known to work on each row alone raises TypeError (:mod:`sloth_fx.branching.row_rules`): it is never guessed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from sloth_fx.branching.branched import Branched, name_of
from sloth_fx.branching.in_place import UnwritableError, writes

Groups = tuple[bool, ...]
"""For each group of a batch, one after another, whether it is in the other branch as well."""

Asks = Literal["plain", "perturbed", "both"]
"""What a call of the model is for: tensors are those of that prediction, and what serves both comes as `Rows`."""


class Rows(Branched):
    """``tensor`` holds rows along ``axis``, in as many equal groups, one behind the other, as ``groups`` has entries.

    With ``parted`` the rows of the other branch follow. ``positive`` are the rows of the one branch, ``negative`` those
    of the other; a host is told the shape of the former.
    """

    def __init__(self, tensor: Tensor, groups: Groups, axis: int = 0, parted: bool = False) -> None:
        self.tensor = tensor
        self.groups = groups
        self.axis = axis
        self.parted = parted
        self.has_views = False  # others look, or looked, at the same data

    @classmethod
    def applied(cls, function: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
        """``function`` of arguments of which some are rows. Raises TypeError where no rule says how."""
        kwargs = dict(kwargs)
        if not args and "input" in kwargs:
            args = (kwargs.pop("input"),)
        into = args[0] if writes(function, kwargs) else None
        if into is not None and not isinstance(into, Rows):
            raise UnwritableError(f"{name_of(function)} writes rows of both branches into a plain tensor")
        rule = ROW_RULES.get(name_of(function))
        if rule is None or kwargs.get("out") is not None:
            raise TypeError(f"{name_of(function) or function!r} is not known to work on each row of a batch alone")
        if into is not None:
            into.parted_for(args[1:])
            rule(function, args, kwargs)
            return into
        found = rule(function, args, kwargs)
        note_views((args, kwargs), found)
        return found

    def parted_for(self, written: Any) -> None:
        """Part these rows if what is to be ``written`` into them differs between the branches.

        Raises UnwritableError where others look at the same data, such as parts of it: they would not see it.
        """
        if self.parted or not any(each.parted for each in rows_in(written)):
            return
        if self.has_views:
            raise UnwritableError(
                "what differs between the branches is written into what was looked at in parts, or in another shape"
            )
        self.tensor, self.parted = self.stacked(), True

    @property
    def count(self) -> int:
        """Rows of the one branch."""
        total: int = self.tensor.shape[self.axis]
        return total * len(self.groups) // (len(self.groups) + sum(self.groups)) if self.parted else total

    @property
    def shape(self) -> torch.Size:
        shape = self.tensor.shape
        return torch.Size((*shape[: self.axis], self.count, *shape[self.axis + 1 :])) if self.parted else shape

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    @property
    def positive(self) -> Tensor:  # type: ignore[override]
        return self.tensor.narrow(self.axis, 0, self.count) if self.parted else self.tensor

    @property
    def negative(self) -> Tensor:  # type: ignore[override]
        if not self.parted:
            return picked_groups(self.tensor, self.groups, self.axis)
        return self.tensor.narrow(self.axis, self.count, self.tensor.shape[self.axis] - self.count)

    def stacked(self) -> Tensor:
        """The rows of both branches."""
        return self.tensor if self.parted else torch.cat([self.tensor, self.negative], self.axis)

    def with_tensor(self, tensor: Tensor, axis: int | None = None) -> Rows:
        """What was computed of these rows: they themselves, if it is that."""
        if tensor is self.tensor and axis in (None, self.axis):
            return self
        return Rows(tensor, self.groups, self.axis if axis is None else axis, self.parted)


RowRule = Callable[[Any, Any, dict[str, Any]], Any]

ROW_RULES: dict[str, RowRule] = {}
"""By name of a function, what works on each row alone: rule(function, args, kwargs), which raises TypeError where it
does not hold."""


def note_views(given: Any, found: Any) -> None:
    """Remember where rows that were ``found`` look at the data of those ``given``.

    Not while a graph is made, where storages cannot be asked: what cannot be done was found out without one.
    """
    if torch.compiler.is_compiling():
        return
    for new in rows_in(found):
        for old in rows_in(given):
            if new is not old and _storage(new) == _storage(old):
                new.has_views = old.has_views = True


def _storage(rows: Rows) -> int:
    found: int = rows.tensor.untyped_storage()._cdata
    return found


def picked_groups(tensor: Tensor, groups: Groups, axis: int = 0) -> Tensor:
    """The groups of a tensor that are in the other branch; a view, where they lie together."""
    size = tensor.shape[axis] // len(groups)
    taken = [index for index, there in enumerate(groups) if there]
    if not taken or taken[-1] - taken[0] == len(taken) - 1:
        return tensor.narrow(axis, taken[0] * size if taken else 0, len(taken) * size)
    return torch.cat([tensor.narrow(axis, index * size, size) for index in taken], axis)


def parted(positive: Tensor, negative: Tensor, groups: Groups, axis: int = 0) -> Rows:
    """The rows of both branches, which differ from here on. Raises TypeError unless there is one for each."""
    size = positive.shape[axis] // len(groups)
    expected = (*positive.shape[:axis], size * sum(groups), *positive.shape[axis + 1 :])
    if positive.shape[axis] % len(groups) or tuple(negative.shape) != expected:
        raise TypeError(f"{tuple(positive.shape)} in the one branch and {tuple(negative.shape)} in the other")
    return Rows(torch.cat([positive, negative], axis), groups, axis, parted=True)


def by_rows(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``function``, known to work on each row alone, of arguments whose first axis are rows, or that have none.

    A tensor among them with as many dimensions has one for each row, or is the same for all, and so have results.
    """
    given = list(rows_in((args, kwargs)))
    if not given:
        return function(*args, **kwargs)
    first, wide = given[0], any(each.parted for each in given)
    if any(each.axis != 0 or each.count != first.count for each in given):
        raise TypeError("rows that do not lie along the first axis")

    def bring(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: bring(each) for name, each in value.items()}
        if isinstance(value, Tensor) and value.ndim >= first.ndim and value.shape[0] == first.count:
            value = Rows(value, first.groups)
        return (value.stacked() if wide else value.tensor) if isinstance(value, Rows) else value

    def as_rows(found: Any) -> Any:
        if isinstance(found, (list, tuple)):
            return type(found)(map(as_rows, found))
        has = isinstance(found, Tensor) and found.ndim > 0 and found.shape[0] == total
        return Rows(found, first.groups, parted=wide) if has else found

    total = first.stacked().shape[0] if wide else first.count
    results = as_rows(function(*map(bring, args), **bring(kwargs)))
    note_views(given, results)
    return results


def each_row(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a module of ours that works on each row alone: it takes :class:`Rows` as it takes tensors."""

    @functools.wraps(forward)
    def of_rows(self: Any, *args: Any, **kwargs: Any) -> Any:
        return by_rows(functools.partial(forward, self), *args, **kwargs)

    return of_rows


def apart(function: Callable[..., Any], other: Callable[..., Any], *args: Any) -> Any:
    """``function`` of what the one branch has and ``other`` of what the other has, after which they are parted.

    The first axis of results and of arguments are rows; a tensor that is no :class:`Rows` has one for each row of the
    one branch, or is the same for all.
    """
    first = next(rows_in(args))
    if any(each.axis != 0 or each.count != first.count for each in rows_in(args)):
        raise TypeError("rows that do not lie along the first axis")

    def of(value: Any, branch: int) -> Any:
        if isinstance(value, Rows):
            return value.negative if branch else value.positive
        if isinstance(value, dict):
            return {name: of(each, branch) for name, each in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)([of(each, branch) for each in value])
        own = isinstance(value, Tensor) and value.ndim >= first.ndim and value.shape[0] == first.count
        return picked_groups(value, first.groups) if own and branch else value

    results = function(*(of(each, 0) for each in args)), other(*(of(each, 1) for each in args))
    if isinstance(results[0], Tensor):
        return parted(*results, first.groups)
    return tuple(None if each[0] is None else parted(*each, first.groups) for each in zip(*results, strict=True))


def rows_in(value: Any) -> Iterator[Rows]:
    """The rows in arguments, also those in lists of them."""
    if isinstance(value, Rows):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from rows_in(each)
    elif isinstance(value, dict):
        for each in value.values():
            yield from rows_in(each)
    elif isinstance(value, Branched):
        raise TypeError("a value that differs between two texts meets rows of which some are perturbed")
