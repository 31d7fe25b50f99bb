"""Insert a reduction of keys and values, above their projections where that is possible.

    key = self.to_k(x)                   reduced = self.sloth_reduce_0(x)
    value = self.to_v(x)          ->     key = self.to_k(reduced[0])
                                         value = self.to_v(reduced[1])

Above the projections is where the reference node reduces (max pooling does not commute with a linear layer), and it
saves the projections' work too. It is possible where everything between the projections and the attention works on
each token alone (``key_path.py``); otherwise keys and values are reduced where the attention takes them.

Keys with a rotary embedding are pooled before they are rotated, and rotated at the centre of their window:

    key = self.norm_k(self.to_k(x))      reduced = self.sloth_reduce_0.unrotated(x, 1)
    key = rotate(key, cos, sin)   ->     key = self.norm_k(self.to_k(reduced[0]))
                                         factors = self.sloth_reduce_0.rotation(cos, sin, kind="pair", axis=1)
                                         key = self.sloth_reduce_0.blend(rotate(key, *factors))

Where the graph does not show how they are rotated, the first key of each window is picked, rotated as it is.
"""

from __future__ import annotations

import operator

from torch import fx, nn
from torch.fx.node import Argument

from sloth_fx.capture.recorder import has_effect
from sloth_fx.passes.causal import causal_of, tell_causal
from sloth_fx.passes.core import AttentionCore, attention_cores
from sloth_fx.passes.key_path import Path, Rotation, is_rotated, paths
from sloth_fx.passes.reduction import KeyValueReduction
from sloth_fx.passes.token_axis import Sizes
from sloth_fx.passes.walk import needed, outcomes

__all__ = ["LEVELS", "KeyValueReduction", "reduce_kv"]

LEVELS = 3
"""How many ways there are to insert a reduction, from above the projections down to the attention."""


def reduce_kv(
    graph: fx.Graph,
    core: AttentionCore,
    name: str,
    owner: nn.Module,
    *,
    image_tokens: int | None = None,
    level: int = 0,
) -> tuple[AttentionCore, str]:
    """Insert calls of ``self.<name>``, a :class:`KeyValueReduction`; returns the core, and where they went.

    ``image_tokens`` is how many of the captured keys are the image's (default: all). ``level`` (0 to ``LEVELS`` - 1)
    says how many of the better ways to leave out, because the owner does not follow fewer keys there.
    """
    total = core.key.meta["hint"].shape[-2]
    sizes = Sizes(image_tokens or total, total)
    to_key = _path(core, core.key, level, owner, sizes)
    to_value = _path(core, core.value, level, owner, sizes)
    if to_value is not None and to_value.rotations:
        to_value = None
    picked = to_key is None and is_rotated(core.key, owner)
    rotated = to_key is not None and bool(to_key.rotations)
    calls: dict[tuple[fx.Node, int], fx.Node] = {}
    for index, path in enumerate((to_key, to_value)):
        if path is not None:
            _reduce_path(graph, f"{name}.unrotated" if rotated else name, path, index, calls)
    if to_key is not None:
        for rotation in to_key.rotations:
            _reduce_rotation(graph, name, rotation, to_key)
    core = _reduce_at_core(_current(graph, core), graph, name, to_key, to_value, picked)
    if core.masked:
        core = _reduce_mask(core, graph, f"{name}.picked_mask" if picked else f"{name}.mask")
    graph.eliminate_dead_code(has_effect)
    graph.lint()
    return _current(graph, core), _place(to_key, to_value, picked)


def _path(core: AttentionCore, end: fx.Node, level: int, owner: nn.Module, sizes: Sizes) -> Path | None:
    others = [node for node in (core.query, core.key, core.value) if node is not end]
    if end in others or len(others) < 2:
        return None
    # The same keys may also serve another attention, or be given out or stored: those are whole.
    found = paths(end, [*others, *outcomes(core.node.graph)], owner, sizes, until=core.node)
    return found[level] if level < min(len(found), LEVELS - 1) else None


def _reduce_path(
    graph: fx.Graph, target: str, path: Path, index: int, calls: dict[tuple[fx.Node, int], fx.Node]
) -> None:
    """Let the users of a path take what becomes of its tokens as keys (``index`` 0) or as values (1)."""
    tokens, axis = path.tokens, path.axis
    if (tokens, axis) not in calls:
        with graph.inserting_after(tokens):
            calls[tokens, axis] = graph.call_module(target, (tokens, axis))
    with graph.inserting_after(calls[tokens, axis]):
        reduced = graph.call_function(operator.getitem, (calls[tokens, axis], index))
    for user in path.users:
        user.replace_input_with(tokens, reduced)


def _reduce_rotation(graph: fx.Graph, name: str, rotation: Rotation, path: Path) -> None:
    users = {factor: [user for user in factor.users if user in path.nodes] for factor in rotation.factors}
    first = min(user for each in users.values() for user in each)
    for node in needed(rotation.factors):  # hosts cut the sine to shape after they used the cosine
        if first < node:
            first.prepend(node)
    options: dict[str, Argument] = {"kind": rotation.kind, "axis": rotation.axis}
    with graph.inserting_before(first):
        reduced = graph.call_module(f"{name}.rotation", rotation.factors, options)
        new = [graph.call_function(operator.getitem, (reduced, index)) for index in range(len(users))]
    for factor, instead in zip(rotation.factors, new, strict=True):
        for user in users[factor]:
            user.replace_input_with(factor, instead)


def _reduce_at_core(
    core: AttentionCore, graph: fx.Graph, name: str, to_key: Path | None, to_value: Path | None, picked: bool
) -> AttentionCore:
    """What is left to do where the attention takes keys and values."""
    with graph.inserting_before(core.node):
        if picked:
            core = core.replace(key=graph.call_module(f"{name}.picked", (core.key,)))
        elif to_key is None:
            reduced = graph.call_module(name, (core.key,))
            core = core.replace(key=graph.call_function(operator.getitem, (reduced, 0)))
        elif to_key.rotations:
            core = core.replace(key=graph.call_module(f"{name}.blend", (core.key,)))
        if to_value is None:
            reduced = graph.call_module(name, (core.value,))
            core = core.replace(value=graph.call_function(operator.getitem, (reduced, 1)))
    return core


def _reduce_mask(core: AttentionCore, graph: fx.Graph, target: str) -> AttentionCore:
    with graph.inserting_before(core.node):
        reduced = graph.call_module(target, (core.mask, core.query, core.key, causal_of(core)))
        mask, causal = (graph.call_function(operator.getitem, (reduced, index)) for index in range(2))
    if core.causal:
        tell_causal(core, causal)
    return core.replace(mask=mask)


def _current(graph: fx.Graph, core: AttentionCore) -> AttentionCore:
    """The core with what it takes by now."""
    return next(each for each in attention_cores(graph) if each.node is core.node)


def _place(to_key: Path | None, to_value: Path | None, picked: bool) -> str:
    if to_key is not None and to_value is not None and to_key.above is not None and to_value.above is not None:
        where = f"above {to_key.above.target}, {to_value.above.target}"
    elif to_key is None and to_value is None:
        where = "at the attention's keys and values"
    else:
        where = ", ".join(dict.fromkeys((_where(to_key, "keys"), _where(to_value, "values"))))
    if picked:
        return f"{where}; keys: one in each window (their rotation is not recognised)"
    return f"{where}; keys rotated at the centre of their window" if to_key is not None and to_key.rotations else where


def _where(path: Path | None, what: str) -> str:
    if path is None:
        return f"at the attention's {what}"
    return f"above {path.above.target}" if path.above is not None else "below the projection"
