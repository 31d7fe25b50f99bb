"""Numbers that differ between two branches: how many tokens each text has, and what a host computes from that.

A host asks the text for its length and cuts with it, makes positions of it, counts from it. So the length of two texts
stands for that of each, and what is made with it is made for each branch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any


class Length(int):
    """A whole number that is another one in each of two branches; what takes an ``int`` without asking sees the first.

    Sums, products and the like are such numbers too. Where Python would go on with one of the two, TypeError is raised:
    at a comparison with another result in each branch, a conversion to a plain number, a key of a dict.
    """

    negative: int

    def __new__(cls, positive: int, negative: int) -> Length:
        length = super().__new__(cls, positive)
        length.negative = negative
        return length

    @property
    def positive(self) -> int:
        return int.__pos__(self)

    def __repr__(self) -> str:
        return f"{self.positive}|{self.negative}"

    def __bool__(self) -> bool:
        return bool(both(self.positive != 0, self.negative != 0))

    def __reduce__(self) -> Any:
        return Length, (self.positive, self.negative)


def _of_each(function: Callable[..., Any], *, swapped: bool = False) -> Callable[..., Any]:
    def method(self: Length, *others: Any) -> Any:
        if not all(isinstance(each, (int, float)) for each in others):
            return NotImplemented
        given = (*others, self) if swapped else (self, *others)
        return both(*(function(*(number(each, branch) for each in given)) for branch in range(2)))

    return method


def _refused(self: Length, *_: Any) -> Any:
    raise TypeError(f"{self!r} is a number of its own in each branch, and here Python takes one for both")


for _name in ("add", "sub", "mul", "floordiv", "mod", "truediv", "pow", "divmod"):
    _function = divmod if _name == "divmod" else getattr(operator, _name)
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
