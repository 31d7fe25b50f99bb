"""Insert a reduction of keys and values, above their projections where that is possible.

    key = self.to_k(x)                   reduced = self.sloth_reduce_0(x)
    value = self.to_v(x)          ->     key = self.to_k(reduced[0])
                                         value = self.to_v(reduced[1])

Above the projections is where the reference node reduces (max pooling does not commute with a linear layer), and it
saves the projections' work too. It is possible where everything between the projections and the attention works on
each token alone; otherwise keys and values are reduced where the attention takes them.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx, nn

from sloth_fx.capture.recorder import has_effect
from sloth_fx.operators import KeyLayout, Pooling, reduce_tokens
from sloth_fx.passes.core import AttentionCore, check_tokens, first_input

_RESHAPES = frozenset({"view", "reshape", "transpose", "permute", "contiguous", "unflatten", "flatten", "to", "float"})
_PER_TOKEN = ("LayerNorm", "RMSNorm", "Identity", "Dropout")


class KeyValueReduction(nn.Module):
    """Reduces the tokens that become keys and values to those that ``layout`` leaves.

    Takes what both projections take (B, N, C), or keys or values (B, H, N, D) or (B*H, N, D). Returns what becomes of
    it as keys and as values; that is one tensor where both are reduced alike. ``site`` is named in errors.
    """

    def __init__(self, site: str, pooling: Pooling, layout: KeyLayout) -> None:
        super().__init__()
        self.site = site
        self.pooling = pooling
        self.layout = layout

    def set_layout(self, layout: KeyLayout, halves: int) -> None:
        self.layout = layout

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        layout = self.layout
        if layout.window == (1, 1):  # nothing to pool; cutting tiles out is then left to the tiled attention
            return tokens, tokens
        check_tokens(self.site, tokens, layout)
        if tokens.ndim == 3:
            return reduce_tokens(tokens, layout, self.pooling)
        heads = tokens.shape[1]
        keys, values = reduce_tokens(tokens.transpose(1, 2).flatten(2), layout, self.pooling)
        return _with_heads(keys, heads), _with_heads(values, heads)

    def extra_repr(self) -> str:
        return f"{self.pooling}, {self.layout}"


def _with_heads(tokens: Tensor, heads: int) -> Tensor:
    return torch.unflatten(tokens, 2, (heads, -1)).transpose(1, 2)


def reduce_kv(graph: fx.Graph, core: AttentionCore, name: str, owner: nn.Module, *, hoist: bool = True) -> str:
    """Insert calls of ``self.<name>``, a :class:`KeyValueReduction`, and return where they went.

    ``hoist=False`` keeps them at the attention core.
    """
    to_key, to_value = (_projection(node, owner) for node in (core.key, core.value)) if hoist else (None, None)
    if to_key is None or to_value is None or to_key is to_value:
        key, value = (
            _reduced(graph, name, node, core.node)[index] for index, node in enumerate((core.key, core.value))
        )
        _replace_key_value(core, key, value)
        place = "at the attention's keys and values"
    else:
        key_input, value_input = to_key.all_input_nodes[0], to_value.all_input_nodes[0]
        key, value = _reduced(graph, name, key_input, min(to_key, to_value) if key_input is value_input else to_key)
        if value_input is not key_input:
            value = _reduced(graph, name, value_input, to_value)[1]
        to_key.replace_input_with(key_input, key)
        to_value.replace_input_with(value_input, value)
        place = f"above {to_key.target}, {to_value.target}"
    graph.eliminate_dead_code(has_effect)
    graph.lint()
    return place


def _reduced(graph: fx.Graph, name: str, tokens: fx.Node, before: fx.Node) -> tuple[fx.Node, fx.Node]:
    with graph.inserting_before(before):
        reduced = graph.call_module(name, (tokens,))
        return graph.call_function(operator.getitem, (reduced, 0)), graph.call_function(operator.getitem, (reduced, 1))


def _replace_key_value(core: AttentionCore, key: fx.Node, value: fx.Node) -> None:
    args = list(core.node.args)
    kwargs = dict(core.node.kwargs)
    for position, (name, new) in enumerate((("key", key), ("value", value)), start=1):
        if name in kwargs:
            kwargs[name] = new
        else:
            args[position] = new
    core.node.args, core.node.kwargs = tuple(args), kwargs


def _projection(node: fx.Node, owner: nn.Module) -> fx.Node | None:
    """The linear projection that ``node`` comes from by operations on each token alone."""
    tokens = node.meta["hint"].shape[-2]
    current: fx.Node | None = node
    while current is not None:
        if current.op == "call_module":
            module = owner.get_submodule(str(current.target))
            if hasattr(module, "in_features") and hasattr(module, "out_features"):
                source = first_input(current)
                return current if source is not None and _is_tokens(source, tokens) else None
            if not type(module).__name__.endswith(_PER_TOKEN) or len(current.all_input_nodes) != 1:
                return None
        elif current.op != "call_method" or current.target not in _RESHAPES:
            return None
        current = first_input(current)
    return None


def _is_tokens(node: fx.Node, tokens: int) -> bool:
    hint = node.meta.get("hint")
    return isinstance(hint, torch.Tensor) and hint.ndim == 3 and hint.shape[1] == tokens
