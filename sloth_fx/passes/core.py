"""The attention core: one node that computes attention, whatever way the host spelled it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from sloth_fx.errors import SlothError
from sloth_fx.operators import KeyLayout

Attend = Callable[..., Tensor]
_SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_ARGUMENTS = ("query", "key", "value", "mask")
_numbers = itertools.count()


@dataclass(frozen=True)
class AttentionCore:
    """One attention of a canonical graph.

    ``node`` is the attention of ``query`` (B, H, N, D), ``key`` (B, H, M, D) and ``value`` (B, H, M, Dv), and gives
    (B, H, N, Dv). Where the host folds the heads into the batch, or has none, they are (B*H, N, D) and so on. ``mask``
    is broadcastable to (B, H, N, M), or to (B*H, N, M): boolean, with True where a query attends, or added to the
    scores; whoever reduces the keys reduces it as well. ``causal`` tells that a query attends to no later key.

    ``attend(query, key, value, mask, **options)``, the mask being optional and in fourth place, is the host's own
    attention for other tensors: another batch, other numbers of queries and keys. ``options`` (a scale, dropout,
    grouped queries, the ``whole_mask`` by which the host's own is known) may hold nodes, and never ``mask`` nor
    ``causal``. ``refusal`` says why no operator can work here. ``calls`` is how many calls of the host this one stands
    for (it may compute slices one after the other).
    """

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    causal: bool
    attend: Attend
    options: dict[str, Any]
    refusal: str | None = None
    calls: int = 1

    @property
    def masked(self) -> bool:
        return self.mask is not None or self.causal

    def replace(self, **tensors: fx.Node | None) -> AttentionCore:
        """Let the core attend with other ``query``, ``key``, ``value`` or ``mask``, however the host spells it."""
        names = _names(self.node)
        args, kwargs = list(self.node.args), dict(self.node.kwargs)
        for name, new in tensors.items():
            position = _ARGUMENTS.index(name)
            if position < len(args):
                args[position] = new
            else:
                kwargs[names[position]] = new
        self.node.args, self.node.kwargs = tuple(args), kwargs
        return replace(self, **tensors)  # type: ignore[arg-type]


def attention_cores(graph: fx.Graph) -> list[AttentionCore]:
    """The cores of a canonical graph, in order of execution."""
    return [_core(node) for node in graph.nodes if is_core(node)]


def is_core(node: fx.Node) -> bool:
    return node.op == "call_function" and (
        node.target is F.scaled_dot_product_attention or hasattr(node.target, "sloth_fx_core")
    )


def core_function(attend: Attend) -> Attend:
    """Mark ``attend(query, key, value, mask=None, *, causal=False, **options)`` as computing a core."""
    attend.sloth_fx_core = True  # type: ignore[attr-defined]
    return named(attend, "attention")


def named(function: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
    """Give a function that was made a name of its own, under which generated code can call it."""
    function.__name__ = function.__qualname__ = f"{name}_{next(_numbers)}"
    function.__module__ = __name__
    return function


def refuse(node: fx.Node, reason: str | None) -> None:
    """Note at a core why no operator can work on it."""
    if reason is not None:
        node.meta["refusal"] = reason


def _names(node: fx.Node) -> tuple[str, ...]:
    return _SDPA_ARGUMENTS if node.target is F.scaled_dot_product_attention else (*_ARGUMENTS, "causal")


def _core(node: fx.Node) -> AttentionCore:
    names = _names(node)
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    query, key, value = (given.pop(name) for name in names[:3])
    mask = given.pop(names[3], None)
    causal = given.pop("is_causal" if names is _SDPA_ARGUMENTS else "causal", False)
    assert callable(node.target)
    return AttentionCore(
        node=node,
        query=query,
        key=key,
        value=value,
        mask=mask,
        causal=bool(causal),
        attend=node.target,
        options={name: option for name, option in given.items() if not _is_default(option)},
        refusal=node.meta.get("refusal") or _unusual_shape(query),
        calls=node.meta.get("calls", 1),
    )


def _is_default(option: Any) -> bool:
    return option is None or (not isinstance(option, fx.Node) and option in (0.0, False))


def _unusual_shape(query: fx.Node) -> str | None:
    hint = query.meta.get("hint")
    if isinstance(hint, torch.Tensor) and hint.ndim not in (3, 4):
        return f"its queries have {hint.ndim} dimensions: {tuple(hint.shape)}"
    return None


def check_tokens(site: str, tokens: Tensor, layout: KeyLayout) -> None:
    """Raise :class:`SlothError` where the tokens (..., N, C) of a site are not those of its grid."""
    if tokens.shape[-2] != layout.tokens:
        rows, columns = layout.grid
        raise SlothError(
            f"{site}: {tokens.shape[-2]} tokens do not fit a grid of {rows} x {columns}, which this latent should "
            "give; give transform example_inputs of this size"
        )


def first_input(node: fx.Node) -> fx.Node | None:
    """The tensor that a one-tensor operation works on."""
    first = node.args[0] if node.args else None
    return first if isinstance(first, fx.Node) else None
