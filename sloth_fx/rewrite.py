"""Step three: a captured graph and what is wanted at its attentions become a rewritten graph and its function."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from sloth_fx.capture import Capture
from sloth_fx.capture.generate import generate
from sloth_fx.capture.recorder import evaluate
from sloth_fx.capture.skeleton import Skeleton, quiet
from sloth_fx.errors import SlothError
from sloth_fx.operators import KeyLayout
from sloth_fx.passes.canonicalise import canonicalise
from sloth_fx.passes.core import Attend, AttentionCore, attention_cores
from sloth_fx.passes.guide import branch, guide
from sloth_fx.passes.merge_tokens import MergedAttention, Merging, merge_tokens, rotates
from sloth_fx.passes.perturb import perturb
from sloth_fx.passes.reduce_kv import LEVELS, KeyValueReduction, reduce_kv
from sloth_fx.passes.simplify import simplify
from sloth_fx.passes.tile_queries import tile_queries
from sloth_fx.plan import SitePlan


@dataclass(frozen=True)
class Rewritten:
    """A rewritten owner: ``function(self, *tensors)`` and the graph it was generated from.

    Per core: ``done`` says what was inserted and where, ``attend`` is the host's attention, and ``folded_heads`` how
    many heads it folds into the batch (``None``: they have a dimension of their own). ``inexact`` tells that the
    function does the same as the owner's forward, but not to the last bit.
    """

    graph: fx.Graph
    function: Callable[..., Any]
    done: dict[int, str]
    attend: dict[int, Attend]
    folded_heads: dict[int, int | None]
    inexact: bool


def operator_name(deed: str, core: int, visit: int) -> str:
    """The name, as a child of its owner, of the operator that does ``deed`` at a core of an owner's visit."""
    return f"sloth_{deed}_{core}" + (f"_visit_{visit}" if visit else "")


def rewrite(
    capture: Capture,
    skeleton: Skeleton,
    plans: Mapping[int, SitePlan],
    attentions: int,
    visit: int = 0,
    *,
    per_sample: bool = False,
) -> Rewritten:
    """Apply ``plans`` (by number of the core) to the graph of ``capture``, whose owner computes ``attentions``.

    ``per_sample`` allows another number of them: they are all alike, and the host may compute one for each sample.
    Raises :class:`SlothError` where the graph has no such attention, or one that the operators do not fit.
    """
    canonicalise(capture.graph)
    simplify(capture.graph)
    for level in range(LEVELS):
        graph = copy.deepcopy(capture.graph)
        cores = attention_cores(graph)
        if len(cores) != attentions and per_sample and cores:
            plans = {core: plans[min(core, attentions - 1)] for core in range(len(cores))}
        elif len(cores) != attentions:
            raise SlothError(
                f"{type(capture.owner).__name__} computes attention {attentions} times, and in its graph {len(cores)} "
                "are recognised"
            )
        done = {core: _apply(plan, cores[core], graph, capture.owner, level, visit) for core, plan in plans.items()}
        if level == LEVELS - 1 or _shapes_fit(graph, capture.owner, skeleton):
            break
    return Rewritten(
        graph=graph,
        function=generate(graph, type(capture.owner).__name__),
        done=done,
        attend={core: cores[core].attend for core in plans},
        folded_heads={core: _folded_heads(plan, cores[core]) for core, plan in plans.items()},
        inexact=capture.inexact,
    )


def _apply(plan: SitePlan, core: AttentionCore, graph: fx.Graph, owner: nn.Module, level: int, visit: int) -> str:
    """Run the passes that one plan asks for on one core."""
    site = plan.site
    if core.refusal is not None:
        raise SlothError(f"{site.name}: {core.refusal}")
    done = []
    keys = core.key.meta["hint"].shape[-2]
    tokens = keys if site.key_place.alone or site.grid is None else math.prod(site.grid)
    rotated = plan.merging is not None and rotates(core, owner)
    if plan.branching is None and plan.guiding is not None:
        return guide(graph, core, operator_name("guide", site.core, visit))
    if plan.reduces:
        name = operator_name("reduce", site.core, visit)
        trial = KeyLayout((1, tokens), window=(1, 2))  # does the owner follow fewer keys?
        owner.add_module(name, KeyValueReduction(site.name, plan.pooling, trial, site.key_place))
        core, place = reduce_kv(graph, core, name, owner, image_tokens=tokens, level=level)
        done.append(f"keys and values reduced {place}")
    if plan.branching is not None:
        share, result, attend = (operator_name(deed, site.core, visit) for deed in ("share", "guide", "attend"))
        core = branch(graph, core, share, result, attend if plan.attends_branches else None)
        done.append("guided by a negative text in a branch of its own" if plan.guiding is not None else "not guided")
    if plan.perturbing is not None:
        done.append(perturb(graph, core, operator_name("perturb", site.core, visit), plan.perturbing))
    if plan.tiling is not None:
        name = operator_name("tile", site.core, visit)
        done.append(f"queries tiled {tile_queries(graph, core, name, rotated=rotated)}")
        if plan.merging is not None:
            done.append("queries merged in each tile")
    elif plan.merging is not None:
        name = operator_name("merge", site.core, visit)
        owner.add_module(name, merged_attention(plan, core.attend, _folded_heads(plan, core), KeyLayout((1, tokens))))
        merged = merge_tokens(graph, core, name, owner, image_tokens=tokens, tokens=plan.merged_tokens, level=level)
        done.append(merged)
    return ", ".join(done)


def merged_attention(plan: SitePlan, attend: Attend, folded_heads: int | None, layout: KeyLayout) -> MergedAttention:
    """The operator that merges the tokens of a site."""
    assert plan.merging is not None
    return MergedAttention(
        plan.site.name,
        attend,
        layout,
        merging_of(plan),
        folded_heads=folded_heads,
        query_place=plan.site.query_place,
        key_place=plan.site.key_place,
    )


def merging_of(plan: SitePlan) -> Merging:
    assert plan.merging is not None
    return Merging(plan.merging.ratio, plan.merging.cell, plan.merged_tokens)


def _folded_heads(plan: SitePlan, core: AttentionCore) -> int | None:
    return plan.site.heads if core.query.meta["hint"].ndim == 3 else None


def _shapes_fit(graph: fx.Graph, owner: nn.Module, skeleton: Skeleton) -> bool:
    """Whether the graph runs when the keys really are fewer (a host may reshape them by the number of queries)."""
    try:
        with quiet():
            for node in graph.nodes:
                target = str(node.target) if node.op == "call_module" else ""
                if target.startswith("sloth_share"):
                    node.meta["hint"] = tuple(each.meta["hint"] for each in node.args)
                elif target.startswith(("sloth_tile", "sloth_guide", "sloth_attend", "sloth_perturb")):
                    node.meta["hint"] = node.args[0].meta["hint"]
                elif node.op not in ("placeholder", "output"):
                    node.meta["hint"] = evaluate(node, owner, skeleton.mode)
    except (RuntimeError, ValueError, TypeError):
        return False
    return True
