"""Calls of a model with two texts: as values that hold both, or with rows of its own for the negative text.

The former computes once what both have in common (``branching/``). Where a host does not take such values, a call gets
a larger batch, of whose result the first rows are kept.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from sloth_fx.branching import Pair, positive_of
from sloth_fx.capture.capture import Call
from sloth_fx.capture.skeleton import Skeleton
from sloth_fx.errors import SlothError
from sloth_fx.model_adapters import Arguments
from sloth_fx.negative import Negative, Original, batch_of
from sloth_fx.operators import KeyLayout
from sloth_fx.passes.guide import GuidedResult, Rows, SharedImage, picked

NAME = "sloth_branches"
_UNBRANCHED = "_sloth_fx_unbranched_forward"


class Branches(nn.Module):
    """Brings the negative text into the calls of a model, while it guides.

    With ``shares`` the arguments that it has become pairs. Otherwise calls are widened by rows for it, one for each
    that is guided; whatever the text does not say (latent, timestep, sizes) is the same in these.
    """

    def __init__(self, original: Original, arguments: Arguments) -> None:
        super().__init__()
        self.original = original
        self.arguments = arguments
        self.layout = KeyLayout((1, 1))
        self.names = original.positional(1000)
        self.rows: Rows = (True,)
        self.batch = 0
        self.negative: dict[str, Tensor] = {}  # by name; no state of the model
        self.shares = False
        self.done: Any = None

    def set_layout(self, layout: KeyLayout, halves: int) -> None:
        self.layout = layout

    def set_rows(self, rows: Rows) -> None:
        self.rows = rows

    def prepare(self, model: nn.Module, call: Call, negative: Negative, rows: Rows) -> None:
        """Make the negative text fit calls like this one."""
        given = self.original.labelled(call)
        state = negative, rows, {name: (each.shape, each.dtype, each.device) for name, each in given.items()}
        if state == self.done:
            return
        check_rows(self.arguments, call)
        batch = batch_of(self.arguments, call, len(rows))
        unknown = [name for name in negative.tensors if name not in given]
        if unknown:
            raise SlothError(
                f"the negative text has {', '.join(unknown)}, which this call of the model does not: give both or none"
            )
        found = {}
        for name in negative.tensors:
            if given[name].ndim == 0 or given[name].shape[0] != batch:
                continue  # the same for all rows
            own = negative.rows(name, given[name], len(rows), batch)
            if own.shape != given[name].shape:
                raise SlothError(
                    f"the negative {name} has {own.shape[1]} tokens and the other {given[name].shape[1]}: they pass "
                    "this model side by side, so pad them to the same length"
                )
            found[name] = own if self.shares else picked(own, rows, batch)
        self.negative, self.batch, self.done = found, batch, state

    def widened(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The arguments with the negative text."""
        named = zip(self.names, args, strict=False)
        return (
            tuple(self._widened(name, value) for name, value in named),
            {name: self._widened(name, value) for name, value in kwargs.items()},
        )

    def _widened(self, name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            more = self.negative.get(name)
            if self.shares:
                return value if more is None else self._paired(value, more)
            if more is None and value.ndim > 0 and value.shape[0] == self.batch:
                more = picked(value, self.rows, self.batch)
            return value if more is None else torch.cat([value, more])
        if isinstance(value, dict):
            return {key: self._widened(f"{name}_{key}", item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._widened(f"{name}_{index}", item) for index, item in enumerate(value))
        return value

    def _paired(self, text: Tensor, negative: Tensor) -> Pair:
        """Both texts; where a row is not guided, they are the same."""
        if all(self.rows):
            return Pair(text, negative)
        parts = zip(text.chunk(len(self.rows)), negative.chunk(len(self.rows)), self.rows, strict=True)
        return Pair(text, torch.cat([other if guided else own for own, other, guided in parts]))

    def narrowed(self, result: Any) -> Any:
        """The result without the branch of the negative text."""
        if self.shares:
            return positive_of(result)
        total = self.batch + self.batch // len(self.rows) * sum(self.rows)

        def narrow(value: Any) -> Any:
            own = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == total
            return value[: self.batch] if own else value

        return tree_map(narrow, result)


def check_rows(arguments: Arguments, call: Call) -> None:
    """Raise :class:`SlothError` unless each text of a call has a row for each of its batch."""
    batch = batch_of(arguments, call, 1)
    for name, text in arguments.text(*call).items():
        if text.shape[0] != batch:
            raise SlothError(
                f"the negative text needs rows of its own in the batch, and {name} {tuple(text.shape)} does not have a "
                f"row for each of the {batch} of the latent"
            )


def check_widens(original: Original, arguments: Arguments, call: Call) -> None:
    """Raise :class:`SlothError` for a model that does not take more rows than those of a ``call``."""
    check_rows(arguments, call)
    skeleton = original.skeleton
    branches = Branches(original, arguments)
    branches.batch = batch_of(arguments, call, 1)
    args, kwargs = skeleton.fake_inputs(call)
    with skeleton.running():
        try:
            skeleton.model(*args, **kwargs)
        except Exception:
            return  # it runs on real data alone, and what it does there is seen there
        args, kwargs = branches.widened(args, kwargs)
        try:
            skeleton.model(*args, **kwargs)
        except Exception as error:
            raise SlothError(
                "the negative text needs rows of its own in the batch, and with more rows "
                f"{type(skeleton.model).__name__} does not run: {type(error).__name__}: {str(error).strip():.200}"
            ) from error


def why_not_shared(model: nn.Module, call: Call) -> str | None:
    """Why calls of ``model``, patched and with branches, cannot compute once what both texts have in common: tried on a
    copy without data."""
    skeleton = Skeleton(model)
    fake = skeleton.fake_inputs(call)
    share(skeleton.model)
    for module in skeleton.model.modules():
        layout = getattr(module, "layout", None)
        if isinstance(layout, KeyLayout):
            module.__dict__["layout"] = layout._replace(guided=True)
    branches = skeleton.model._modules[NAME]
    assert isinstance(branches, Branches)
    text = [id(each) for each in branches.arguments.text(*fake).values()]
    labelled = branches.original.labelled(fake)
    branches.negative = {name: each for name, each in labelled.items() if id(each) in text or "pooled" in name}
    try:
        with skeleton.running():
            skeleton.model(*fake[0], **fake[1])
    except Exception as error:  # whatever the host's Python does with what stands for a tensor
        reason = str(error).strip().splitlines()
        return f"{type(error).__name__}: {reason[0] if reason else 'no message'}"
    return None


def share(model: nn.Module) -> None:
    """From now on ``model`` computes once what both texts have in common."""
    for module in model.modules():
        if isinstance(module, (Branches, SharedImage, GuidedResult)):
            module.shares = True


def install(model: nn.Module, branches: Branches) -> None:
    """Let ``model`` run its calls through ``branches``."""
    model.add_module(NAME, branches)
    slot = "_old_forward" if "_hf_hook" in model.__dict__ else "forward"  # accelerate's hook wraps what lies there
    model.__dict__[_UNBRANCHED] = model.__dict__.get(slot)
    setattr(model, slot, types.MethodType(_forward, model))


def is_branched(model: nn.Module) -> bool:
    return _UNBRANCHED in model.__dict__


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    branches = self._modules[NAME]
    assert isinstance(branches, Branches)
    own: Callable[..., Any] | None = self.__dict__[_UNBRANCHED]
    guided = branches.layout.guided and any(branches.rows)
    if guided:
        args, kwargs = branches.widened(args, kwargs)
    result = own(*args, **kwargs) if own is not None else type(self).forward(self, *args, **kwargs)
    return branches.narrowed(result) if guided else result
