"""How a negative text comes to the sites that it guides: by keys and values at hand, or in a branch of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sloth_fx.capture.capture import Call
from sloth_fx.errors import SlothError
from sloth_fx.locate import Survey
from sloth_fx.model_adapters import Arguments
from sloth_fx.negative import Original
from sloth_fx.passes.core import AttentionCore
from sloth_fx.plan import Plan, SitePlan
from sloth_fx.planner import reads_text
from sloth_fx.site import AttentionSite


@dataclass(frozen=True)
class Guidance:
    """A plan with the way that the negative text takes.

    Where its keys and values can be had beforehand, ``numbers`` are those of all sites in the graph of the whole model;
    otherwise ``reason`` says why it needs a branch of its own.
    """

    plan: Plan
    numbers: dict[str, int]
    reason: str | None = None


def guidance_for(plan: Plan, found: Survey, call: Call) -> Guidance:
    """How the negative text comes to the sites that ``plan`` guides, if any.

    ``call`` is what the model was located with. Raises :class:`SlothError` where neither is possible.
    """
    sites = [each for each in plan.sites if each.guiding is not None]
    if not sites:
        return Guidance(plan, {})
    numbers = {site.name: index for index, site in enumerate(_softmax(found.sites))}
    reason = _why_not_beforehand(sites, numbers, found, call)
    if reason is None:
        return Guidance(plan, numbers)
    return Guidance(_branched(plan, found, reason), {}, reason)


def _softmax(sites: Sequence[AttentionSite]) -> list[AttentionSite]:
    return [site for site in sites if site.kind != "linear"]


def _why_not_beforehand(sites: Sequence[SitePlan], numbers: dict[str, int], found: Survey, call: Call) -> str | None:
    """Why the negative keys and values of ``sites`` are not the same at all steps, as far as can be proven."""
    joint = next((each.site for each in sites if each.site.kind == "joint"), None)
    if joint is not None:
        return f"{joint.name} is joint attention, whose text changes with the image"
    again = next((each.site for each in sites if len(found.visits[each.site.path]) > 1), None)
    if again is not None:
        return f"{again.path} is called several times in one run of the model"
    original = Original(found.skeleton)
    arguments = Arguments(found.skeleton.model, found.adapter)
    moving = [id(each) for each in (arguments.latent(*call), arguments.timestep(*call))]
    still = [name for name, each in original.labelled(call).items() if id(each) not in moving]
    try:
        keys, cores = original.slice(call, still)
    except SlothError as error:
        return str(error)
    if len(cores) != len(numbers):
        return f"of {len(numbers)} attentions {len(cores)} are recognised in the graph of the whole model"
    for each in sites:
        number = numbers[each.site.name]
        if number in keys.reasons:
            return f"{each.site.name}: {keys.reasons[number]}"
        if _tokens(cores[number]) != (each.site.q_tokens, each.site.kv_tokens):
            return f"{each.site.name} is another attention in the graph of the whole model"
    return None


def _tokens(core: AttentionCore) -> tuple[int, int]:
    return core.query.meta["hint"].shape[-2], core.key.meta["hint"].shape[-2]


def _branched(plan: Plan, found: Survey, reason: str) -> Plan:
    """The plan in which the negative text has rows of its own, which pass every site that reads text."""
    specs = {each.guiding for each in plan.sites if each.guiding is not None}
    if len(specs) > 1:
        raise SlothError(
            f"this model takes one NAG, and {len(specs)} are given: the negative text needs rows of its own ({reason})"
        )
    spec = specs.pop()
    first = plan.sites[0]
    planned = {each.site.name: each for each in plan.sites}
    for site in found.sites:
        if not reads_text(site):
            continue
        none = SitePlan(site=site, shallowest=first.shallowest, deepest=first.deepest)
        own = planned.get(site.name, none)
        if site.refusal is not None:
            raise SlothError(f"{site.name}: {site.refusal}; and the negative text would have to pass it ({reason})")
        if site.grid is None and not (site.query_place.alone and site.key_place.alone):
            raise SlothError(
                f"{site.name}: which of its tokens are the image's is not known at other sizes, and the negative text "
                f"would have to pass it ({reason})"
            )
        if own.merging is not None:
            raise SlothError(
                f"{site.name}: TokenMerging and NAG cannot both act here, because the negative text needs rows of its "
                f"own ({reason}): give them different sites with where="
            )
        planned[site.name] = replace(own, branching=spec)
    order = [site.name for site in found.sites if site.name in planned]
    notes = {name: note for name, note in plan.notes.items() if name not in planned or planned[name].specs}
    return Plan(tuple(planned[name] for name in order), notes)
