"""The negative text of a guided model, as its context was told, and what calls of the model make of it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sloth_fx.analysis import TextKeyValues, text_kv
from sloth_fx.analysis.whole import capture_whole
from sloth_fx.branching import Groups
from sloth_fx.capture.call import labelled_tensors, read_call, substitute
from sloth_fx.capture.capture import Call
from sloth_fx.capture.skeleton import Skeleton
from sloth_fx.errors import SlothError
from sloth_fx.model_adapters import Arguments
from sloth_fx.passes.core import AttentionCore, attention_cores
from sloth_fx.passes.guide import GuidedAttention


@dataclass(frozen=True, eq=False)
class Negative:
    """Arguments of the model for what is not wanted, and their tensors by label."""

    arguments: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Negative:
        return cls(dict(arguments), {name: each.detach() for name, each in _tensors(arguments).items()})

    def listed(self, given: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
        """What the ``rows`` of a call take that gives each its own text, in a list: one text is for all of them, and
        of several each is for an image. Raises :class:`SlothError` for another number."""
        texts: dict[str, int] = {}
        for name in self.tensors:
            stem, _, index = name.rpartition("_")
            if stem and index.isdecimal():
                texts[stem] = texts.get(stem, 0) + 1
        found: dict[str, Tensor] = {}
        for stem, count in texts.items():
            names = [name for name in given if name.rpartition("_")[0] == stem and name.rpartition("_")[2].isdecimal()]
            if len(names) == rows and rows % count:
                raise SlothError(f"the negative {stem} has {count} texts: give 1, or one for each of the {rows} images")
            if len(names) == rows:
                found |= {name: self.tensors[f"{stem}_{index % count}"] for index, name in enumerate(names)}
        return {name: each.to(given[name].device, given[name].dtype) for name, each in found.items()}

    def rows(self, name: str, like: Tensor | None, groups: int, batch: int) -> Tensor:
        """The tensor ``name`` for each row of a ``batch`` in so many ``groups``; ``like`` is what the call gives in its
        place. Raises :class:`SlothError` for a tensor that does not go there."""
        given = self.tensors[name]
        images = batch // groups
        if like is not None:
            given = given.to(like.device, like.dtype)
            inner = 2 if like.shape[:1] == (batch,) else max(1, like.ndim - 1)  # others may have layers in front
            if given.ndim != like.ndim or given.shape[inner:] != like.shape[inner:]:
                raise SlothError(
                    f"the negative {name} has shape {tuple(given.shape)}, and that of this call {tuple(like.shape)}: "
                    "all but the rows and the number of tokens has to be the same"
                )
        if given.ndim == 0 or (like is not None and like.shape[0] != batch):
            return given
        if given.shape[0] == images:
            return given.repeat(groups, *(1,) * (given.ndim - 1))
        if given.shape[0] not in (1, batch):
            raise SlothError(
                f"the negative {name} has {given.shape[0]} rows: give 1, or one for each of the {images} images"
            )
        return given.expand(batch, *given.shape[1:])


class Guide(Protocol):
    """Brings the negative text into a model, before each call of it that is guided."""

    def prepare(self, model: nn.Module, call: Call, negative: Negative, rows: Groups) -> None: ...


class Original:
    """A model as it was before it was patched, without data. Copies of the patched model share it."""

    def __init__(self, skeleton: Skeleton) -> None:
        self.skeleton = skeleton

    def __deepcopy__(self, memo: Any) -> Original:
        return self

    def labelled(self, call: Call) -> dict[str, Tensor]:
        """The tensors of a call by name."""
        labelled = labelled_tensors(self.skeleton.model.forward, *call)
        return {name: each for name, each in labelled if isinstance(each, Tensor)}

    def positional(self, count: int) -> list[str]:
        """The names of the first ``count`` parameters."""
        return list(inspect.signature(self.skeleton.model.forward).parameters)[:count]

    def follow(self, model: nn.Module) -> None:
        """Take over the dtypes that the weights of ``model`` have by now."""
        for name, module in self.skeleton.model.named_modules():
            now = model.get_submodule(name)
            for mine, theirs in ((module._parameters, now._parameters), (module._buffers, now._buffers)):
                for key, tensor in mine.items():
                    other = theirs.get(key)
                    if tensor is not None and other is not None and tensor.dtype != other.dtype:
                        mine[key] = self.skeleton.fake(other)

    def slice(self, call: Call, text: Sequence[str]) -> tuple[TextKeyValues, list[AttentionCore]]:
        """What gives keys and values from the inputs ``text`` alone, for calls like this one; and all attentions."""
        whole = capture_whole(self.skeleton, call)
        return text_kv(whole, [name for name in text if name in whole.inputs]), attention_cores(whole.graph)


@dataclass(frozen=True, eq=False)
class _Slice:
    """What gives keys and values for calls of one ``pattern``, and arguments of these ``sizes`` by name.

    ``None`` stands for any size: where the slice holds none, and where it came out the same for three.
    """

    pattern: Any
    sizes: dict[str, tuple[int | None, ...]]
    found: TextKeyValues

    def serves(self, sizes: Mapping[str, tuple[int, ...]]) -> bool:
        return self.sizes.keys() == sizes.keys() and all(
            len(mine) == len(sizes[name])
            and all(one in (None, other) for one, other in zip(mine, sizes[name], strict=True))
            for name, mine in self.sizes.items()
        )

    def with_sizes_of(self, other: _Slice) -> _Slice:
        """This slice, for which there is the same at other sizes."""
        return replace(self, sizes={name: _common(mine, other.sizes[name]) for name, mine in self.sizes.items()})


def _common(one: tuple[int | None, ...], other: tuple[int | None, ...]) -> tuple[int | None, ...]:
    return tuple(size if size == again else None for size, again in zip(one, other, strict=True))


def _same(one: TextKeyValues, other: TextKeyValues) -> bool:
    """Whether nothing in a slice, and nothing that the host's Python did on the way, goes by sizes."""
    alike = (one.text, one.code, one.steered_by) == (other.text, other.code, other.steered_by)
    return alike and one.shapes is None and other.shapes is None


