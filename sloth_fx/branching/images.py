"""What is certainly no image, as far as a trial run can tell: what was made of learned tensors and numbers alone."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from sloth_fx.branching.branched import Branched, name_of
from sloth_fx.branching.in_place import writes
from sloth_fx.nested import leaves


class NoImageError(TypeError):
    """What certainly is no image would be taken for one."""


_OTHERS: ContextVar[tuple[Any, ...]] = ContextVar("_OTHERS", default=())
"""Of each trial that runs, on this thread: the tensors that are no image."""


def is_no_image(tensor: Tensor) -> bool:
    """Whether a tensor was made of learned tensors and numbers alone; known in a trial, and else it may be an image."""
    return not torch.compiler.is_compiling() and any(tensor in others for others in _OTHERS.get())


class TellImages(TorchFunctionMode):
    """While it is entered, ``model`` runs on trial, and :func:`is_no_image` knows what comes of its weights alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.others: Any = WeakTensorKeyDictionary(dict.fromkeys((*model.parameters(), *model.buffers()), True))

    def __enter__(self) -> TellImages:
        _OTHERS.set((*_OTHERS.get(), self.others))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        _OTHERS.set(_OTHERS.get()[:-1])

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        branched = next((each for each in types if issubclass(each, Branched)), None)
        if branched is not None:
            with self:  # what is done in each branch is followed too
                return branched.applied(function, args, kwargs)
        found = function(*args, **kwargs)
        given = [each for each in leaves((args, kwargs)) if isinstance(each, Tensor)]
        if all(each in self.others for each in given):
            self.others.update((each, True) for each in leaves(found) if isinstance(each, Tensor))
        elif writes(function, kwargs) or name_of(function) == "setitem":
            self.others.pop(args[0], None)
        return found
