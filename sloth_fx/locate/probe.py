"""Run a skeleton once and watch: which module computes attention, from which tokens, in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from sloth_fx.capture.host_functions import HostCall, HostFunction, intercept
from sloth_fx.errors import RefusedInputsError
from sloth_fx.locate.places import NOWHERE, Places, spread, varies
from sloth_fx.locate.provenance import Packed, Provenance, Scores, Source
from sloth_fx.locate.rows import heads_of, joined, rows_of, rows_of_places, times_of_batch
from sloth_fx.locate.tags import follows, places_of, set_places

_SDPA = F.scaled_dot_product_attention
_MULTIHEAD = F.multi_head_attention_forward
_READS = frozenset(
    {torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.__bool__, torch.Tensor.__int__, torch.Tensor.__index__}
    | {torch.Tensor.nonzero, torch.nonzero, torch.Tensor.numpy}
)
_CONCATENATIONS = frozenset({torch.cat, torch.concat, torch.concatenate})


@dataclass(eq=False)
class OwnerCall:
    """One call of a module, with its fake arguments."""

    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    attentions: list[AttentionEvent] = field(default_factory=list)


@dataclass(eq=False)
class AttentionEvent:
    """One attention: when it happened, in which owner call, and the tokens it compares.

    ``query`` and ``key`` are the places of the tokens, (rows of the batch, tokens), ``None`` where nobody knows.
    ``linear`` tells that there is no softmax: keys and values were multiplied first. ``rows`` counts the batch, heads
    folded in, of one that is spelled out, and may come in parts. ``refusal`` says why no operator can work on it.
    """

    time: int
    owner: OwnerCall
    heads: int
    head_dim: int
    q_tokens: int
    kv_tokens: int
    query: Places | None
    key: Places | None
    linear: bool = False
    rows: int = 0
    refusal: str | None = None


class _SeenEnough(BaseException):
    """Ends a run; no host code catches it."""


class Stage(Protocol):
    """What can be run to be watched: a skeleton, or the model itself on real data."""

    model: nn.Module

    def running(self) -> AbstractContextManager[None]: ...


class Probe(TorchFunctionMode):
    """Everything one run of ``stage`` on ``(args, kwargs)`` tells.

    ``inputs`` are the tensors among the arguments whose elements are followed, by name, the latent first; ``packed``
    tells which tokens of that are its own.
    ``attentions`` are in order of execution; ``skips`` are the channel concatenations that join an older feature map
    (when it was made, when it was joined): the skip connections of a UNet, which tell its stages apart.
    ``read_values`` tells that the host looked at values, and not at shapes alone.
    With ``until`` the run stops once attention was seen as often as that in each of these modules (paths).
    """

    def __init__(
        self,
        stage: Stage,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        inputs: Mapping[str, torch.Tensor],
        until: Mapping[str, int] | None = None,
        packed: Packed | None = None,
    ) -> None:
        super().__init__()
        self._awaited = dict(until or {})
        self.attentions: list[AttentionEvent] = []
        self.skips: list[tuple[int, int]] = []
        self.read_values = False
        self._time = 0
        self._made: dict[int, tuple[int, torch.Tensor]] = {}  # by id: when, and itself
        self._last_chunk: tuple[OwnerCall, torch.UntypedStorage, torch.UntypedStorage] | None = None
        self._last_key: tuple[Any, ...] = ()
        self._stack: list[OwnerCall] = []
        self._provenance = Provenance(inputs, self._spelled_out, self._without_softmax, packed)
        self._inside = False  # a function that computes attention, whose own operations tell nothing
        try:
            with ExitStack() as stack:
                for hook in self._follow(stage.model):
                    stack.callback(hook.remove)
                stack.enter_context(stage.running())
                stack.enter_context(intercept(self._host_function))
                stack.enter_context(self._provenance)
                stack.enter_context(self)
                stage.model(*args, **kwargs)
        except _SeenEnough:
            pass
        except Exception as error:
            raise RefusedInputsError(
                f"{type(stage.model).__name__} does not run on these inputs ({_shapes(args, kwargs)}): "
                f"{type(error).__name__}: {_first_line(error)}; example_inputs= takes others"
            ) from error

    @property
    def sources(self) -> list[Source]:
        return self._provenance.sources

    @property
    def _arguments(self) -> tuple[Any, ...]:
        """Of the owner that runs."""
        return self._stack[-1].args, self._stack[-1].kwargs

    def _follow(self, model: nn.Module) -> Iterator[Any]:
        for path, module in model.named_modules():
            yield module.register_forward_pre_hook(self._entering(path), with_kwargs=True)
            yield module.register_forward_hook(self._leaving, always_call=True)

    def _entering(self, path: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._stack.append(OwnerCall(path, module, args, kwargs))

        return enter

    def _leaving(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._stack.pop()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.read_values |= func in _READS
        if func is _SDPA:
            query, key = (kwargs[n] if n in kwargs else args[i] for i, n in enumerate(("query", "key")))
            result = self._outright(func, args, kwargs)
            self._attention(query, key)
            _keep_queries(query, key, result)
        elif func is _MULTIHEAD:
            result = self._outright(func, args, kwargs)
            self._multihead(*args[:5], result=result[0])
        else:
            result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if not outputs:
            return result
        self._time += 1
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if func in _CONCATENATIONS:
            self._concatenation(inputs, outputs[0])
        for leaf in outputs:
            if not any(leaf is tensor for tensor in inputs):
                self._made[id(leaf)] = self._time, leaf
        return result

    def _outright(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inside, self._inside = self._inside, True
        try:
            return func(*args, **kwargs)
        finally:
            self._inside = inside

    def _host_function(self, entry: HostFunction, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = HostCall.read(entry, args, kwargs)
        result = call.empty()
        rows = _rows_that_read(call.query, call.key)
        if rows is not None:
            _, layout = entry.layout_of(entry.arguments(args, kwargs))
            layout = layout if len(layout) == result.ndim else layout.replace("H", "")
            tokens = rows if "B" in layout else rows[0]
            shape = [size if letter in "BN" else 1 for letter, size in zip(layout, result.shape, strict=True)]
            set_places(result, spread(tokens.reshape(shape), result.shape))
        self._attention(call.query, call.key)
        self._stack[-1].attentions[-1].refusal = call.refusal
        return result

    def _multihead(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: Any,
        width: int,
        heads: int,
        *_: Any,
        result: Any,
        **__: Any,
    ) -> None:
        """torch's own function takes tokens first: (N, B, C) or (N, C)."""
        places = [places_of(tensor) for tensor in (query, key)]
        rows = [
            each.reshape(*each.shape[:1], -1, each.shape[-1])[..., 0].T if each is not None else None for each in places
        ]
        self._add(heads, width // heads, query.shape[0], key.shape[0], rows[0], rows[1])
        set_places(result, places[0] if places[0] is None else spread(places[0][..., :1], result.shape))

    def _spelled_out(self, scores: Scores) -> None:
        if self._inside:
            return
        query, key = scores.query, scores.key_transposed
        owner = self._stack[-1]
        chunk = owner, query.untyped_storage(), key.untyped_storage()
        if self._last_chunk is not None and _same(chunk, self._last_chunk):
            event = self.attentions[-1]  # a loop over parts of one query and key is one attention
            if self._last_key == (key.storage_offset(), tuple(key.shape)):
                event.q_tokens += query.shape[-2]
                event.query = joined(event.query, rows_of(query))
            else:
                event.rows += len(query)
                event.heads = max(event.heads, times_of_batch(event.rows, query, self._arguments))
        else:
            places = places_of(key)
            rows = rows_of(query), rows_of_places(places.swapaxes(-1, -2)) if places is not None else None
            heads = heads_of(query, rows[0], self._arguments)
            self._add(heads, query.shape[-1], query.shape[-2], key.shape[-1], _if_learned(query, rows[0]), rows[1])
            self.attentions[-1].rows = len(query)
        self._last_chunk, self._last_key = chunk, (key.storage_offset(), tuple(key.shape))

    def _without_softmax(self, keys: torch.Tensor) -> None:
        if not self._inside and not any(event.linear for event in self._stack[-1].attentions):
            tokens, heads = keys.shape[-2], keys.shape[-3] if keys.ndim >= 4 else 1
            self._add(heads, keys.shape[-1], tokens, tokens, None, None, linear=True)

    def _attention(self, query: torch.Tensor, key: torch.Tensor) -> None:
        """Of query (..., N, D) and key (..., M, D)."""
        rows = rows_of(query)
        heads = heads_of(query, rows, self._arguments)
        self._add(heads, query.shape[-1], query.shape[-2], key.shape[-2], _if_learned(query, rows), rows_of(key))

    def _add(
        self,
        heads: int,
        head_dim: int,
        q_tokens: int,
        kv_tokens: int,
        query: Places | None,
        key: Places | None,
        linear: bool = False,
    ) -> None:
        owner = self._stack[-1]
        event = AttentionEvent(self._time, owner, heads, head_dim, q_tokens, kv_tokens, query, key, linear)
        self.attentions.append(event)
        owner.attentions.append(event)
        self._last_chunk = None
        if owner.path in self._awaited:
            self._awaited[owner.path] -= 1
            if not any(self._awaited.values()):
                raise _SeenEnough

    def _concatenation(self, inputs: list[torch.Tensor], result: torch.Tensor) -> None:
        """Two feature maps (B, C, ...) that meet at the same pixels."""
        if len(inputs) != 2 or result.ndim < 3 or result.shape[1] != sum(tensor.shape[1] for tensor in inputs):
            return
        places = [places_of(tensor) for tensor in inputs]
        known = all(id(tensor) in self._made for tensor in inputs)
        if known and all(each is not None and not varies(each, 1) and varies(each, -1) for each in places):
            self.skips.append((min(self._made[id(tensor)][0] for tensor in inputs), self._time))


def _if_learned(query: torch.Tensor, rows: Places | None) -> Places | None:
    """The places ``rows`` of queries: nowhere, if no input has a part in them."""
    return rows if follows(query) else np.full((1, query.shape[-2]), NOWHERE)


def _rows_that_read(query: torch.Tensor, key: torch.Tensor) -> Places | None:
    """The places of queries, by row of the batch. Learned tokens stand for the first one that they read."""
    rows, read = rows_of(query), rows_of(key)
    if follows(query) or read is None:
        return rows
    return np.repeat(read.min(1, keepdims=True), query.shape[-2], axis=1)


def _keep_queries(query: torch.Tensor, key: torch.Tensor, result: torch.Tensor) -> None:
    places = places_of(query)
    if not follows(query):
        rows = _rows_that_read(query, key)
        if rows is not None and len(rows) == len(result):
            set_places(result, spread(rows.reshape(len(rows), *(1,) * (result.ndim - 3), -1, 1), result.shape))
    elif places is not None and result.shape[:-1] == query.shape[:-1]:
        set_places(result, spread(places[..., :1], result.shape))


def _same(chunk: tuple[OwnerCall, Any, Any], last: tuple[OwnerCall, Any, Any]) -> bool:
    return chunk[0] is last[0] and all(new._cdata == old._cdata for new, old in zip(chunk[1:], last[1:], strict=True))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    named = [*((str(index), value) for index, value in enumerate(args)), *kwargs.items()]
    tensors = (f"{name} {tuple(value.shape)}" for name, value in named if isinstance(value, torch.Tensor))
    return ", ".join(tensors) or "no tensors"
