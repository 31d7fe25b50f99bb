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
    return keys.unflatten(2, (heads, -1)).transpose(1, 2), values.unflatten(2, (heads, -1)).transpose(1, 2)


def reduce_kv(graph: fx.Graph, core: AttentionCore, name: str, owner: nn.Module, *, hoist: bool = True) -> str:
    """Insert a call of ``self.<name>``, a :class:`KeyValueReduction`, and return where it went.

    ``hoist=False`` keeps it at the attention core.
    """
    users = [_projection(node, owner) for node in (core.key, core.value)] if hoist else [None, None]
    if users[0] is None or users[1] is None or users[0] is users[1]:
        sources = [core.key, core.value]
        users = [core.node, core.node]
        place = "at the attention's keys and values"
    else:
        sources = [users[0].args[0], users[1].args[0]]  # type: ignore[list-item]
        place = f"above {users[0].target}, {users[1].target}"
    arguments = tuple(dict.fromkeys(sources)) if users[0] is not users[1] else tuple(sources)
    with graph.inserting_before(min(users)):  # type: ignore[type-var]
        reduced = graph.call_module(name, arguments)
        key, value = (graph.call_function(operator.getitem, (reduced, index)) for index in (0, 1))
    if users[0] is users[1]:
        _replace_key_value(core, key, value)
    else:
        users[0].replace_input_with(sources[0], key)
        users[1].replace_input_with(sources[1], value)
    graph.lint()
    return place


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
