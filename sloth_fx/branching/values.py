"""Values that differ between two branches of a call, in the place of tensors.

A model is called with a :class:`Pair` where the branches differ, and with tensors where they don't. What works on a
pair works on both of its tensors, so whatever the model does, the result is what two calls would give; all else it
computes once. The host's own Python does this, by ``__torch_function__``: nothing has to be captured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sloth_fx.branching.branched import Branched, name_of
from sloth_fx.branching.in_place import UnwritableError, writes
from sloth_fx.branching.lengths import Length, both, comparable, number, overlap
from sloth_fx.nested import leaves


class OfTexts(Branched):
    """Differs because the text does: whatever works on it works on both branches."""

    @classmethod
    def applied(cls, function: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
        """``function`` of arguments of which some are values of this kind."""
        return apply(function, args, kwargs)


class Pair(OfTexts):
    """Two tensors: what a value is in the one branch, and in the other. They may differ in size.

    ``copied`` tells that they look at a copy of a sequence of tokens, which would not see what is written into them.
    """

    def __init__(self, positive: Tensor, negative: Tensor, copied: bool = False) -> None:
        self.positive = positive
        self.negative = negative
        self.copied = copied

    @property
    def shape(self) -> torch.Size:
        shape, other = self.positive.shape, self.negative.shape
        return shape if shape == other else torch.Size([both(*each) for each in zip(shape, other, strict=True)])

    @property
    def dtype(self) -> torch.dtype:
        return self.positive.dtype

    @property
    def device(self) -> torch.device:
        return self.positive.device


class Tokens(OfTexts):
    """``parts`` follow each other along ``axis``: tensors that are the same in both branches, and pairs.

    What looks at the same data has the same parts, or views of them: so what is written into one is seen by all.
    """

    def __init__(self, parts: Sequence[Part], axis: int) -> None:
        self.parts = list(parts)
        self.axis = axis

    @property
    def sizes(self) -> list[int]:
        return [part.shape[self.axis] for part in self.parts]

    @property
    def shape(self) -> torch.Size:
        shape = list(self.parts[0].shape)
        shape[self.axis] = sum(self.sizes)
        return torch.Size(shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    @property
    def positive(self) -> Tensor:  # type: ignore[override]
        return torch.cat([each.positive if isinstance(each, Pair) else each for each in self.parts], dim=self.axis)

    @property
    def negative(self) -> Tensor:  # type: ignore[override]
        return torch.cat([each.negative if isinstance(each, Pair) else each for each in self.parts], dim=self.axis)

    def map(self, function: Callable[..., Any], axis: int | None = None) -> Any:
        """``function`` of each part, after which the tokens lie along ``axis``."""
        return joined([function(part) for part in self.parts], self.axis if axis is None else axis)

    def cut(self, start: int, stop: int) -> Part | Tokens:
        """The tokens from ``start`` to ``stop``."""
        found: list[Part] = []
        for part, size in zip(self.parts, self.sizes, strict=True):
            first, length = overlap(start, stop, size)
            if any(number(length, branch) > 0 for branch in range(2)):
                whole = comparable([length]) == comparable([size])
                found.append(part if whole else narrowed(part, self.axis, first, length))
            start, stop = start - size, stop - size
        if not found:
            found = [narrowed(self.parts[0], self.axis, 0, 0)]
        return found[0] if len(found) == 1 else Tokens(found, self.axis)


Part = Tensor | Pair

Rule = Callable[[Any, Any, dict[str, Any]], Any]

RULES: dict[str, Rule] = {}
"""By name of a function, what works on parts of tokens alike: rule(function, args, kwargs), or NotImplemented."""

WRITES: dict[str, Rule] = {}
"""By name of a function, what writes into the parts of tokens, where they lie."""


_NUMPY = {"axis": "dim", "keepdims": "keepdim"}  # torch takes the names of NumPy as well


def apply(function: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
    """``function`` of arguments of which some are branched: part by part where a rule says how, else branch by branch,
    which is always right."""
    for name in ("input", "tensors"):
        if not args and name in kwargs:
            args, kwargs = (kwargs[name],), {key: value for key, value in kwargs.items() if key != name}
    if writes(function, kwargs) or name_of(function) == "setitem":
        return _written(function, args, kwargs)
    if kwargs.get("out") is not None:
        raise UnwritableError(f"{name_of(function)} writes into what is the same in both branches")
    rule = RULES.get(name_of(function))
    named = {_NUMPY.get(name, name): value for name, value in kwargs.items()}
    found = rule(function, args, named) if rule is not None else NotImplemented
    if found is not NotImplemented:
        return found
    args, kwargs = _together(args), _together(kwargs)
    found = paired(*(function(*of(args, branch), **of(kwargs, branch)) for branch in range(2)))
    _note_copies((*args, *kwargs.values()), found)
    return found


def _written(function: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
    """``function``, which writes into its first argument. Raises UnwritableError where what is written would be lost,
    or be seen by both branches."""
    target, name = args[0], name_of(function)
    if isinstance(target, Tokens):
        rule = WRITES.get(name)
        if rule is None or rule(function, args, dict(kwargs)) is NotImplemented:
            raise UnwritableError(f"{name} writes into a sequence of tokens, and not into each token alone")
        return target
    if not isinstance(target, Pair):
        raise UnwritableError(f"{name} writes into what is the same in both branches")
    if target.copied:
        raise UnwritableError(f"{name} writes into a part of a sequence of tokens, which may differ in each branch")
    if not torch.compiler.is_compiling() and _same_data(target.positive, target.negative):
        raise UnwritableError(f"{name} writes for both branches into the same data")
    args, kwargs = _together(args), _together(kwargs)
    for branch in range(2):
        function(*of(args, branch), **of(kwargs, branch))
    return target


def _together(value: Any) -> Any:
    """A copy of each sequence of tokens, as one tensor in each branch."""
    return changed(value, lambda each: Pair(each.positive, each.negative, True) if isinstance(each, Tokens) else each)


def _note_copies(given: Iterable[Any], found: Any) -> None:
    """Remember of what was ``found`` that it looks at a copy.

    Not while a graph is made, where storages cannot be asked: what cannot be done was found out without one.
    """
    copies = [each for each in leaves(tuple(given)) if isinstance(each, Pair) and each.copied]
    if not copies or torch.compiler.is_compiling():
        return
    for new in leaves(found):
        if isinstance(new, Pair):
            new.copied = any(_same_data(new.positive, old.positive) for old in copies)


def _same_data(one: Tensor, other: Tensor) -> bool:
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)


def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``function`` of arguments of which some may be branched; methods of tensors take no others by themselves."""
    branched = any(isinstance(each, (Branched, Length)) for each in (*args, *kwargs.values()))
    return apply(function, args, kwargs) if branched else function(*args, **kwargs)


