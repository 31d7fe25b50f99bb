"""What the attentions of a model cost where it has two branches: for a negative text, or to be asked once more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sloth_fx.perturbation_specs import PAG, SLG, PerturbationSpec
from sloth_fx.report import SiteReport
from sloth_fx.run_cost import SiteCost
from sloth_fx.schedule import Moment
from sloth_fx.work import NOTHING, Tokens, Work

# What is done once in each branch.
_APART = frozenset({"NearSightedTile", "NearSightedAttention", "HyperTile", "TokenMerging"})


def with_negative_text(sites: Sequence[SiteCost], *, shares: bool) -> tuple[SiteCost, ...]:
    """The sites of a model that runs in two branches while any of them is guided."""
    guided = _guided(sites)

    def in_both(cost: SiteCost) -> SiteCost:
        once = [cost.before if cost.site.kind == "cross" else work for work in cost.steps]
        steps = [_twice(cost.site, work, shares) if two else work for work, two in zip(once, guided, strict=True)]
        return replace(cost, steps=tuple(steps), once=tuple(once))

    return tuple(map(in_both, sites))


def with_perturbed_branch(
    sites: Sequence[SiteCost],
    spec: PerturbationSpec,
    moments: Sequence[Moment],
    tokens: Sequence[Tokens],
    again: frozenset[str],
    *,
    branched: bool,
) -> tuple[SiteCost, ...]:
    """The sites of a model of which those named in ``again`` are asked once more while ``spec`` acts; ``tokens`` are
    those of each site. Where a negative text has a branch of its own (``branched``), all are while it guides, and a
    perturbed site is spoilt for each text."""
    acting = [spec.acts(moment) for moment in moments]
    guided = [branched and there for there in _guided(sites)]

    def in_both(cost: SiteCost, tokens: Tokens) -> SiteCost:
        def more(work: Work, once: Work, guides: bool) -> Work:
            if is_perturbed(cost.site, spec):
                return _perturbed(spec, once, tokens).times(1 if work == once else 2)
            return work if guides or cost.site.name in again else NOTHING

        steps = zip(cost.steps, cost.once, guided, acting, strict=True)
        found = (work.plus(more(work, once, guides)) if acts else work for work, once, guides, acts in steps)
        return replace(cost, steps=tuple(found))

    return tuple(map(in_both, sites, tokens))


def _guided(sites: Sequence[SiteCost]) -> list[bool]:
    """At which steps a negative text guides."""
    by_step = zip(*(each.layouts for each in sites), strict=True)
    return [any(layout is not None and layout.guided for layout in layouts) for layouts in by_step]


def asked_again(sites: Sequence[SiteReport], spec: PerturbationSpec, *, shares: bool) -> frozenset[str]:
    """The names of the sites, given in order of execution, that run in the perturbed branch: from the first one on that
    is perturbed, or, unless one call ``shares`` what both branches have in common, all."""
    first = next((index for index, site in enumerate(sites) if is_perturbed(site, spec)), 0) if shares else 0
    return frozenset(site.name for site in sites[first:])


def is_perturbed(site: SiteReport, spec: PerturbationSpec) -> bool:
    """Whether a site is spoilt, or left out, in the perturbed branch; SAG reads its map there."""
    return type(spec).__name__ in site.operators


def _perturbed(spec: PerturbationSpec, work: Work, tokens: Tokens) -> Work:
    """What a perturbed site does in the perturbed branch, in place of ``work``."""
    if isinstance(spec, SLG):
        return NOTHING
    return tokens.apart if isinstance(spec, PAG) else work


def _twice(site: SiteReport, work: Work, shares: bool) -> Work:
    """What a site does in two branches. Where these share the image, it attends to itself once (twice, if attention has
    a mask, which is not known here)."""
    if shares and site.kind != "cross" and site.text is None:
        return work
    if not shares or site.kind != "joint" or _APART.intersection(site.operators):
        return work.times(2)
    text = site.text[1] - site.text[0] if site.text is not None else 0
    queries = text if site.q_tokens == site.kv_tokens else 0
    image = Work(work.queries - queries, (work.queries - queries) * (work.stored - text), work.stored - text)
    return Work(work.queries + queries, 2 * work.pairs - image.pairs, work.stored + text)
