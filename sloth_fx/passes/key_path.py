"""The way of keys or values through the graph of an owner: from what is theirs alone to the attention.

Tokens may be reduced anywhere on that way as long as all that follows works on each token alone. What such operations
take from elsewhere, one value for each token, are the factors of a rotary embedding as a rule:

    key = self.norm_k(self.to_k(x).unflatten(-1, (heads, -1)))      the way, from x on
    key = key * cos + rotated_half(key) * sin                       factors: one rotation, of a pair
    key = torch.cat([text_key, key], dim=1)                         others, which are left alone
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from sloth_fx.passes.token_axis import Sizes, TokenAxes
from sloth_fx.passes.walk import ahead, behind, carries, is_projection, name_of, needed, projections, tensor_of

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
_JOINING = frozenset(
    {"cat", "concat", "type_as", "view_as", "expand_as", "to"}
)  # others, and what lends a type or shape
_PER_TOKEN_MODULES = ("LayerNorm", "RMSNorm", "Identity", "Dropout")


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


def paths(
    end: fx.Node, others: Iterable[fx.Node], owner: nn.Module, sizes: Sizes, until: fx.Node | None = None
) -> list[Path]:
    """Where the tokens may be reduced that become ``end`` and none of ``others``: above the projection, and just before
    what rotates them. Best first; empty where something on the way is not known to work on each token alone.

    What the others take from ``until``, the attention itself, does not count."""
    shared = {node for other in others for node in behind(other, until)}
    own = {node: None for node in behind(end) if node not in shared}
    sources = projections(end, owner)
    axes, projected = TokenAxes(sizes, sources), ahead(sources)
    ours = {node: None for node in own if node in projected}
    starts = [
        node
        for node in ours
        if axes.of(node) is not None and not any(parent in ours for parent in node.all_input_nodes)
    ]
    if len(starts) != 1 or _takes_factors(starts[0], sources, axes):  # rotated before it is theirs alone
        return []
    nodes = {node: None for node in ahead(starts) if node in own}
    rotations = _rotations(nodes, starts[0], owner, axes)
    if rotations is None or end not in nodes:
        return []
    found = [_from_start(starts[0], nodes, rotations, owner, axes)]
    if rotations:
        found.append(_before_rotation(end, nodes, rotations, axes))
    return [path for path in found if path is not None]


def is_rotated(end: fx.Node, owner: nn.Module) -> bool:
    """Whether anything on the way to ``end`` takes a tensor that does not come from tokens, such as the factors of a
    rotation. Parameters do not count, nor what is the same for all tokens."""
    sources = projections(end, owner)
    projected = ahead(sources)
    return any(
        other not in projected
        and other.op != "get_attr"
        and (hint := tensor_of(other)) is not None
        and hint.numel() > 1
        for node in behind(end)
        if node in projected and node not in sources and name_of(node) not in _JOINING
        for other in node.all_input_nodes
    )


def _takes_factors(end: fx.Node, sources: list[fx.Node], axes: TokenAxes) -> bool:
    projected = ahead(sources)
    return any(
        other not in projected and axes.of_operand(other, node) is not None
        for node in behind(end)
        if node in projected and node not in sources
        for other in node.all_input_nodes
    )


def _from_start(
    start: fx.Node, nodes: dict[fx.Node, None], rotations: tuple[Rotation, ...], owner: nn.Module, axes: TokenAxes
) -> Path | None:
    if not is_projection(start, owner):  # a part of what one projection makes for all
        return _path(start, nodes, rotations, axes)
    source = start.all_input_nodes[0]
    hint = tensor_of(source)
    if len(start.all_input_nodes) != 1 or hint is None or hint.ndim != 3 or axes.of(start) != 1:
        return None
    return Path(source, 1, (start,), nodes, rotations, start)


def _before_rotation(
    end: fx.Node, nodes: dict[fx.Node, None], rotations: tuple[Rotation, ...], axes: TokenAxes
) -> Path | None:
    """The last node that all ways to the rotation lead through."""
    factors = {factor for rotation in rotations for factor in rotation.factors}
    rotating = [node for node in nodes if any(parent in factors for parent in node.all_input_nodes)]
    for gate in sorted(nodes, reverse=True):
        after = {node: None for node in ahead([gate]) if node in nodes and node is not gate}
        leads = axes.of(gate) and end in (gate, *after) and all(node in after for node in rotating)
        # Nothing may go round the gate, not even a size that was read above it.
        if leads and not any(node in nodes and node not in after for node in needed(after, until=gate)):
            return _path(gate, nodes, rotations, axes)
    return None


def _path(node: fx.Node, nodes: dict[fx.Node, None], rotations: tuple[Rotation, ...], axes: TokenAxes) -> Path | None:
    axis = axes.of(node)
    return Path(node, axis, tuple(node.users), nodes, rotations, None) if axis else None


def _rotations(
    nodes: dict[fx.Node, None], start: fx.Node, owner: nn.Module, axes: TokenAxes
) -> tuple[Rotation, ...] | None:
    """What rotates the tokens on their way; ``None`` where something may mix them, or is not understood."""
    factors: dict[fx.Node, int] = {}
    for node in nodes:
        if node is start:
            continue
        if not _is_per_token(node, owner, axes):
            return None
        for other in node.all_input_nodes:
            axis = axes.of_operand(other, node) if other not in nodes else None
            if axis is not None and factors.setdefault(other, axis) != axis:
                return None
    rotating = [node for node in nodes if any(other in factors for other in node.all_input_nodes)]
    rotated = ahead(rotating)
    if any(node in rotated and not node < min(rotating) for node in needed(factors)):  # made of what they rotate
        return None
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


def _is_per_token(node: fx.Node, owner: nn.Module, axes: TokenAxes) -> bool:
    if node.op == "call_module":
        module = owner.get_submodule(str(node.target))
        return type(module).__name__.endswith(_PER_TOKEN_MODULES) and len(node.all_input_nodes) == 1
    hint = tensor_of(node)
    if hint is None:
        return not carries(node) or name_of(node) in _PER_TOKEN
    others = axes.sizes.total - axes.sizes.image
    return name_of(node) in _PER_TOKEN and (axes.of(node) is not None or others in hint.shape)
