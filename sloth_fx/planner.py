"""Which spec acts at which site, and what cannot be: decided before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from sloth_fx.errors import SlothError
from sloth_fx.plan import Plan, SitePlan, level_of
from sloth_fx.site import AttentionSite
from sloth_fx.spec import (
    NAG,
    HyperTile,
    NearSightedAttention,
    NearSightedTile,
    SlothfulAttention,
    Spec,
    TokenDownsample,
    TokenMerging,
)
from sloth_fx.where import matches, nearest

# The fields of a SitePlan that each spec fills, and what is done there, for the error when two want the same.
_ROLES: dict[type[Spec], tuple[str, ...]] = {
    SlothfulAttention: ("reducing",),
    NearSightedAttention: ("reducing", "tiling"),
    NearSightedTile: ("tiling",),
    HyperTile: ("tiling",),
    TokenDownsample: ("downsampling",),
    TokenMerging: ("merging",),
    NAG: ("guiding",),
}
_DEEDS = {
    "reducing": "reduce the keys of",
    "tiling": "tile",
    "downsampling": "thin out",
    "merging": "merge tokens of",
    "guiding": "guide",
}


def make_plan(specs: Sequence[Spec], sites: Sequence[AttentionSite], *, strict: bool = True) -> Plan:
    """Which spec acts where.

    Raises :class:`SlothError` for a spec that acts nowhere, for two that conflict, and with ``strict`` for a site that
    a selector names and whose grid is not known.
    """
    images = [site for site in sites if site.on_image]
    readers = [site for site in sites if reads_text(site)]
    if not images and any(not isinstance(spec, NAG) for spec in specs):
        raise SlothError(
            f"these operators need softmax self-attention or joint attention of image tokens, and this model has none "
            f"(it has: {_kinds(sites)})"
        )
    if not readers and any(isinstance(spec, NAG) for spec in specs):
        raise SlothError(
            "NAG needs cross-attention or joint attention of image tokens to text, and this model has none (it has: "
            f"{_kinds(sites)})"
        )
    spatial = [site for site in images if site.kind != "temporal"] or images or readers
    shallowest = min(spatial, key=lambda site: site.depth)
    deepest = max(site.depth for site in spatial)
    fit = {site.name: site for site in sites if site in images or site in readers}
    plans = {name: SitePlan(site=site, shallowest=shallowest, deepest=deepest) for name, site in fit.items()}
    notes = {site.name: why_left_alone(site) for site in sites if not site.on_image}
    for spec in specs:
        chosen = _selected(spec, sites, readers if isinstance(spec, NAG) else images)
        unfit = {site.name: reason for site in chosen if (reason := _unfit(spec, site)) is not None}
        if len(unfit) == len(chosen):
            raise SlothError(
                f"{type(spec).__name__} acts on no site that it selects: " + _few(map(": ".join, unfit.items()))
            )
        if strict and spec.where is not None:
            for site in chosen:
                if site.name in unfit and site.grid is None:
                    raise SlothError(f"{site.name}: {unfit[site.name]}; select others with where=, or strict=False")
        for site in chosen:
            if site.name not in unfit:
                plans[site.name] = _with(plans[site.name], spec)
        notes.update(unfit)
    for name, plan in plans.items():
        if plan.specs:
            notes.pop(name, None)
        else:
            acts = any(acts_on(spec, plan.site) for spec in specs)
            notes.setdefault(name, "not selected by where" if acts else f"{plan.site.kind}-attention")
    return Plan(tuple(plan for plan in plans.values() if plan.specs), notes)


def acts_on(spec: Spec, site: AttentionSite) -> bool:
    """Whether a spec acts on what a site does, unless ``where`` leaves it out."""
    return reads_text(site) if isinstance(spec, NAG) else site.on_image


def reads_text(site: AttentionSite) -> bool:
    """Whether image tokens attend to text here."""
    return site.kind in ("cross", "joint") and site.text is not None and site.image_queries


def why_left_alone(site: AttentionSite) -> str:
    """Why no operator acts at a site that is not image tokens attending to image tokens."""
    if site.kind == "linear":
        return (
            "linear attention: it has no softmax over the keys and costs the same for each token, so there is nothing "
            "for fewer keys or tiles to save"
        )
    return (
        f"{site.kind}-attention" if site.kind == "cross" else f"{site.kind}-attention of other tokens than the image's"
    )


def _selected(spec: Spec, sites: Sequence[AttentionSite], images: list[AttentionSite]) -> list[AttentionSite]:
    chosen = [site for site in images if matches(spec.where, site)]
    if chosen:
        return chosen
    others = [site for site in sites if matches(spec.where, site)]
    if others:
        acts_on = (
            "cross-attention and joint attention to text"
            if isinstance(spec, NAG)
            else "self-attention and joint attention of image tokens"
        )
        raise SlothError(
            f"{type(spec).__name__} acts on {acts_on}, and where={spec.where!r} selects none: "
            f"{_few(site.name for site in others)} are {_kinds(others)}-attention"
        )
    raise SlothError(
        f"{type(spec).__name__}: where={spec.where!r} matches no site; nearest: {_few(nearest(spec.where, images))}"
    )


def _unfit(spec: Spec, site: AttentionSite) -> str | None:
    """Why a spec that selects a site does nothing there."""
    name = type(spec).__name__
    if site.refusal is not None:
        return site.refusal
    if isinstance(spec, NAG):
        return None
    if site.grid is None:
        return f"{name} needs rows and columns, and the grid of its {site.q_tokens} tokens is unknown"
    if isinstance(spec, (SlothfulAttention, NearSightedAttention)):
        if isinstance(spec, SlothfulAttention) and site.stage == "middle" and spec.keep_middle:
            return "middle block, kept (keep_middle)"
        reduction = spec.reduction(site.stage)
        if site.kind == "temporal" and (reduction is None or reduction.temporal == 1):
            return f"temporal attention, reduced over frames only ({name} has temporal=1)"
        return None
    if site.kind == "temporal":
        return f"temporal attention: it has no rows and columns for {name}"
    if isinstance(spec, NearSightedTile) and not spec.tiles(site.downscale):
        return f"{site.downscale:g} times coarser than the latent, so not tiled (max_depth={spec.max_depth})"
    level = level_of(site)
    if isinstance(spec, HyperTile) and not spec.tiles(level):
        return f"attention level {level}, so not tiled (max_depth={spec.max_depth})"
    if isinstance(spec, TokenMerging) and not spec.merges(level):
        return f"attention level {level}, so not merged (max_depth={spec.max_depth})"
    if isinstance(spec, TokenDownsample) and spec.factor(level) == 1:
        return f"attention level {level}, left whole (factors={spec.factors})"
    return None


def _with(plan: SitePlan, spec: Spec) -> SitePlan:
    for role in _ROLES[type(spec)]:
        if role == "tiling" and plan.site.kind == "temporal":
            continue
        taken = getattr(plan, role)
        if taken is not None:
            raise SlothError(
                f"{type(taken).__name__} and {type(spec).__name__} both {_DEEDS[role]} {plan.site.name}: "
                "give them different sites with where="
            )
        filled: dict[str, Any] = {role: spec}
        plan = replace(plan, **filled)
    return plan


def _kinds(sites: Iterable[AttentionSite]) -> str:
    return ", ".join(dict.fromkeys(site.kind for site in sites))


def _few(names: Iterable[str], limit: int = 4) -> str:
    listed = list(names)
    return ", ".join(listed[:limit]) + (f", ... ({len(listed)} in all)" if len(listed) > limit else "")
