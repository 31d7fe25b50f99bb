"""Values that differ between two branches of a call, in the place of tensors.

A model is called with a :class:`Pair` where the branches differ, and with tensors where they don't. What works on a
pair works on both of its tensors, so whatever the model does, the result is what two calls would give; all else it
computes once. The host's own Python does this, by ``__torch_function__``: nothing has to be captured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sloth_fx.branching.in_place import IN_PLACE, UnwritableError, writes
from sloth_fx.branching.lengths import Length, both, number


class Branched:
    """Stands for a tensor in each of two branches."""

    positive: Tensor
    negative: Tensor

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls.applied(function, args, kwargs or {})

    @classmethod
    def applied(cls, function: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
        """``function`` of arguments of which some are values of this kind."""
        return apply(function, args, kwargs)

    @property
    def shape(self) -> torch.Size:
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        if isinstance(self.shape[0], Length):
            raise TypeError(f"len is {self.shape[0]!r}, a number of its own in each branch")
        return self.shape[0]

    def __getattr__(self, name: str) -> Any:
        if not callable(getattr(torch.Tensor, name)):
            return self.applied(getattr, (self, name), {})
        return partial(apply_method, name, self)

    def __getitem__(self, index: Any) -> Any:
        return self.applied(torch.Tensor.__getitem__, (self, index), {})

    def __setitem__(self, index: Any, value: Any) -> None:
        self.applied(torch.Tensor.__setitem__, (self, index, value), {})

    def __bool__(self) -> bool:
        raise TypeError("whether this is true may differ between the branches")

    __hash__ = object.__hash__


def _operator(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Branched, *others: Any) -> Any:
        return self.applied(function, (self, *others), {})

    return method


for _name, _function in {
    **{name: getattr(torch, name) for name in ("neg", "add", "sub", "mul", "matmul", "pow", "eq", "ne", "lt", "le")},
    **{name: getattr(torch, name) for name in ("gt", "ge")},
    "truediv": torch.div,
    "floordiv": torch.floor_divide,
    "mod": torch.remainder,
    "invert": torch.bitwise_not,
    "and": torch.bitwise_and,
    "or": torch.bitwise_or,
    "xor": torch.bitwise_xor,
    "radd": torch.add,
    "rmul": torch.mul,
    "rsub": torch.rsub,
    "rand": torch.bitwise_and,
    "ror": torch.bitwise_or,
}.items():
    setattr(Branched, f"__{_name}__", _operator(_function))


def _in_place(method: str) -> Callable[..., Any]:
    """``x += y`` is seen under all names that x has: a new value would be seen under one alone."""

    def write(self: Branched, other: Any) -> Any:
        return apply_method(method, self, other)

    return write


for _name, _method in IN_PLACE.items():
    setattr(Branched, _name, _in_place(_method))


class Pair(Branched):
    """Two tensors: what a value is in the one branch, and in the other. They may differ in size."""

    def __init__(self, positive: Tensor, negative: Tensor) -> None:
        self.positive = positive
        self.negative = negative

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


class Tokens(Branched):
    """``parts`` follow each other along ``axis``: tensors that are the same in both branches, and pairs."""

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
            first, last = max(start, 0), min(stop, size)
            if first < last:
                whole = (first, last) == (0, size)
                found.append(part if whole else narrowed(part, self.axis, first, last - first))
            start, stop = start - size, stop - size
        if not found:
            found = [narrowed(self.parts[0], self.axis, 0, 0)]
        return found[0] if len(found) == 1 else Tokens(found, self.axis)


Part = Tensor | Pair

Rule = Callable[[Any, Any, dict[str, Any]], Any]

RULES: dict[str, Rule] = {}
"""By name of a function, what works on parts of tokens alike: rule(function, args, kwargs), or NotImplemented."""


def apply(function: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
    """``function`` of arguments of which some are branched: part by part where a rule says how, else branch by branch,
    which is always right."""
    _check_writes(function, args, kwargs)
    if writes(function):
        return _written(function, args, kwargs)
    rule = RULES.get(name_of(function))
    found = rule(function, args, dict(kwargs)) if rule is not None else NotImplemented
    if found is not NotImplemented:
        return found
    return paired(function(*of(args, 0), **of(kwargs, 0)), function(*of(args, 1), **of(kwargs, 1)))


def _written(function: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
    target = args[0]
    if isinstance(target, Tokens):
        found = apply(Method(name_of(function)), args, kwargs)
        if not isinstance(found, Tokens) or found.axis != target.axis or found.sizes != target.sizes:
            raise UnwritableError("what is written into a sequence of tokens is cut otherwise in each branch")
        target.parts = [part.to(target.dtype) for part in found.parts]
        return target
    for branch in range(2):
        function(*of(args, branch), **of(kwargs, branch))
    return target


def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``function`` of arguments of which some may be branched; methods of tensors take no others by themselves."""
    branched = any(isinstance(each, Branched) for each in (*args, *kwargs.values()))
    return apply(function, args, kwargs) if branched else function(*args, **kwargs)


def apply_method(name: str, *args: Any, **kwargs: Any) -> Any:
    """The method ``name`` of the first argument."""
    return args[0].applied(Method(name), args, kwargs)


class Method:
    """A method by its name, as a function of what has it."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __call__(self, first: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(first, self.__name__)(*args, **kwargs)


def joined(results: list[Any], axis: int) -> Any:
    """What was computed of each part, as one: tuples and lists come apart."""
    if isinstance(results[0], (tuple, list)):
        return tuple(joined(list(each), axis) for each in zip(*results, strict=True))
    return Tokens(results, axis)


def name_of(function: Any) -> str:
    return str(getattr(function, "__name__", "")).strip("_")


def of(value: Any, branch: int) -> Any:
    """What a value is in one branch: 0, or 1 for the negative text's."""
    if isinstance(value, Branched):
        return value.negative if branch else value.positive
    if isinstance(value, (list, tuple)):
        return type(value)([of(each, branch) for each in value])
    if isinstance(value, dict):
        return {key: of(each, branch) for key, each in value.items()}
    if isinstance(value, slice):
        return slice(of(value.start, branch), of(value.stop, branch), of(value.step, branch))
    return number(value, branch)


def paired(positive: Any, negative: Any) -> Any:
    """Two results as one. Raises TypeError for what differs and is neither a tensor nor a whole number."""
    if isinstance(positive, Tensor):
        return positive if positive is negative else Pair(positive, negative)
    if isinstance(positive, (list, tuple)):
        items = [paired(*each) for each in zip(positive, negative, strict=True)]
        return type(positive)(*items) if hasattr(positive, "_fields") else type(positive)(items)
    return both(positive, negative)


def _check_writes(function: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
    """Raises UnwritableError for what is written into where it would be lost, or be seen by both branches."""
    name = str(getattr(function, "__name__", ""))
    into = writes(function) or name == "__setitem__"
    lost = kwargs.get("out") is not None
    if lost or (into and not isinstance(args[0], (Pair, Tokens))):
        raise UnwritableError(f"{name} writes into what is the same in both branches")


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
