"""Deep copies of modules with a say in what becomes of the tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_Module = TypeVar("_Module", bound=nn.Module)


def copy_module(module: _Module, convert: Callable[[Tensor], Tensor]) -> _Module:
    """A deep copy of ``module`` in which every tensor is what ``convert`` makes of it, once for each distinct tensor.

    That holds for parameters and buffers, and for tensors in other places (an attribute, an offload hook's weights).
    """
    memo: dict[int, Any] = {id(tensor): convert(tensor) for tensor in (*module.parameters(), *module.buffers())}
    with _Copying(convert):
        return copy.deepcopy(module, memo)


class _Copying(TorchFunctionMode):
    def __init__(self, convert: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.convert = convert

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.__deepcopy__:
            with torch._C.DisableTorchFunction():
                return self.convert(args[0])
        return func(*args, **(kwargs or {}))
