"""What is made of the length of a text, such as positions, is made for the text of each branch."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from sloth_fx.branching.lengths import Length
from sloth_fx.branching.values import OfTexts, Pair, apply, of, paired

_TOGETHER = "_sloth_fx_forward_of_both"


class TwoLengths(TorchFunctionMode):
    """While it is entered, functions of torch take a :class:`Length`: they give a value in each branch."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _holds((args, kwargs), (OfTexts, Length)):
            return apply(function, args, kwargs)
        if function is torch.Tensor.unflatten:  # Python's super, which TorchDynamo does not follow into a mode
            return args[0].unflatten(*args[1:], **kwargs)
        return function(*args, **kwargs)


def take_lengths(model: nn.Module) -> None:
    """From now on modules of a host's own that have no parameters, such as those that make positions, are called once
    for each branch where they are told a :class:`Length`: what their Python does with it is its own affair."""
    for module in model.modules():
        own = not type(module).__module__.startswith(("torch.", "sloth_fx."))
        if own and "forward" not in module.__dict__ and next(module.parameters(), None) is None:
            module.forward = types.MethodType(_forward, module)


def run_apart(module: nn.Module) -> None:
    """From now on ``module``, in which no image reads text, is called once for each branch; with the forward that it
    has by now, which need not be that of its class."""
    if _TOGETHER in module.__dict__:
        return
    slot = "_old_forward" if "_hf_hook" in module.__dict__ else "forward"  # accelerate's hook wraps what lies there
    module.__dict__[_TOGETHER] = module.__dict__.get(slot)
    setattr(module, slot, types.MethodType(_forward_apart, module))


def _forward_apart(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    own: Callable[..., Any] | None = self.__dict__[_TOGETHER]
    forward = own if own is not None else functools.partial(type(self).forward, self)
    return _for_each(forward, args, kwargs) if _holds((args, kwargs), (OfTexts, Length)) else forward(*args, **kwargs)


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = functools.partial(type(self).forward, self)
    return _for_each(forward, args, kwargs) if _holds((args, kwargs), Length) else forward(*args, **kwargs)


def _for_each(forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    positive, negative = (forward(*of(args, branch), **of(kwargs, branch)) for branch in range(2))
    return _merged(paired(positive, negative))


def calls_of(args: Any, kwargs: Any) -> list[tuple[Any, Any]]:
    """The arguments of a call as they are in each branch; of one that is the same in both, once."""
    count = 2 if _holds((args, kwargs), (OfTexts, Length)) else 1
    return [of((args, kwargs), branch) for branch in range(count)]


def _merged(value: Any) -> Any:
    """What was found to be the same in both branches, as one: positions of the image do not go by the text."""
    if isinstance(value, (list, tuple)):
        return type(value)([_merged(each) for each in value])
    return one_if_equal(value)


def one_if_equal(value: Any) -> Any:
    """The tensor that a pair is twice, if it is; to tell, it is read, which a graph cannot do."""
    if torch.compiler.is_compiling() or not isinstance(value, Pair) or value.positive.shape != value.negative.shape:
        return value
    return value.positive if torch.equal(value.positive, value.negative) else value


def _holds(value: Any, kinds: Any) -> bool:
    """Whether there is something of these kinds in an argument."""
    if isinstance(value, (list, tuple)):
        return any(_holds(each, kinds) for each in value)
    if isinstance(value, dict):
        return any(_holds(each, kinds) for each in value.values())
    if isinstance(value, slice):
        return isinstance(value.start, kinds) or isinstance(value.stop, kinds)
    return isinstance(value, kinds)
