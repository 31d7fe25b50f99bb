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
    PAG,
    SAG,
    SEG,
    SLG,
    TPG,
    HyperTile,
    NearSightedAttention,
    NearSightedTile,
    Perturb,
    PerturbationSpec,
    Perturbing,
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
    **dict.fromkeys((PAG, SEG, TPG, Perturb, SAG), ("perturbing",)),
}
_DEEDS = {
    "reducing": "reduce the keys of",
    "tiling": "tile",
    "downsampling": "thin out",
    "merging": "merge tokens of",
    "guiding": "guide",
    "perturbing": "perturb",
}


def make_plan(specs: Sequence[Spec], sites: Sequence[AttentionSite], *, strict: bool = True) -> Plan:
    """Which spec acts where. ``SLG`` acts on blocks, not on sites (``sloth_fx/skipping.py``).

    Raises :class:`SlothError` for a spec that acts nowhere, for two that conflict, and with ``strict`` for a site that
    a selector names and whose grid is not known.
    """
    _check_one_perturbs(specs)
    specs = [spec for spec in specs if not isinstance(spec, SLG)]
    images = [site for site in sites if site.on_image]
    readers = [site for site in sites if reads_text(site)]
    if not images and any(not isinstance(spec, NAG | PerturbationSpec) for spec in specs):
        raise SlothError(
            f"these operators need softmax self-attention or joint attention of image tokens, and this model has none "
            f"(it has: {_kinds(sites)})"
        )
    if not readers and any(isinstance(spec, NAG) for spec in specs):
        raise SlothError(
            "NAG needs cross-attention or joint attention of image tokens to text, and this model has none (it has: "
            f"{_kinds(sites)})" + _where_text_is_not_known(sites)
        )
    spatial = [site for site in images if site.kind != "temporal"] or images or readers or list(sites)
    shallowest = min(spatial, key=lambda site: site.depth)
    deepest = max(site.depth for site in spatial)
    fit = {site.name: site for site in sites if site in images or site in readers}
    plans = {name: SitePlan(site=site, shallowest=shallowest, deepest=deepest) for name, site in fit.items()}
    notes = {site.name: why_left_alone(site) for site in sites if not site.on_image}
    for spec in specs:
        chosen, remark = _selected(spec, sites, readers if isinstance(spec, NAG) else images)
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
                plans[site.name] = _with(plans[site.name], spec, remark)
        notes.update(unfit)
    plans = {name: _of_perturbed_tokens(plan) for name, plan in plans.items()}
    _check_acts(specs, plans.values())
    for name, plan in plans.items():
        if plan.specs:
            notes.pop(name, None)
        else:
            acts = any(acts_on(spec, plan.site) for spec in specs)
            notes.setdefault(name, "not selected by where" if acts else f"{plan.site.kind}-attention")
    return Plan(tuple(plan for plan in plans.values() if plan.specs), notes)


def acts_on(spec: Spec, site: AttentionSite) -> bool:
    """Whether a spec acts on what a site does, unless ``where`` leaves it out."""
    if isinstance(spec, PerturbationSpec):
        return site.on_image and site.kind in ("self", "joint")
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


def _check_one_perturbs(specs: Sequence[Spec]) -> None:
    names = [type(spec).__name__ for spec in specs if isinstance(spec, PerturbationSpec)]
    if len(names) > 1:
        raise SlothError(
            f"{' and '.join(names)}: each is a perturbed prediction of its own that is steered away from, and a call "
            "of the model has one; give one of them (Perturb takes a function of your own)"
        )
    mixing = (getattr(spec, "concat_local", False) or getattr(spec, "concat_global", False) for spec in specs)
    if names and any(mixing):
        raise SlothError(
            f"{names[0]} asks about some rows of the batch once more, and with concat_local or concat_global "
            "images attend to each other: give one of the two"
        )


