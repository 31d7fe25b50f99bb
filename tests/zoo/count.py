"""An independent count of a model's attentions: torch's functions are exchanged while the model runs on real tensors.

It shares no code with the library, and no method: nothing here is traced, and nothing is fake.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import flex_attention as flex
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

# A softmax in a forward of these is no attention: it chooses experts, or the words of a codebook.
_GATES = ("MoEGate", "Router", "TopK")

Bias = Callable[["Attention"], Tensor | None]


@dataclass
class Attention:
    """One attention: which module computed it (``path``, its ``call``-th one), how it is spelled, and its tensors.

    ``index`` counts all attentions of the model.

    ``query``, ``key`` and ``value`` are as the host has them: (B, H, N, D), or (B * H, N, D) where it folds the heads.
    A loop over slices of one attention is one; its tensors are those of all slices.
    """

    index: int
    path: str
    call: int
    spelling: str
    query: Tensor
    key: Tensor
    value: Tensor | None = None
    output: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)
    owner_call: int = 0

    @property
    def name(self) -> str:
        path = self.path or "(the model itself)"
        return f"{path}[{self.call}]" if self.call else path


@contextmanager
def watch(model: nn.Module, bias: Bias | None = None) -> Iterator[list[Attention]]:
    """The attentions of ``model``, in order, as they happen in the block.

    ``bias`` changes them: for each attention it returns what is added to its scores (N or 1, M), which may be minus
    infinity, or ``None`` for nothing. An attention that is changed is computed in float64.
    """
    with ExitStack() as stack:
        watcher = _Watcher(model, bias or (lambda attention: None))
        for holder, name, stand_in in watcher.stand_ins():
            stack.enter_context(mock.patch.object(holder, name, stand_in))
        stack.callback(register_module_forward_pre_hook(watcher.enter).remove)
        stack.callback(register_module_forward_hook(watcher.leave, always_call=True).remove)
        yield watcher.attentions


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    bias: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T * scale + mask + bias) v in float64."""
    query64, key64, value64 = (each.double() for each in (query, key, value))
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key64, value64 = (each.repeat_interleave(groups, dim=-3) for each in (key64, value64))
    scores = query64 @ key64.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    if attn_mask is not None:
        hidden = attn_mask.dtype == torch.bool
        scores = scores + (torch.zeros(()).masked_fill(~attn_mask, -math.inf) if hidden else attn_mask)
    return (_softmax(scores, bias) @ value64).to(query.dtype)


def _softmax(scores: Tensor, bias: Tensor | None) -> Tensor:
    """In float64, over the last dimension; the rows of queries that may see nothing are zeros."""
    scores = scores.double() if bias is None else scores.double() + bias
    return torch.softmax(scores, -1).nan_to_num(0.0)


