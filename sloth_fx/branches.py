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

from sloth_fx.branching import (
    Groups,
    Pair,
    Tokens,
    TwoLengths,
    both,
    positive_of,
    run_apart,
    take_lengths,
    tell_einops,
    times_written,
)
from sloth_fx.capture.capture import Call
from sloth_fx.dynamo import outside_graphs
from sloth_fx.errors import SlothError
from sloth_fx.model_adapters import Arguments
from sloth_fx.negative import Negative, Original, batch_of
from sloth_fx.nested import leaves
from sloth_fx.operators import KeyLayout
from sloth_fx.passes.conditioned import picked
from sloth_fx.passes.one_image import BesideText, GuidedResult, SharedImage

NAME = "sloth_branches"
_UNBRANCHED = "_sloth_fx_unbranched_forward"


class Branches(nn.Module):
    """Brings the negative text into the calls of a model, while it guides.

    With ``shares`` the arguments that it has become pairs. Otherwise calls are widened by rows for it, one for each
    that is guided; whatever the text does not say (latent, timestep, sizes) is the same in these. So are calls whose
    texts come in lists (``in_rows``) if lengths differ: there each row has a length of its own, and Python asks for it.
    """

    def __init__(self, original: Original, arguments: Arguments) -> None:
        super().__init__()
        self.original = original
        self.arguments = arguments
        self.layout = KeyLayout((1, 1))
        self.names = original.positional(1000)
        self.rows: Groups = (True,)
        self.alone = False  # the call has no rows but those that are guided: a perturbed one
        self.batch = 0
        self.negative: dict[str, Tensor] = {}  # by name; no state of the model
        self.shares = False
        self.in_rows = False
        self.lengths: list[str] = []  # what is longer or shorter in the negative text, in words
        self.reads = False  # the host, what it computes: numbers that may differ between the branches
        self.apart: list[str] = []  # modules in which it does so
        self.located: dict[str, int] = {}  # the tokens of the text when the sites were located
        self.done: Any = None
        self.compared: dict[str, tuple[Tensor, int | None]] = {}  # what calls gave, and how often it was written into
        self.as_python = outside_graphs(_differing)

    def set_layout(self, layout: KeyLayout, halves: int) -> None:
        self.layout = layout

    def set_rows(self, rows: Groups) -> None:
        self.rows = rows

    def prepare(self, model: nn.Module, call: Call, negative: Negative, rows: Groups) -> None:
        """Make the negative text fit calls like this one."""
        given = self.original.labelled(call)
        state = negative, rows, {name: (each.shape, each.dtype, each.device) for name, each in given.items()}
        if state == self.done and self._as_compared(given):
            return
        if not self.shares:
            check_rows(self.arguments, call)
        texts = [id(each) for each in self.arguments.text(*call).values()]
        batch = batch_of(self.arguments, call, len(rows))
        listed = negative.listed(given, batch) if self.shares else {}
        unknown = [name for name in negative.tensors if name not in given]
        if unknown:
            raise SlothError(
                f"the negative text has {', '.join(unknown)}, which this call of the model does not: give both or none"
            )
        found, compared = {}, {}
        for name in {**negative.tensors, **listed}:
            text = given[name]
            own = listed[name] if name in listed else negative.rows(name, text, len(rows), batch)
            alone = text.ndim == 0 or text.shape[0] != batch  # the same for all rows
            if alone and own.shape == text.shape and id(text) not in texts:  # such as ids, with which the image's go
                compared[name] = text, times_written(text)
                if torch.equal(own, text):
                    continue
            if self.shares:
                found[name] = _checked_length(name, own, text)
            elif own.shape != text.shape:
                raise SlothError(
                    f"the negative {name} has {own.shape[1]} tokens and the other {text.shape[1]}: they pass "
                    "this model side by side, so pad them to the same length"
                )
            elif alone:
                raise SlothError(
                    f"the negative {name} {tuple(own.shape)} differs from that of this call: they pass this model side "
                    f"by side, so give {name} for each of the {batch} rows of the batch"
                )
            else:
                found[name] = picked(own, rows, batch)
        self.lengths = [
            f"{name} {tuple(given[name].shape)}, {tuple(own.shape)}"
            for name, own in found.items()
            if self.shares and own.shape != given[name].shape
        ]
        self.in_rows = bool(self.lengths) and all(
            name in listed for name, own in found.items() if own.shape != given[name].shape
        )
        for module in model.modules():
            if isinstance(module, (SharedImage, GuidedResult)):
                module.shares = self.pairs
                module.longer = self._longer(module.beside, given, found)
        self.negative, self.batch, self.done, self.compared = found, batch, state, compared

    def _as_compared(self, given: dict[str, Tensor]) -> bool:
        """Whether a call gives the very tensors that were compared, as they were then; to read others takes time."""
        return all(
            given[name] is text and count is not None and times_written(text) == count
            for name, (text, count) in self.compared.items()
        )

    def _longer(self, beside: BesideText | None, given: dict[str, Tensor], negative: dict[str, Tensor]) -> Any:
        """By how many tokens the texts beside an image are longer than they were; ``None`` where that is not known."""
        if beside is None or any(name not in given for name in self.located):
            return None
        alike = [name for name, tokens in self.located.items() if tokens == beside.text]
        names = alike if len(alike) == 1 else list(self.located)
        if sum(self.located[name] for name in names) != beside.text:
            return None
        now = [sum(count_tokens(texts.get(name, given[name])) for name in names) for texts in (given, negative)]
        return both(*now) - beside.text

    @property
    def pairs(self) -> bool:
        """Whether the arguments of a call that differ become pairs."""
        return self.shares and not self.in_rows

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
            rows, batch = self._of_call()
            if more is not None and (self.alone if self.pairs else self.in_rows):
                more = picked(more, self.rows, self.batch)
            if self.pairs:
                return value if more is None else Pair(value, more)
            if more is None and value.ndim > 0 and value.shape[0] == batch:
                more = picked(value, rows, batch)
            return value if more is None else torch.cat([value, more])
        if isinstance(value, dict):
            return {key: self._widened(f"{name}_{key}", item) for key, item in value.items()}
        if self.in_rows and isinstance(value, list) and len(value) == self._of_call()[1]:
            own = [row for row, taken in enumerate(self._each_row()) if taken]
            given = value if self.alone else [value[row] for row in own]
            return [*value, *(self.negative.get(f"{name}_{row}", each) for row, each in zip(own, given, strict=True))]
        if isinstance(value, (list, tuple)):
            return type(value)(self._widened(f"{name}_{index}", item) for index, item in enumerate(value))
        return value

    def narrowed(self, result: Any) -> Any:
        """The result without the branch of the negative text."""
        if self.pairs:
            return positive_of(result)
        rows, batch = self._of_call()
        total = batch + batch // len(rows) * sum(rows)

        def has_rows(value: Any) -> bool:
            listed = self.in_rows and isinstance(value, list)
            return (listed or (isinstance(value, Tensor) and value.ndim > 0)) and len(value) == total

        return tree_map(lambda value: value[:batch] if has_rows(value) else value, result, is_leaf=has_rows)

    def _each_row(self) -> list[bool]:
        """Of each row of the batch, whether it is guided."""
        return [taken for taken in self.rows for _ in range(self.batch // len(self.rows))]

    def _of_call(self) -> tuple[Groups, int]:
        """Which groups of the rows of a call are guided, and how many rows these are in all."""
        return ((True,), self.batch // len(self.rows) * sum(self.rows)) if self.alone else (self.rows, self.batch)


def count_tokens(text: Tensor) -> int:
    """Of a text (B, N, C), or (N, C) in a list."""
    return int(text.shape[-2])


def _checked_length(name: str, own: Tensor, text: Tensor) -> Tensor:
    """The negative text, unless what has one token in only one of the branches would be spread over all of them."""
    shapes = zip(own.shape, text.shape, strict=False)
    if own.ndim != text.ndim or any(one != other and 1 in (one, other) for one, other in shapes):
        raise SlothError(
            f"the negative {name} has shape {tuple(own.shape)}, and that of this call {tuple(text.shape)}: a single "
            "token goes with a single token only, so pad them to the same length"
        )
    return own


def check_rows(arguments: Arguments, call: Call) -> None:
    """Raise :class:`SlothError` unless each text of a call has a row for each of its batch."""
    batch = batch_of(arguments, call, 1)
    for name, text in arguments.text(*call).items():
        if text.shape[0] != batch:
            raise SlothError(
                f"the negative text needs rows of its own in the batch, and {name} {tuple(text.shape)} does not have a "
                f"row for each of the {batch} of the latent"
            )


def share(model: nn.Module) -> None:
    """From now on ``model`` computes once what both texts have in common."""
    for module in model.modules():
        if isinstance(module, (Branches, SharedImage, GuidedResult)):
            module.shares = True
    tell_einops()
    take_lengths(model)
    for name in branches_of(model).apart:
        run_apart(model.get_submodule(name))


def install(model: nn.Module, branches: Branches) -> None:
    """Let ``model`` run its calls through ``branches``."""
    model.add_module(NAME, branches)
    slot = "_old_forward" if "_hf_hook" in model.__dict__ else "forward"  # accelerate's hook wraps what lies there
    model.__dict__[_UNBRANCHED] = model.__dict__.get(slot)
    setattr(model, slot, types.MethodType(_forward, model))


def is_branched(model: nn.Module) -> bool:
    return _UNBRANCHED in model.__dict__


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    branches = branches_of(self)
    if not branches.layout.guided or not any(branches.rows):
        return _of_one_text(self, _unbranched(self, args, kwargs))
    if branches.pairs and branches.lengths and not branches.reads and torch.compiler.is_compiling():
        with TwoLengths():
            return branches.narrowed(_unbranched(self, *branches.widened(args, kwargs)))
    if branches.pairs and (branches.reads or branches.lengths):
        return branches.as_python(self, args, kwargs)
    return branches.narrowed(_unbranched(self, *branches.widened(args, kwargs)))


def _of_one_text(self: nn.Module, result: Any) -> Any:
    """The result of a call that is not guided. Raises :class:`SlothError` for what goes back to one that was."""
    if any(isinstance(each, (Pair, Tokens)) for each in leaves(result)):
        raise SlothError(
            f"{type(self).__name__} goes on with what it has kept of an earlier call, which was guided by a negative "
            "text, and this one is not: let it forget that, or guide to the very end"
        )
    return result


def _differing(self: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call in which numbers differ between the branches, as plain Python, with what goes wrong in plain words."""
    branches = branches_of(self)
    try:
        with TwoLengths():
            return branches.narrowed(_unbranched(self, *branches.widened(args, kwargs)))
    except SlothError:
        raise
    except Exception as error:
        how = f"in length ({'; '.join(branches.lengths)})" if branches.lengths else "in what steers the model"
        raise SlothError(
            f"the text and the negative text differ {how}, and with that {type(self).__name__} does not run: "
            f"{type(error).__name__}: {str(error).strip():.200}. Give all that has a place for each token (masks, "
            "ids), or pad both to the same length"
        ) from error


def _unbranched(self: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    own: Callable[..., Any] | None = self.__dict__[_UNBRANCHED]
    return own(*args, **kwargs) if own is not None else type(self).forward(self, *args, **kwargs)


def branches_of(model: nn.Module) -> Branches:
    """Those that :func:`install` has given ``model``."""
    branches = model._modules[NAME]
    assert isinstance(branches, Branches)
    return branches