def joined(results: list[Any], axis: int) -> Any:
    """What was computed of each part, as one: tuples and lists come apart."""
    if isinstance(results[0], (tuple, list)):
        return tuple(joined(list(each), axis) for each in zip(*results, strict=True))
    return Tokens(results, axis)


def of(value: Any, branch: int) -> Any:
    """What a value is in one branch: 0, or 1 for the negative text's."""

    def of_one(value: Any) -> Any:
        if isinstance(value, Branched):
            return value.negative if branch else value.positive
        return number(value, branch)

    return changed(value, of_one)


def changed(value: Any, convert: Callable[[Any], Any]) -> Any:
    """An argument in which ``convert`` is applied to all that is no container."""
    if isinstance(value, (list, tuple)):
        items = [changed(each, convert) for each in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: changed(each, convert) for key, each in value.items()}
    if isinstance(value, slice):
        return slice(*(changed(each, convert) for each in (value.start, value.stop, value.step)))
    return convert(value)


def paired(positive: Any, negative: Any) -> Any:
    """Two results as one. Raises TypeError for what differs and is neither a tensor nor a whole number."""
    if isinstance(positive, Tensor):
        return positive if positive is negative else Pair(positive, negative)
    if isinstance(positive, (list, tuple)):
        items = [paired(*each) for each in zip(positive, negative, strict=True)]
        return type(positive)(*items) if hasattr(positive, "_fields") else type(positive)(items)
    return both(positive, negative)


def positive_of(value: Any) -> Any:
    """A result of the model without the branch of the negative text."""
    return together(value, lambda each: each.positive)


def together(value: Any, convert: Callable[[Any], Any]) -> Any:
    """A result of the model, in which ``convert`` makes one tensor of each value that stands for one in each branch."""
    if isinstance(value, Branched):
        return convert(value)
    if isinstance(value, (list, tuple)):
        items = [together(each, convert) for each in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        changed = {key: together(each, convert) for key, each in value.items()}
        return type(value)(**changed) if hasattr(value, "__dataclass_fields__") else changed
    return value


def narrowed(part: Part, axis: int, start: int, length: int) -> Any:
    return call(torch.narrow, part, axis, start, length)