class _Watcher:
    def __init__(self, model: nn.Module, bias: Bias) -> None:
        self.attentions: list[Attention] = []
        self._bias = bias
        self._paths = {module: path for path, module in model.named_modules()}
        self._stack: list[tuple[nn.Module, int]] = []
        self._entered = 0
        self._calls: Counter[str] = Counter()
        self._busy = False  # in a stand-in: torch's functions call each other
        self._product: tuple[Tensor, Tensor] | None = None  # operands of the latest product of matrices
        self._open: tuple[Attention, Tensor] | None = None  # an attention that awaits its values, and its weights

    def enter(self, module: nn.Module, args: Any) -> None:
        self._entered += 1
        self._stack.append((module, self._entered))

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._stack.pop()

    def stand_ins(self) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
        for holder, name in ((F, "scaled_dot_product_attention"), (flex, "flex_attention")):
            yield holder, name, self._outermost(getattr(holder, name), self._called)
        yield nn.MultiheadAttention, "forward", self._outermost(nn.MultiheadAttention.forward, self._multihead)
        for holder in (torch, F, Tensor):
            yield holder, "softmax", self._outermost(holder.softmax, self._weighed)
        for holder, names in (
            (torch, ("matmul", "bmm", "baddbmm", "einsum")),
            (Tensor, ("matmul", "__matmul__", "bmm", "baddbmm")),
        ):
            for name in names:
                yield holder, name, self._outermost(getattr(holder, name), self._multiplied)

    def _outermost(self, function: Callable[..., Any], seen: Callable[..., Any]) -> Callable[..., Any]:
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            if self._busy or not self._stack or self._stack[-1][0] not in self._paths:
                return function(*args, **kwargs)
            self._busy = True
            try:
                return seen(function, *args, **kwargs)
            finally:
                self._busy = False

        return stand_in

    def _add(self, spelling: str, query: Tensor, key: Tensor, **more: Any) -> Attention:
        attention = self._new(spelling, query, key, **more)
        self._record(attention)
        return attention

    def _new(self, spelling: str, query: Tensor, key: Tensor, **more: Any) -> Attention:
        module, owner_call = self._stack[-1]
        path = self._paths[module]
        number = len(self.attentions), path, self._calls[path]
        return Attention(*number, spelling, query, key, owner_call=owner_call, **more)

    def _record(self, attention: Attention) -> None:
        self._calls[attention.path] += 1
        self.attentions.append(attention)

    def _called(self, function: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        spelling = "flex" if "flex" in function.__name__ else "sdpa"
        options = {**dict(zip(("attn_mask", "dropout_p", "is_causal"), args, strict=False)), **kwargs}
        attention = self._add(spelling, query, key, value=value, options=options)
        bias = self._bias(attention)
        attention.output = (
            function(query, key, value, *args, **kwargs)
            if bias is None
            else attend(query, key, value, **options, bias=bias)
        )
        return attention.output

    def _multihead(
        self, function: Any, module: nn.MultiheadAttention, query: Tensor, key: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        tokens = (query, key) if module.batch_first else (query.transpose(0, 1), key.transpose(0, 1))
        attention = self._add("multihead", *tokens)
        bias = self._bias(attention)
        if bias is not None:
            kwargs = {**kwargs, "attn_mask": bias.expand(tokens[0].shape[1], tokens[1].shape[1]).to(query.dtype)}
        output = function(module, query, key, *args, **kwargs)
        attention.output = output[0]
        return output

    def _multiplied(self, function: Any, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = function(*args, **kwargs)
        factors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)][-2:]
        if len(factors) < 2:
            return result
        if self._open is not None and factors[0].numel() == self._open[1].numel():
            attention, weights = self._open
            attention.value = _together(attention.value, _tokens(factors[1], weights.shape[-1]))
            attention.output = _together(attention.output, result)
            if attention.spelling == "softmax of products":
                attention.spelling = "softmax"
                self._record(attention)
            self._open = None
        self._product = factors[0], factors[1]
        return result

    def _weighed(self, function: Any, scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weights: Tensor = function(scores, *args, **kwargs)
        module, owner_call = self._stack[-1]
        if self._product is None or any(name in type(module).__name__ for name in _GATES):
            return weights
        query, key = (_tokens(each, tokens) for each, tokens in zip(self._product, scores.shape[-2:], strict=True))
        if query.shape[-2] != scores.shape[-2] or key.shape[-2] != scores.shape[-1]:
            return weights
        last = self.attentions[-1] if self.attentions else None
        if last is not None and last.owner_call == owner_call and last.spelling == "softmax":
            attention = last
            attention.query, attention.key = _together(attention.query, query), _together(attention.key, key)
        else:
            # It is an attention once its weights are multiplied with something.
            attention = self._new("softmax of products", query, key)
        bias = self._bias(attention)
        if bias is not None:
            weights = _softmax(scores, bias).to(weights.dtype)
        self._open = attention, weights
        return weights


def _tokens(factor: Tensor, tokens: int) -> Tensor:
    """(..., N, D) of a factor that may be transposed."""
    return factor if factor.shape[-2] == tokens else factor.mT


def _together(slices: Tensor | None, more: Tensor) -> Tensor:
    return more if slices is None else torch.cat([slices, more])
