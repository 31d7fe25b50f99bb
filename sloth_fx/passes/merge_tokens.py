"""Let the attention work on merged tokens, and give its result back to all of them.

    out = attend(query, key, value)     ->     out = self.sloth_merge_0(query, key, value, metric=x)

Where nothing lies between one tensor of tokens and the attention but the three projections and what works on each token
alone, tokens are merged above the projections, which then have less to do:

    query, key, value = self.to_q(x), ...      merged = self.sloth_merge_0.tokens(x)
    out = attend(query, key, value)       ->   query, key, value = self.to_q(merged[0]), ...
                                               out = self.sloth_merge_0.unmerged(attend(...), merged[1], merged[2])
"""

from __future__ import annotations

import operator

from torch import fx, nn

from sloth_fx.capture.recorder import has_effect
from sloth_fx.passes.causal import causal_of
from sloth_fx.passes.core import AttentionCore
from sloth_fx.passes.key_path import Path, is_rotated, paths
from sloth_fx.passes.merging import MergedAttention, Merging
from sloth_fx.passes.token_axis import Sizes
from sloth_fx.passes.walk import tensor_of

__all__ = ["MergedAttention", "Merging", "merge_tokens"]


def merge_tokens(
    graph: fx.Graph,
    core: AttentionCore,
    name: str,
    owner: nn.Module,
    *,
    image_tokens: int | None = None,
    tokens: str = "all",
    level: int = 0,
) -> str:
    """Insert ``self.<name>``, a :class:`MergedAttention`, and return where it went.

    ``image_tokens`` is how many of the captured keys are the image's (default: all), ``tokens`` which are merged:
    "all", "q" or "kv". From ``level`` 1 on they are merged at the attention, because the owner does not follow fewer.
    """
    keys, queries = tensor_of(core.key), core.query.meta["hint"]
    total = (keys if keys is not None else queries).shape[-2]  # the keys of a reduction have no hint
    sizes = Sizes(image_tokens or total, total)
    roles = core.query, core.key, core.value
    found = [_path(end, roles, owner, sizes) for end in roles]
    merged = {"all": "queries, keys and values", "q": "queries", "kv": "keys and values"}[tokens]
    shared = _shared(found)
    if shared is not None and tokens == "all" and level == 0 and sizes.image == total and not core.masked:
        where = f"tokens merged above {_merge_above(graph, core, name, shared)}"
    else:
        rotated = rotates(core, owner)
        _merge_at_core(graph, core, name, found[1], rotated)
        where = f"{merged} merged at the attention"
        where += " (rotated queries and keys are those of their destination)" if rotated else ""
    graph.eliminate_dead_code(has_effect)
    graph.lint()
    return where


def rotates(core: AttentionCore, owner: nn.Module) -> bool:
    """Whether the queries or keys of a core have a rotary embedding, so that no two of them have a mean."""
    return any(is_rotated(end, owner) for end in (core.query, core.key))


def _path(end: fx.Node, roles: tuple[fx.Node, ...], owner: nn.Module, sizes: Sizes) -> Path | None:
    others = [node for node in roles if node is not end]
    found = paths(end, others, owner, sizes) if len(others) == 2 else []
    return next((path for path in found if path.above is not None), None)


def _shared(found: list[Path | None]) -> list[Path] | None:
    """The three paths, if they start from the same tokens and rotate nothing."""
    there = [path for path in found if path is not None]
    alike = len(there) == 3 and len({path.tokens for path in there}) == 1
    return there if alike and not any(path.rotations for path in there) else None


def _merge_above(graph: fx.Graph, core: AttentionCore, name: str, found: list[Path]) -> str:
    tokens = found[0].tokens
    with graph.inserting_after(tokens):
        call = graph.call_module(f"{name}.tokens", (tokens,))
    with graph.inserting_after(call):
        merged, target = (graph.call_function(operator.getitem, (call, index)) for index in (0, 1))
    call.append(target)
    call.append(merged)
    for path in found:
        for user in path.users:
            user.replace_input_with(tokens, merged)
    with graph.inserting_after(core.node):
        result = graph.call_module(f"{name}.unmerged", (core.node, target))
    core.node.replace_all_uses_with(result, lambda user: user is not result)
    return ", ".join(str(path.above.target) for path in found if path.above is not None)


def _merge_at_core(graph: fx.Graph, core: AttentionCore, name: str, to_key: Path | None, rotated: bool) -> None:
    options = {**core.options, "rotated": rotated}
    if to_key is not None:
        options["metric"] = to_key.tokens
    with graph.inserting_before(core.node):
        merged = graph.call_module(name, (core.query, core.key, core.value, core.mask, causal_of(core)), options)
    core.node.replace_all_uses_with(merged)
    graph.erase_node(core.node)