@dataclass(eq=False)
class NegativeKeys:
    """Computes the keys and values of the negative text once, and again only where its shape in a call is another.

    ``operators`` are the guided attentions by their number in the graph of the whole model.
    """

    original: Original
    arguments: Arguments
    operators: dict[int, GuidedAttention] = field(default_factory=dict)
    slices: list[_Slice] = field(default_factory=list)
    done: Any = None

    def prepare(self, model: nn.Module, call: Call, negative: Negative, rows: Groups) -> None:
        given = self.original.labelled(call)
        state = negative, rows, {name: (each.shape, each.dtype, each.device) for name, each in given.items()}
        if state == self.done:
            return
        batch = batch_of(self.arguments, call, len(rows))
        own = {name: negative.rows(name, given.get(name), len(rows), batch) for name in negative.tensors}
        other = _replaced(self.original, call, negative, own)
        bring_weights(model)
        found = self._slice(model, other, own)
        with torch.no_grad():
            keys = found(model, *(own[name] for name in found.text))
        for core, operator in self.operators.items():
            operator.set_negative(*keys[core])
        self.done = state

    def _slice(self, model: nn.Module, call: Call, own: Mapping[str, Tensor]) -> TextKeyValues:
        pattern = read_call(*call)[0], *(each.dtype for each in own.values())
        sizes = {name: tuple(each.shape) for name, each in self.original.labelled(call).items()}
        alike = [known for known in self.slices if known.pattern == pattern and known.found.steered_alike(own)]
        for known in alike:
            if known.serves(sizes):
                return known.found
        self.original.follow(model)
        found, _ = self.original.slice(call, list(own))
        missing = [found.reasons[number] for number in self.operators if number in found.reasons]
        if missing:
            raise SlothError(
                f"the negative text is given by {', '.join(own)}, and at {len(missing)} of {len(self.operators)} sites "
                f"{missing[0]}: give that to set_negative as well"
            )
        free = [] if found.shapes is not None else [name for name in sizes if name not in own]
        new = _Slice(pattern, {**sizes, **{name: (None,) * len(sizes[name]) for name in free}}, found)
        twins = [known for known in alike if _same(known.found, found)]
        merged = functools.reduce(_Slice.with_sizes_of, twins, new)
        if twins and self._same_at_a_third_size(call, own, new, merged):
            self.slices = [known for known in self.slices if known not in twins]
            new = merged
        self.slices.append(new)
        return found

    def _same_at_a_third_size(self, call: Call, own: Mapping[str, Tensor], known: _Slice, merged: _Slice) -> bool:
        """Whether a slice that came out the same for two numbers of tokens does so for another too. Two may agree by
        chance: where Python looks a number up in a list, nobody is asked for it."""
        other = {}
        for name, tensor in own.items():
            for axis in range(1, tensor.ndim):
                if merged.sizes[name][axis] is None:
                    tokens = 2 * tensor.shape[axis] + 3
                    tensor = torch.cat([tensor] * 5, axis).narrow(axis, 0, tokens)
            other[name] = tensor
        labels = iter(self.original.labelled(call))
        try:
            third, _ = self.original.slice(substitute(call, lambda each: other.get(next(labels), each)), list(own))
        except SlothError:
            return False
        return _same(third, known.found)


def batch_of(arguments: Arguments, call: Call, groups: int) -> int:
    """Rows of the batch of a call. Raises :class:`SlothError` where they are not so many equal ``groups``."""
    batch = arguments.rows(*call)
    if batch == 0 or batch % groups:
        raise SlothError(
            f"a batch of {batch} rows cannot be divided into {groups} groups of conditioning: say which there are with "
            'rows of the context, such as ("uncond", "cond")'
        )
    return batch


def bring_weights(model: nn.Module) -> None:
    """Where accelerate keeps the weights elsewhere until a model runs, bring them: it is about to."""
    hook = model.__dict__.get("_hf_hook")
    if hook is not None:
        hook.pre_forward(model)


def _replaced(original: Original, call: Call, negative: Negative, own: Mapping[str, Tensor]) -> Call:
    """``call`` with the arguments of the negative text, whose tensors are ``own``."""
    labels = iter(original.labelled(call))
    args, kwargs = substitute(call, lambda tensor: own.get(next(labels), tensor))
    for name, value in negative.arguments.items():
        if kwargs.get(name) is None and name not in original.positional(len(args)):
            inner = map(own.__getitem__, _tensors({name: value}))
            kwargs[name] = substitute(value, functools.partial(_next, inner))
    return args, kwargs


def _next(tensors: Iterator[Tensor], _: Tensor) -> Tensor:
    return next(tensors)


def _tensors(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    labelled = labelled_tensors(lambda: None, (), dict(arguments))
    return {name: each for name, each in labelled if isinstance(each, Tensor)}
