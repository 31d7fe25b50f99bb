"""What attention costs over a sampling run, and what is left of it: counted, not measured.

Counted are the two matrix products of each attention, query with key and weight with value: 4 * head_dim operations
for each head and each pair of a query and a key that it sees, for one sample and one call of the model. Projections,
softmax, and the pooling itself are not. Memory is that of the keys and values that attention takes, each once,
however many tiles see it, and for as many heads as there are of queries. A negative text counts as many tokens as the
text has.

Of guidance by perturbed attention the perturbed branch is counted as well, while it acts, for a sample that is guided:

- all attentions from the first perturbed site on are counted once more, with what other operators do there; all of the
  model where no call can serve both branches, and always for SAG;
- a perturbed site counts once more as a whole for SEG, TPG and Perturb, whatever its function does. PAG takes no
  product where image tokens are alone; where there are others, each image token sees itself and these, which see
  everything. What SLG leaves out is not counted;
- the map that SAG reads is not.

Where a negative text has a branch of its own all of the model is counted once more, with both texts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from sloth_fx.checks import between, require
from sloth_fx.errors import SlothError
from sloth_fx.inspection import context, report
from sloth_fx.perturbed import NAME as PERTURBED
from sloth_fx.phases import Phases
from sloth_fx.plan import SitePlan, clocks
from sloth_fx.planner import make_plan
from sloth_fx.report import SiteReport
from sloth_fx.run_cost import RunCost, SiteCost
from sloth_fx.schedule import Moment
from sloth_fx.second_branch import asked_again, is_perturbed, with_negative_text, with_perturbed_branch
from sloth_fx.site import LatentSize
from sloth_fx.spec import PerturbationSpec, Perturbing, Spec
from sloth_fx.transform import transform
from sloth_fx.work import Tokens, Work, latent_per_token, work_of

__all__ = ["RunCost", "SiteCost", "Work", "estimate", "work_of"]

COUNT = between(1, 1_000_000, whole=True)


def estimate(
    model: nn.Module,
    spec: Spec | Sequence[Spec],
    latent: Sequence[int],
    *,
    steps: int,
    phases: int | None = None,
    strict: bool = True,
    text: int | None = None,
    number_bytes: int | None = None,
    example_inputs: Any = None,
) -> RunCost:
    """What the attention of ``model`` costs over a run, without and with ``spec``.

    The model is transformed and not run, and may lie on ``meta``. Step i of n is at progress i / n.

    Args:
        model, spec, phases, strict, example_inputs: as for :func:`sloth_fx.transform`.
        latent: (rows, columns) or (frames, rows, columns) of the latent, in its own units (packed ones count tokens).
        steps: of the run, 1 or more.
        text: number of text tokens, 1 or more. Default: as many as the model was located with.
        number_bytes: size of one number of a key in bytes, default: that of the model's weights.

    Raises:
        SlothError: what :func:`sloth_fx.transform` raises, and for numbers that make no sense.
    """
    if text is not None:
        require("text", text, COUNT)
    patched = transform(model, spec, example_inputs=example_inputs, strict=strict, phases=phases)
    found = report(patched)
    if not found.sites:
        raise SlothError(f"the inputs of {found.model} are not known: give example_inputs")
    size = _latent_size(latent)
    specs: list[Any] = list(spec) if isinstance(spec, (list, tuple)) else [spec]
    plans = _plans(specs, found.sites, strict)
    moments = _moments(patched, steps)
    at = _in_phases(moments, phases, list(plans.values()))
    counted = [site for site in found if site.kind != "linear" and not (site.on_image and site.grid_at(size) is None)]
    counted = [_with_text(site, text) for site in counted]
    tokens = [Tokens.at(site, size, latent_per_token(found.sites)) for site in counted]
    sites = tuple(
        _site_cost(site, plans.get(site.name), at, size, own) for site, own in zip(counted, tokens, strict=True)
    )
    if context(patched).branched:
        sites = with_negative_text(sites, shares=context(patched).shares)
    perturbing = _perturbing(specs)
    if perturbing is not None:
        shares = bool(getattr(patched.get_submodule(PERTURBED), "shares", False))
        again = asked_again(found.sites, perturbing, shares=shares)
        branched = context(patched).branched
        sites = with_perturbed_branch(sites, perturbing, at, tokens, again, branched=branched)
    layouts = [tuple(each.layouts[step] for each in sites if each.site.name in plans) for step in range(steps)]
    names = {site.name for site in counted}
    return RunCost(
        model=found.model,
        latent=size,
        moments=moments,
        sites=sites,
        uncounted=tuple(site for site in found if site.name not in names),
        number_bytes=number_bytes or next((p.element_size() for p in model.parameters() if p.is_floating_point()), 4),
        graphs=len(set(layouts)),
        block_graphs=len({layout for each in layouts for layout in each}),
    )


def _perturbing(specs: Sequence[Spec]) -> Perturbing | None:
    return next((each for each in specs if isinstance(each, PerturbationSpec)), None)


def _plans(specs: Sequence[Spec], sites: Sequence[SiteReport], strict: bool) -> dict[str, SitePlan]:
    """The plans of the sites where something acts, by name; also of those in blocks that SLG leaves out."""
    spec = _perturbing(specs)
    plans = {plan.site.name: plan for plan in make_plan(specs, sites, strict=strict).sites}
    for site in sites:
        if spec is not None and is_perturbed(site, spec):
            plan = plans.get(site.name) or SitePlan(site=site, shallowest=site, deepest=site.depth)
            plans[site.name] = replace(plan, perturbing=spec)
    return {site.name: plans[site.name] for site in sites if site.operators and site.name in plans}


def _site_cost(
    site: SiteReport, plan: SitePlan | None, moments: Sequence[Moment], latent: LatentSize, tokens: Tokens
) -> SiteCost:
    before = tokens.whole
    if plan is None:
        works = (before,) * len(moments)
        return SiteCost(site, before, works, (None,) * len(moments), works)
    layouts = tuple(plan.layout(moment, latent) for moment in moments)
    if site.kind == "cross":  # which is guided, and nothing else
        twice = Work(before.queries, 2 * before.pairs, 2 * before.stored)
        works = tuple(twice if layout.guided else before for layout in layouts)
    elif site.grid is None:  # text that attends to itself, in a block that is left out
        works = (before,) * len(layouts)
    else:
        works = tuple(tokens.planned(plan, layout) for layout in layouts)
    return SiteCost(site, before, works, layouts, works)


def _with_text(site: SiteReport, text: int | None) -> SiteReport:
    """The site with another number of text tokens."""
    if text is None or site.text is None:
        return site
    more = text - (site.text[1] - site.text[0])
    image = math.prod(site.grid) if site.grid is not None else 0
    both = site.kind != "cross" and site.q_tokens == site.kv_tokens and site.q_tokens > image
    return replace(
        site,
        kv_tokens=site.kv_tokens + more,
        q_tokens=site.q_tokens + (more if both else 0),
        text=(site.text[0], site.text[0] + text),
    )


def _latent_size(latent: Sequence[int]) -> LatentSize:
    for length in latent:
        require("latent", length, COUNT)
    if len(latent) not in (2, 3):
        raise SlothError(f"latent={tuple(latent)}: give (rows, columns) or (frames, rows, columns)")
    frames, rows, columns = (1, *latent)[-3:]
    return LatentSize(frames, rows, columns)


def _moments(patched: nn.Module, steps: int) -> tuple[Moment, ...]:
    require("steps", steps, COUNT)
    clock, moments = context(patched), []
    for step in range(steps):
        clock.step(step, steps)
        moments.append(clock.moment)
    return tuple(moments)


def _in_phases(moments: Sequence[Moment], count: int | None, plans: Sequence[SitePlan]) -> Sequence[Moment]:
    """The moments that steps are evaluated at."""
    if count is None:
        return moments
    phases = Phases(count, by_sigma="sigma" in clocks(plans))
    return [phases.middle(phases.number(moment)) for moment in moments]
