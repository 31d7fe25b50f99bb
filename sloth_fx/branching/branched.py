"""What stands for a tensor in each of two branches: the host's own Python works on it, by ``__torch_function__``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sloth_fx.branching.in_place import IN_PLACE
from sloth_fx.branching.lengths import Length


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
        raise NotImplementedError

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


class Method:
    """A method by its name, as a function of what has it."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __call__(self, first: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(first, self.__name__)(*args, **kwargs)


def apply_method(name: str, *args: Any, **kwargs: Any) -> Any:
    """The method ``name`` of the first argument."""
    return args[0].applied(Method(name), args, kwargs)


def name_of(function: Any) -> str:
    return str(getattr(function, "__name__", "")).strip("_")


def _operator(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Branched, *others: Any) -> Any:
        return self.applied(function, (self, *others), {})

    return method


SWAPPED = tuple(f"r{name}" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"))
for _name, _function in {
    **{name: getattr(torch, name) for name in ("neg", "abs", "add", "sub", "mul", "matmul", "pow")},
    **{name: getattr(torch, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    "truediv": torch.div,
    "floordiv": torch.floor_divide,
    "mod": torch.remainder,
    "invert": torch.bitwise_not,
    "and": torch.bitwise_and,
    "or": torch.bitwise_or,
    "xor": torch.bitwise_xor,
}.items():
    setattr(Branched, f"__{_name}__", _operator(_function))


def _method(name: str) -> Callable[..., Any]:
    def method(self: Branched, other: Any) -> Any:
        return apply_method(name, self, other)

    return method


for _name in SWAPPED:
    setattr(Branched, f"__{_name}__", _method(f"__{_name}__"))
for _name, _in_place in IN_PLACE.items():  # x += y is seen under all names that x has: a new value would be under one
    setattr(Branched, _name, _method(_in_place))
