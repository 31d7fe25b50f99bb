"""Run a skeleton once and watch: which module computes attention, from which tensors, in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from sloth_fx.capture.skeleton import Skeleton
from sloth_fx.errors import SlothError

_SDPA = F.scaled_dot_product_attention
_SOFTMAX = frozenset({torch.softmax, F.softmax, torch.Tensor.softmax})
_PRODUCTS = frozenset({torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm})
_ADDED_PRODUCTS = frozenset({torch.baddbmm, torch.Tensor.baddbmm})
_CONVOLUTIONS = frozenset({F.conv1d, F.conv2d, F.conv3d})
_CONCATENATIONS = frozenset({torch.cat, torch.concat, torch.concatenate})


@dataclass
class OwnerCall:
    """One call of a module, with its fake arguments."""

    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class AttentionEvent:
    """One attention: when it happened, in which owner call, and the tensors it compares."""

    time: int
    owner: OwnerCall
    query: torch.Tensor
    key: torch.Tensor
    kv_tokens: int
    grid: tuple[int, int] | None


class _SeenEnough(BaseException):
    """Ends a run; no host code catches it."""


class Probe(TorchFunctionMode):
    """Everything one shape-only run of ``skeleton`` on ``inputs`` tells.

    ``attentions`` are in order of execution; ``skips`` are the channel concatenations that join an older feature map
    (when it was made, when it was joined): the skip connections of a UNet, which tell its stages apart.
    With ``until`` the run stops once attention was seen in each of these modules (paths).
    """

    def __init__(
        self, skeleton: Skeleton, args: tuple[Any, ...], kwargs: dict[str, Any], until: Iterable[str] = ()
    ) -> None:
        super().__init__()
        self._awaited = set(until)
        self.attentions: list[AttentionEvent] = []
        self.skips: list[tuple[int, int]] = []
        self._time = 0
        self._made: dict[int, tuple[int, torch.Tensor, list[torch.Tensor]]] = {}  # by id: when, itself, made from what
        self._grids: dict[int, tuple[int, int]] = {}
        self._stack: list[OwnerCall] = []
        hooks = list(self._follow(skeleton.model))
        try:
            with skeleton.running(), self:
                skeleton.model(*args, **kwargs)
        except _SeenEnough:
            pass
        except Exception as error:
            raise SlothError(
                f"{type(skeleton.model).__name__} does not run on these inputs ({_shapes(args, kwargs)}): "
                f"{type(error).__name__}: {error}; example_inputs= takes others"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()

    def sources(self, tensor: torch.Tensor, owner: OwnerCall) -> set[int]:
        """The tensors among the arguments of ``owner`` (by identity) from which ``tensor`` was computed."""
        arguments = {id(leaf) for leaf in tree_leaves((owner.args, owner.kwargs)) if isinstance(leaf, torch.Tensor)}
        found: set[int] = set()
        seen: set[int] = set()
        waiting = [tensor]
        while waiting:
            current = waiting.pop()
            if id(current) in arguments:
                found.add(id(current))
            elif id(current) not in seen:
                seen.add(id(current))
                waiting.extend(self._made.get(id(current), (0, current, []))[2])
        return found

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
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if not outputs:
            return result
        self._time += 1
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if func is _SDPA:
            query, key = (kwargs[n] if n in kwargs else args[i] for i, n in enumerate(("query", "key")))
            self._attention(query, key, key.shape[-2])
        elif func in _SOFTMAX and kwargs.get("dim", args[-1]) in (-1, inputs[0].ndim - 1):
            product = self._product_behind(inputs[0])
            if product is not None:
                self._attention(*product, product[1].shape[-1])
        elif func in _CONCATENATIONS:
            self._concatenation(inputs, outputs[0])
        elif func in _CONVOLUTIONS and outputs[0].ndim == 4:
            rows, columns = outputs[0].shape[-2:]
            self._grids[rows * columns] = (rows, columns)
        for leaf in outputs:
            if not any(leaf is tensor for tensor in inputs):
                self._made[id(leaf)] = (self._time, leaf, inputs)
                if func in _PRODUCTS or func in _ADDED_PRODUCTS:
                    leaf._sloth_fx_factors = tuple(inputs[-2:])  # type: ignore[attr-defined]
        return result

    def _attention(self, query: torch.Tensor, key: torch.Tensor, kv_tokens: int) -> None:
        grid = self._grids.get(query.shape[-2])
        owner = self._stack[-1]
        self.attentions.append(AttentionEvent(self._time, owner, query, key, kv_tokens, grid))
        if owner.path in self._awaited:
            self._awaited.remove(owner.path)
            if not self._awaited:
                raise _SeenEnough

    def _product_behind(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The factors q and k^T of attention scores, through scaling, masking and casts of the same shape."""
        current: torch.Tensor | None = scores
        while current is not None and current.shape == scores.shape:
            factors = getattr(current, "_sloth_fx_factors", None)
            if factors is not None:
                return factors if factors[0].shape[-2] == scores.shape[-2] else None
            made_from = self._made.get(id(current), (0, current, []))[2]
            current = next((tensor for tensor in made_from if tensor.shape == scores.shape), None)
        return None

    def _concatenation(self, inputs: list[torch.Tensor], result: torch.Tensor) -> None:
        maps = [tensor for tensor in inputs if tensor.ndim == 4 and id(tensor) in self._made]
        if len(maps) == len(inputs) == 2 and result.shape[1] == maps[0].shape[1] + maps[1].shape[1]:
            self.skips.append((min(self._made[id(tensor)][0] for tensor in maps), self._time))


def _shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    named = [*((str(index), value) for index, value in enumerate(args)), *kwargs.items()]
    tensors = (f"{name} {tuple(value.shape)}" for name, value in named if isinstance(value, torch.Tensor))
    return ", ".join(tensors) or "no tensors"
