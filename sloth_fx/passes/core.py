"""The attention core: one node that computes attention, whatever way the host spelled it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx

from sloth_fx.errors import SlothError
from sloth_fx.operators import KeyLayout

Attend = Callable[..., Tensor]
_SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


@dataclass(frozen=True)
class AttentionCore:
    """``node`` is the attention of ``query`` (..., N, D), ``key`` (..., M, D) and ``value`` (..., M, Dv).

    ``attend``, with ``options``, computes the same from other queries, keys and values. ``masked`` tells that the host
    also gave a mask or asked for causal attention, which ``options`` leave out.
    """

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    masked: bool
    attend: Attend
    options: dict[str, Any]


def attention_cores(graph: fx.Graph) -> list[AttentionCore]:
    """The cores of a canonical graph, in order of execution."""
    cores = []
    for node in graph.nodes:
        if node.op == "call_function" and node.target is F.scaled_dot_product_attention:
            cores.append(_from_sdpa(node))
        elif node.op == "call_function" and getattr(node.target, "sloth_fx_core", False):
            query, key, value = node.args
            cores.append(AttentionCore(node, query, key, value, False, node.target, {}))
    return cores


def _from_sdpa(node: fx.Node) -> AttentionCore:
    given: dict[str, Any] = {**dict(zip(_SDPA_ARGUMENTS, node.args, strict=False)), **node.kwargs}
    query, key, value = (given.pop(name) for name in _SDPA_ARGUMENTS[:3])
    masked = given.pop("attn_mask", None) is not None
    masked = bool(given.pop("is_causal", False)) or masked
    options = {name: option for name, option in given.items() if option not in (None, 0.0, False)}
    return AttentionCore(node, query, key, value, masked, F.scaled_dot_product_attention, options)


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
