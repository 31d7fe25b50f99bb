"""The way of keys or values through the graph of an owner: from what is theirs alone to the attention.

Tokens may be reduced anywhere on that way as long as all that follows works on each token alone. What such operations
take from elsewhere, one value for each token, are the factors of a rotary embedding as a rule:

    key = self.norm_k(self.to_k(x).unflatten(-1, (heads, -1)))      the way, from x on
    key = key * cos + rotated_half(key) * sin                       factors: one rotation, of a pair
    key = torch.cat([text_key, key], dim=1)                         others, which are left alone
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

_SUMS = frozenset({"add", "sub", "iadd", "isub", "add_", "sub_"})
_PRODUCTS = frozenset({"mul", "imul", "mul_"})
_CASTS = frozenset({"to", "float", "half", "bfloat16", "type", "type_as", "contiguous"})
_SHAPES = frozenset(
    {"view", "reshape", "transpose", "permute", "unflatten", "flatten", "unsqueeze", "squeeze", "expand", "movedim"}
    | {"swapaxes", "swapdims", "unbind", "chunk", "split", "split_with_sizes", "getitem", "cat", "concat", "stack"}
    | {"view_as", "expand_as", "view_as_complex", "view_as_real", "repeat_interleave", "clone", "detach", "tuple"}
)
_ARITHMETIC = frozenset(
    {"neg", "negative", "pow", "square", "sqrt", "rsqrt", "truediv", "div", "mean", "sum", "rms_norm", "layer_norm"}
    | {"complex", "real", "imag", "setitem", "empty_like", "zeros_like", "dropout"}
)
_PER_TOKEN = _SUMS | _PRODUCTS | _CASTS | _SHAPES | _ARITHMETIC
_PER_TOKEN_MODULES = ("LayerNorm", "RMSNorm", "Norm", "Identity", "Dropout")


@dataclass(frozen=True)
class Sizes:
    """How many tokens the image has, and the sequence of keys that it is part of."""

    image: int
    total: int

    def axis(self, node: Any) -> int | None:
        """The axis of ``node`` along which the image's tokens lie, if there is exactly one."""
        hint = node.meta.get("hint") if isinstance(node, fx.Node) else None
        if not isinstance(hint, torch.Tensor) or self.total == 2 * self.image:  # as many others: no telling them apart
            return None
        axes = [axis for axis, size in enumerate(hint.shape) if size in (self.image, self.total)]
        return axes[0] if len(axes) == 1 else None


@dataclass(frozen=True)
class Rotation:
    """The factors that rotate keys, with the tokens along ``axis``: a "pair" (cosine and sine), or one "complex" or
    "matrix" (..., 2, 2)."""

    kind: str
    factors: tuple[fx.Node, ...]
    axis: int


@dataclass(frozen=True)
class Path:
    """``tokens`` (along ``axis``) may be reduced for all of ``users``, if ``rotations`` follow. ``above`` is the
    projection that this spares work."""

    tokens: fx.Node
    axis: int
    users: tuple[fx.Node, ...]
    nodes: dict[fx.Node, None]
    rotations: tuple[Rotation, ...]
    above: fx.Node | None


def paths(end: fx.Node, others: Iterable[fx.Node], owner: nn.Module, sizes: Sizes) -> list[Path]:
    """Where the tokens may be reduced that become ``end`` and none of ``others``: above the projection, and just before
    what rotates them. Best first; empty where something on the way is not known to work on each token alone."""
    shared: dict[fx.Node, None] = {}
    for other in others:
        shared.update(_behind(other))
    own = {node: None for node in _behind(end) if node not in shared}
    projected = _ahead(_projections(end, owner))
    starts = [
        node
        for node in own
        if node in projected
        and sizes.axis(node) is not None
        and not any(parent in own and parent in projected for parent in node.all_input_nodes)
    ]
    if len(starts) != 1:
        return []
    nodes = {node: None for node in _ahead(starts) if node in own}
    rotations = _rotations(nodes, starts[0], owner, sizes)
    if rotations is None or end not in nodes:
        return []
    found = [_above(starts[0], nodes, rotations, owner, sizes)]
    if rotations:
        found.append(_before_rotation(end, nodes, rotations, sizes))
    return [path for path in found if path is not None]


def is_rotated(end: fx.Node, owner: nn.Module, sizes: Sizes) -> bool:
    """Whether anything on the way to ``end`` takes a value for each token that does not come from the tokens."""
    projections = _projections(end, owner)
    projected = _ahead(projections)
    return any(
        sizes.axis(other) is not None and other not in projected
        for node in _behind(end)
        if node in projected and node not in projections
        for other in node.all_input_nodes
    )


def name_of(node: fx.Node) -> str:
    """What a node calls, without its module."""
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", node.target))


def _above(
    start: fx.Node, nodes: dict[fx.Node, None], rotations: tuple[Rotation, ...], owner: nn.Module, sizes: Sizes
) -> Path | None:
    if not _is_projection(start, owner):  # a part of what one projection makes for all
        return _path(start, nodes, rotations, sizes)
    inputs = start.all_input_nodes
    axis = sizes.axis(inputs[0]) if len(inputs) == 1 else None
    if axis != 1 or inputs[0].meta["hint"].ndim != 3:
        return None
    return Path(inputs[0], axis, (start,), nodes, rotations, start)


