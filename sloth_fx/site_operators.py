"""The operator modules that a rewritten graph calls at a site."""

from __future__ import annotations

import math

from sloth_fx.operators import KeyLayout
from sloth_fx.passes.attention_map import AttentionMap
from sloth_fx.passes.guide import GuidedAttention
from sloth_fx.passes.merge_tokens import MergedAttention
from sloth_fx.passes.one_image import BesideText, BranchedAttention, GuidedResult, SharedImage
from sloth_fx.passes.perturb import PerturbedAttention
from sloth_fx.passes.reduce_kv import KeyValueReduction
from sloth_fx.passes.tile_queries import TiledAttention
from sloth_fx.plan import SitePlan
from sloth_fx.rewrite import Rewritten, merged_attention, merging_of, operator_name
from sloth_fx.site import AttentionSite, Place
from sloth_fx.spec import SAG

Operator = (
    KeyValueReduction
    | TiledAttention
    | MergedAttention
    | GuidedAttention
    | SharedImage
    | GuidedResult
    | BranchedAttention
    | PerturbedAttention
    | AttentionMap
)


def make_operators(rewritten: Rewritten, plan: SitePlan, visit: int) -> dict[str, Operator]:
    """The operator modules of one site, by the names under which the rewritten graph calls them."""
    site, grid = plan.site, plan.site.grid
    neutral = KeyLayout((1, site.q_tokens))
    if grid is not None:
        neutral = KeyLayout((grid[-2], grid[-1]), frames=grid[0] if len(grid) > 2 else 1)
    operators: dict[str, Operator] = _guides(rewritten, plan, visit, neutral)
    if plan.perturbing is not None:
        kind = AttentionMap if isinstance(plan.perturbing, SAG) else PerturbedAttention
        operators[operator_name("perturb", site.core, visit)] = kind(
            site.name,
            rewritten.attend[site.core],
            plan.perturbing,
            neutral,
            folded_heads=rewritten.folded_heads[site.core],
            query_place=site.query_place,
            key_place=site.key_place,
        )
    if plan.reduces:
        name = operator_name("reduce", site.core, visit)
        operators[name] = KeyValueReduction(site.name, plan.pooling, neutral, site.key_place)
    if plan.tiling is not None:
        operators[operator_name("tile", site.core, visit)] = TiledAttention(
            site.name,
            rewritten.attend[site.core],
            neutral,
            folded_heads=rewritten.folded_heads[site.core],
            concat_local=getattr(plan.tiling, "concat_local", False),
            concat_global=getattr(plan.tiling, "concat_global", False),
            query_place=site.query_place,
            key_place=site.key_place,
            border=plan.pooling.border,
            merging=merging_of(plan) if plan.merging is not None else None,
        )
    elif plan.merging is not None:
        operators[operator_name("merge", site.core, visit)] = merged_attention(
            plan, rewritten.attend[site.core], rewritten.folded_heads[site.core], neutral
        )
    return operators


def _guides(rewritten: Rewritten, plan: SitePlan, visit: int, neutral: KeyLayout) -> dict[str, Operator]:
    """The operators by which a negative text guides a site."""
    site, core = plan.site, plan.site.core
    beside = _beside_text(site)
    name, folded_heads = operator_name("guide", core, visit), rewritten.folded_heads[core]
    if plan.branching is not None:
        share = SharedImage(
            site.name,
            neutral,
            query_place=site.query_place,
            key_place=site.key_place if site.on_image else None,
            others=_without_text(site),
            beside=beside,
            border=plan.pooling.border,
        )
        result = GuidedResult(
            site.name,
            plan.guiding,
            neutral,
            query_place=site.query_place,
            folded_heads=folded_heads,
            others=_without_text(site),
            beside=beside,
        )
        made: dict[str, Operator] = {operator_name("share", core, visit): share, name: result}
        if plan.attends_branches:
            made[operator_name("attend", core, visit)] = BranchedAttention(rewritten.attend[core], neutral)
        return made
    if plan.guiding is not None:
        attend = rewritten.attend[core]
        return {name: GuidedAttention(site.name, attend, plan.guiding, neutral, folded_heads=folded_heads)}
    return {}


def _without_text(site: AttentionSite) -> tuple[bool, bool]:
    """Whether there are tokens before the image, and after it, none of which is text."""
    image = math.prod(site.grid) if site.grid is not None else site.kv_tokens
    if site.text is None or site.kind != "joint" or site.key_place.alone or site.q_tokens != site.kv_tokens:
        return False, False
    start = site.key_place.start(site.kv_tokens, image)
    end = start + image
    return 0 < start <= site.text[0], site.text[1] <= end < site.kv_tokens


def _beside_text(site: AttentionSite) -> BesideText | None:
    """Where the image lies if it is counted from the side of the text, where it is not known otherwise."""
    place = site.key_place
    if site.text is None or site.grid is None or site.q_tokens != site.kv_tokens or place.others is None:
        return None
    image = math.prod(site.grid)
    start = place.start(site.kv_tokens, image)
    after = site.text[0] >= start + image
    offset = site.kv_tokens - start - image if after else start
    return BesideText(Place(offset, from_end=after, alone=False), site.text[1] - site.text[0])
