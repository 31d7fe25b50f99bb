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

from sloth_fx.operators import KeyLayout, Pooling, reduce_tokens
from sloth_fx.passes.core import AttentionCore, first_input

_RESHAPES = frozenset({"view", "reshape", "transpose", "permute", "contiguous", "unflatten", "flatten", "to", "float"})
_PER_TOKEN = ("LayerNorm", "RMSNorm", "Identity", "Dropout")


class KeyValueReduction(nn.Module):
    """Reduces the tokens that become keys and values to those that ``layout`` leaves.

    Takes the input of both projections (B, N, C), or that of each; or keys and values (B, H, N, D) or (B*H, N, D).
    Returns the reduced pair, which is one tensor where both are reduced alike.
    """

    def __init__(self, pooling: Pooling, layout: KeyLayout) -> None:
        super().__init__()
        self.pooling = pooling
        self.layout = layout

    def set_layout(self, layout: KeyLayout, halves: int) -> None:
        self.layout = layout

    def forward(self, keys: Tensor, values: Tensor | None = None) -> tuple[Tensor, Tensor]:
        layout = self.layout
        if layout.window == (1, 1):  # nothing to pool; cutting tiles out is then left to the tiled attention
            return keys, keys if values is None else values
        if values is None:
            return reduce_tokens(keys, layout, self.pooling)
        return _reduced(keys, layout, self.pooling)[0], _reduced(values, layout, self.pooling)[1]

    def extra_repr(self) -> str:
        return f"{self.pooling}, {self.layout}"


def _reduced(tokens: Tensor, layout: KeyLayout, pooling: Pooling) -> tuple[Tensor, Tensor]:
    if tokens.ndim == 3:
        return reduce_tokens(tokens, layout, pooling)
    heads = tokens.shape[1]
    keys, values = reduce_tokens(tokens.transpose(1, 2).flatten(2), layout, pooling)
    return (
        torch.unflatten(keys, 2, (heads, -1)).transpose(1, 2),
        torch.unflatten(values, 2, (heads, -1)).transpose(1, 2),
    )


def reduce_kv(graph: fx.Graph, core: AttentionCore, name: str, owner: nn.Module, *, hoist: bool = True) -> str:
    """Insert a call of ``self.<name>``, a :class:`KeyValueReduction`, and return where it went.

    ``hoist=False`` keeps it at the attention core.
    """
    to_key, to_value = (_projection(node, owner) for node in (core.key, core.value)) if hoist else (None, None)
    if to_key is None or to_value is None or to_key is to_value:
        with graph.inserting_before(core.node):
            _replace_key_value(core, *_reduced_pair(graph, name, (core.key, core.value)))
        place = "at the attention's keys and values"
    else:
        key_input, value_input = to_key.all_input_nodes[0], to_value.all_input_nodes[0]
        inputs = (key_input,) if key_input is value_input else (key_input, value_input)
        with graph.inserting_before(min(to_key, to_value)):
            key, value = _reduced_pair(graph, name, inputs)
        to_key.replace_input_with(key_input, key)
        to_value.replace_input_with(value_input, value)
        place = f"above {to_key.target}, {to_value.target}"
    graph.lint()
    return place


def _reduced_pair(graph: fx.Graph, name: str, inputs: tuple[fx.Node, ...]) -> tuple[fx.Node, fx.Node]:
    reduced = graph.call_module(name, inputs)
    key, value = (graph.call_function(operator.getitem, (reduced, index)) for index in (0, 1))
    return key, value


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
