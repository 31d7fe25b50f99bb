"""Numbers that differ between two branches: how many tokens each text has, and what a host computes from that.

A host asks the text for its length and cuts with it, makes positions of it, counts from it. So the length of two texts
stands for that of each, and what is made with it is made for each branch.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch


class Length(torch.SymInt):
    """A whole number that is another one in each of two branches.

    Sums, products and the like are such numbers too. Where Python would go on with one of the two, TypeError is raised:
    at a comparison with another result in each branch, a conversion to a plain number (a range, a list of so many), a
    key of a dict. It is no ``int``, of which Python takes the value without asking; functions of torch take it as one.
    """

    def __init__(self, positive: int, negative: int) -> None:
        self.positive = positive
        self.negative = negative

    @property
    def node(self) -> Any:
        """What torch would ask for the number."""
        return _refused(self)

    def __repr__(self) -> str:
        return f"{self.positive}|{self.negative}"

    def __bool__(self) -> bool:
        return bool(both(self.positive != 0, self.negative != 0))

    def __reduce__(self) -> Any:
        return Length, (self.positive, self.negative)


def _of_each(function: Callable[..., Any], *, swapped: bool = False) -> Callable[..., Any]:
    def method(self: Length, *others: Any) -> Any:
        if not all(isinstance(each, (int, float, Length)) for each in others):
            return NotImplemented
        given = (*others, self) if swapped else (self, *others)
        return both(*(function(*(number(each, branch) for each in given)) for branch in range(2)))

    return method


def _refused(self: Length, *_: Any) -> Any:
    raise TypeError(f"{self!r} is a number of its own in each branch, and here Python takes one for both")


_BINARY = ("add", "sub", "mul", "floordiv", "mod", "truediv", "pow", "divmod", "and", "or", "xor", "lshift", "rshift")
for _name in _BINARY:
    _function = divmod if _name == "divmod" else getattr(operator, f"__{_name}__")
    setattr(Length, f"__{_name}__", _of_each(_function))
    setattr(Length, f"__r{_name}__", _of_each(_function, swapped=True))
for _name in ("eq", "ne", "lt", "le", "gt", "ge", "neg", "pos", "abs"):
    setattr(Length, f"__{_name}__", _of_each(getattr(operator, _name)))
for _name in ("hash", "int", "index", "float", "trunc", "round", "ceil", "floor"):
    setattr(Length, f"__{_name}__", _refused)


def number(value: Any, branch: int) -> Any:
    """What a number is in one branch: 0, or 1 for the negative text's."""
    if isinstance(value, Length):
        return value.negative if branch else value.positive
    return value


def comparable(shape: Any) -> Any:
    """Sizes that may be compared with others: one that differs between the branches as both of them."""
    if not any(isinstance(each, Length) for each in shape):
        return shape
    return tuple((each.positive, each.negative) if isinstance(each, Length) else each for each in shape)


def product(numbers: Iterable[int]) -> int:
    """As ``math.prod``, which TorchDynamo does not follow for numbers that are none of Python's."""
    return functools.reduce(operator.mul, numbers, 1)


def both(positive: Any, negative: Any) -> Any:
    """One result for both branches. Raises TypeError where they differ in more than a whole number: Python that is
    steered by it runs once."""
    if type(positive) is int and type(negative) is int and positive != negative:
        return Length(positive, negative)
    if isinstance(positive, tuple) and isinstance(negative, tuple) and len(positive) == len(negative):
        return tuple(map(both, positive, negative))
    if positive != negative:
        raise TypeError(f"{positive!r:.40} in the one branch and {negative!r:.40} in the other")
    return positive


def bounds(index: slice, size: int) -> tuple[int, int]:
    """First and last index of a ``slice`` of ``size`` elements, in steps of one."""
    found = (
        slice(*(number(each, branch) for each in (index.start, index.stop))).indices(number(size, branch))
        for branch in range(2)
    )
    start, stop = (both(*each) for each in list(zip(*found, strict=True))[:2])
    return start, stop


def overlap(start: int, stop: int, size: int) -> tuple[int, int]:
    """Of ``size`` elements, the first one from ``start`` to ``stop`` and how many there are, in each branch."""
    found = []
    for branch in range(2):
        first, last = max(number(start, branch), 0), min(number(stop, branch), number(size, branch))
        found.append((first, last - first) if first < last else (0, 0))
    return both(found[0][0], found[1][0]), both(found[0][1], found[1][1])