def _of_perturbed_tokens(plan: SitePlan) -> SitePlan:
    """A perturbed site has all its keys and queries: nothing but a negative text comes to them."""
    others = [spec for spec in plan.specs if not isinstance(spec, PerturbationSpec | NAG)]
    if plan.perturbing is None or not others:
        return plan
    gone = dict.fromkeys(("reducing", "downsampling", "tiling", "merging"))
    names = " and ".join(dict.fromkeys(type(spec).__name__ for spec in others))
    return replace(plan, **gone, remark=f"{plan.remark}, without {names}")  # type: ignore[arg-type]


def _check_acts(specs: Sequence[Spec], plans: Iterable[SitePlan]) -> None:
    acting = [spec for plan in plans for spec in plan.specs]
    for spec in specs:
        if not any(each is spec for each in acting):
            perturbing = next(type(each).__name__ for each in specs if isinstance(each, PerturbationSpec))
            raise SlothError(
                f"{type(spec).__name__} acts on no site but those that {perturbing} perturbs, where all keys are "
                "needed: give them different sites with where="
            )


def _middle_block(sites: Sequence[AttentionSite]) -> tuple[list[AttentionSite], str]:
    """The sites of the block in the middle of a stack, where all have the same depth; of a UNet none."""
    blocks = list(dict.fromkeys(block_of(site.path) for site in sites))
    if len({site.depth for site in sites}) > 1 or None in blocks:
        return [], ""
    block = blocks[len(blocks) // 2]
    return [site for site in sites if block_of(site.path) == block], f", in the middle of {len(blocks)} blocks"


def block_of(path: str) -> str | None:
    """The block of a stack that holds a module: the path down to the last number above it, or to its own."""
    parts = path.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdecimal()]
    above = [index for index in numbers if index + 1 < len(parts)] or numbers
    return ".".join(parts[: above[-1] + 1]) if above else None


def _selected(
    spec: Spec, sites: Sequence[AttentionSite], images: list[AttentionSite]
) -> tuple[list[AttentionSite], str]:
    """The sites that a spec selects, and a remark for the report."""
    chosen, remark = [site for site in images if matches(spec.where, site)], ""
    if isinstance(spec, PerturbationSpec):
        able = [site for site in images if acts_on(spec, site)]
        if not able:
            raise SlothError(
                f"{type(spec).__name__} perturbs self-attention or joint attention of image tokens, and this model has "
                f"none (it has: {_kinds(sites)})"
            )
        if not chosen and spec.where == "middle":
            chosen, remark = _middle_block(able)
        if isinstance(spec, SAG):
            chosen = [site for site in chosen if acts_on(spec, site)][:1] or chosen
    if chosen:
        return chosen, remark
    others = [site for site in sites if matches(spec.where, site)]
    if others:
        kinds = (
            "cross-attention and joint attention to text"
            if isinstance(spec, NAG)
            else "self-attention and joint attention of image tokens"
        )
        raise SlothError(
            f"{type(spec).__name__} acts on {kinds}, and where={spec.where!r} selects none: "
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
    if isinstance(spec, PerturbationSpec):
        return _unfit_to_perturb(spec, site)
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


def _unfit_to_perturb(spec: Perturbing, site: AttentionSite) -> str | None:
    name = type(spec).__name__
    if not acts_on(spec, site):
        return f"{site.kind}-attention: {name} perturbs self-attention and joint attention of image tokens"
    if site.grid is not None or (site.query_place.alone and site.key_place.alone and not isinstance(spec, SEG | SAG)):
        return None
    return f"{name} needs rows and columns, and the grid of its {site.q_tokens} tokens is unknown"


def _with(plan: SitePlan, spec: Spec, remark: str) -> SitePlan:
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
    return replace(plan, remark=plan.remark + remark)


def _kinds(sites: Iterable[AttentionSite]) -> str:
    return ", ".join(dict.fromkeys(site.kind for site in sites))


def _where_text_is_not_known(sites: Iterable[AttentionSite]) -> str:
    if not any(site.kind == "joint" and site.text is None for site in sites):
        return ""
    return "; of its joint attention no range of tokens is known to be text, as where a host embeds words by itself"


def _few(names: Iterable[str], limit: int = 4) -> str:
    listed = list(names)
    return ", ".join(listed[:limit]) + (f", ... ({len(listed)} in all)" if len(listed) > limit else "")
