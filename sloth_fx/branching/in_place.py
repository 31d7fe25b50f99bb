"""Which functions write into what they are given, where branches may differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

IN_PLACE = {
    **{f"__i{name}__": f"{name}_" for name in ("add", "sub", "mul", "pow")},
    "__itruediv__": "div_",
    "__ifloordiv__": "floor_divide_",
    "__imod__": "remainder_",
    **{f"__i{name}__": f"bitwise_{name}_" for name in ("and", "or", "xor")},
}
"""Methods of tensors by the operators that call them."""


class UnwritableError(RuntimeError):
    """Something that differs between the branches would be written where it would be lost, or be seen by both.

    It is no TypeError: for one, torch would compute ``tensor += value`` as ``tensor + value`` in silence.
    """


def writes(function: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a function called with ``kwargs`` writes into its first argument; other than by an index."""
    name = str(getattr(function, "__name__", "")).partition(".")[0]  # an operation's overload behind it
    if kwargs.get("inplace"):  # torch names it, also where the host does not
        return True
    return name in IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def times_written(tensor: Tensor) -> int | None:
    """How often a tensor, or what looks at the same data, was written into; ``None`` where torch does not count: in
    inference mode."""
    return None if tensor.is_inference() else tensor._version