def _before_rotation(
    end: fx.Node, nodes: dict[fx.Node, None], rotations: tuple[Rotation, ...], sizes: Sizes
) -> Path | None:
    """The last node that all ways to the rotation lead through."""
    factors = {factor for rotation in rotations for factor in rotation.factors}
    rotating = [node for node in nodes if any(parent in factors for parent in node.all_input_nodes)]
    for gate in sorted(nodes, reverse=True):
        after = {node: None for node in _ahead([gate]) if node in nodes and node is not gate}
        if sizes.axis(gate) and end in (gate, *after) and all(node in after for node in rotating):
            ways = (parent for node in after for parent in node.all_input_nodes if parent in nodes)
            if all(parent is gate or parent in after or not _carries(parent) for parent in ways):
                return _path(gate, nodes, rotations, sizes)
    return None


def _carries(node: fx.Node) -> bool:
    return isinstance(node.meta.get("hint"), (torch.Tensor, tuple, list)) and not isinstance(
        node.meta["hint"], torch.Size
    )


def _path(node: fx.Node, nodes: dict[fx.Node, None], rotations: tuple[Rotation, ...], sizes: Sizes) -> Path | None:
    axis = sizes.axis(node)
    return Path(node, axis, tuple(node.users), nodes, rotations, None) if axis else None


def _rotations(
    nodes: dict[fx.Node, None], start: fx.Node, owner: nn.Module, sizes: Sizes
) -> tuple[Rotation, ...] | None:
    """What rotates the tokens on their way; ``None`` where something may mix them, or is not understood."""
    factors: dict[fx.Node, int] = {}
    for node in nodes:
        if node is start:
            continue
        if not _is_per_token(node, owner, sizes):
            return None
        for other in node.all_input_nodes:
            hint = other.meta.get("hint")
            if other in nodes or not isinstance(hint, torch.Tensor):
                continue
            if (axis := sizes.axis(other)) is not None:
                factors[other] = axis
            elif sizes.image in hint.shape or sizes.total in hint.shape:
                return None  # along which axis?
    return _grouped(factors, nodes)


def _grouped(factors: dict[fx.Node, int], nodes: dict[fx.Node, None]) -> tuple[Rotation, ...] | None:
    pairs: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if name_of(node) in _SUMS:
            terms = [_factor_of(term, factors) for term in node.args[:2]]
            if len(terms) == 2 and terms[0] is not None and terms[1] is not None:
                for one, other in (terms, reversed(terms)):
                    if pairs.setdefault(one, other) is not other:  # type: ignore[arg-type]
                        return None
    found: dict[frozenset[fx.Node], Rotation] = {}
    for factor, axis in factors.items():
        hint = factor.meta["hint"]
        if hint.is_complex():
            found[frozenset({factor})] = Rotation("complex", (factor,), axis)
        elif factor in pairs:
            other = pairs[factor]
            if other is factor or other.meta["hint"].shape != hint.shape:
                return None
            found.setdefault(frozenset({factor, other}), Rotation("pair", (factor, other), axis))
        elif hint.shape[-2:] == (2, 2) and axis < hint.ndim - 2:
            found[frozenset({factor})] = Rotation("matrix", (factor,), axis)
        else:
            return None
    return tuple(found.values())


def _factor_of(term: Any, factors: dict[fx.Node, int]) -> fx.Node | None:
    """The factor in a product of tokens and a factor."""
    while isinstance(term, fx.Node) and name_of(term) in _CASTS:
        term = term.args[0]
    if not isinstance(term, fx.Node) or name_of(term) not in _PRODUCTS:
        return None
    taken = [node for node in term.all_input_nodes if node in factors]
    return taken[0] if len(taken) == 1 else None


def _is_per_token(node: fx.Node, owner: nn.Module, sizes: Sizes) -> bool:
    hint = node.meta.get("hint")
    if node.op == "call_module":
        module = owner.get_submodule(str(node.target))
        return type(module).__name__.endswith(_PER_TOKEN_MODULES) and len(node.all_input_nodes) == 1
    if not isinstance(hint, torch.Tensor) and name_of(node) != "setitem":
        return node.target is getattr or not _carries(node) or name_of(node) in _SHAPES
    if name_of(node) not in _PER_TOKEN:
        return False
    return hint is None or sizes.axis(node) is not None or sizes.total - sizes.image in hint.shape


def _projections(end: fx.Node, owner: nn.Module) -> list[fx.Node]:
    """The last linear layers on the ways to ``end``."""
    behind = _behind(end)
    found = [node for node in behind if _is_projection(node, owner)]
    return [node for node in found if not any(later in found and later in behind for later in _after(node))]


def _after(node: fx.Node) -> list[fx.Node]:
    return [later for later in _ahead([node]) if later is not node]


def _is_projection(node: fx.Node, owner: nn.Module) -> bool:
    if node.op != "call_module":
        return False
    module = owner.get_submodule(str(node.target))
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def _behind(end: fx.Node) -> dict[fx.Node, None]:
    """``end``, all that it was computed from, and what was written into that."""
    found: dict[fx.Node, None] = {}
    waiting = [end]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found[node] = None
            waiting.extend(node.all_input_nodes)
            waiting.extend(user for user in node.users if _writes_into(user, node))
    return dict.fromkeys(sorted(found))


def _ahead(starts: Iterable[fx.Node]) -> dict[fx.Node, None]:
    """``starts``, and all that was computed from them or that they were written into."""
    found: dict[fx.Node, None] = {}
    waiting = list(starts)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found[node] = None
            waiting.extend(_users(node))
    return dict.fromkeys(sorted(found))


def _users(node: fx.Node) -> list[fx.Node]:
    written = [user.args[0] for user in node.users if user.target is operator.setitem and user.args[0] is not node]
    return [*node.users, *(target for target in written if isinstance(target, fx.Node))]


def _writes_into(user: fx.Node, node: fx.Node) -> bool:
    return user.target is operator.setitem and user.args[0] is node
