"""From a plan to rewritten owners. Owners of equal structure share one capture, one graph and one function."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sloth_fx.bind import Form, TokenTest, Variant, Variants, held_objects, make_forward, read_form, unbound
from sloth_fx.capture import Skeleton, capture
from sloth_fx.capture.capture import Call, Capture
from sloth_fx.errors import SlothError
from sloth_fx.locate import Survey
from sloth_fx.plan import SitePlan
from sloth_fx.rewrite import Rewritten, operator_name, rewrite

Plans = dict[int, SitePlan]  # of one owner, by number of the attention call


@dataclass(frozen=True)
class PlannedVisit:
    """One way in which an owner is called, and what is to be done at its cores.

    ``number`` tells the visits of an owner apart; ``served`` are the numbers of the attention calls that it stands
    for, by core.
    """

    number: int
    call: Call
    resized: Call | None
    attentions: int
    plans: dict[int, SitePlan]
    served: dict[int, list[int]]
    tokens: TokenTest | None


@dataclass(frozen=True)
class RewrittenOwner:
    """What :func:`sloth_fx.bind.bind` gives an owner, but for the operator modules, which each site has for itself."""

    rewritten: list[Rewritten]
    forward: Callable[..., Any]


@dataclass
class OwnerRewriter:
    """Rewrites the owners of one surveyed model."""

    found: Survey
    _shared: dict[Hashable, RewrittenOwner] = field(default_factory=dict)

    def rewrite(self, path: str, plans: Plans) -> tuple[RewrittenOwner, list[PlannedVisit]]:
        """The owner at ``path``, rewritten. Raises :class:`SlothError` when it cannot be captured or rewritten."""
        owner = self.found.skeleton.model.get_submodule(path)
        visits = self._planned(path, plans)
        key = (
            self.found.structure[path],
            tuple(
                (v.tokens, *((core, *v.served[core], _deeds(plan)) for core, plan in v.plans.items())) for v in visits
            ),
        )
        if key not in self._shared:
            done = [_variant(self.found.skeleton, owner, visit) for visit in visits]
            planned = [variant.form for _, variant in done]
            forms = (read_form(*visit.call)[0] for visit in self.found.visits[path])
            variants = Variants(
                [variant for _, variant in done],
                held_objects(owner),
                _Recapture(visits),
                untouched=tuple(form for form in forms if form not in planned),
            )
            self._shared[key] = RewrittenOwner([rewritten for rewritten, _ in done], make_forward(variants))
        return self._shared[key], visits

    def _planned(self, path: str, plans: Plans) -> list[PlannedVisit]:
        """The visits of an owner for which something is planned, those alike taken together."""
        found: list[PlannedVisit] = []
        others: list[Call] = []
        first = 0
        resized = self.found.resized.get(self.found.structure[path], [])
        for index, visit in enumerate(self.found.visits[path]):
            here = {plan.site.core: plan for call, plan in plans.items() if first <= call < first + visit.attentions}
            served = {core: [first + core] for core in here}
            first += visit.attentions
            alike = next((each for each in found if _alike(each, visit.call, here)), None)
            if not here:
                others.append(visit.call)
            elif alike is not None:
                for core, calls in served.items():
                    alike.served[core] += calls
            else:
                again = resized[index].call if index < len(resized) else None
                found.append(PlannedVisit(len(found), visit.call, again, visit.attentions, here, served, None))
        return [_told_apart(visit, [v.call for v in found if v is not visit] + others) for visit in found]


def _deeds(plan: SitePlan) -> tuple[Any, ...]:
    """What of a plan is part of the graph."""
    merged = plan.merging is not None and plan.merged_tokens
    return (
        plan.reduces,
        plan.tiling is not None,
        merged,
        plan.guiding is not None,
        plan.branching is not None,
        type(plan.perturbing),
    )


def _per_sample(visit: PlannedVisit) -> bool:
    """Whether the same is done at all attentions of an owner, which then may be one for each sample of the batch."""
    plans = list(visit.plans.values())
    return len(plans) == visit.attentions > 1 and all(_same_work(plans[0], plan) for plan in plans)


def _same_work(plan: SitePlan, other: SitePlan) -> bool:
    return (
        (plan.specs, plan.branching) == (other.specs, other.branching)
        and (plan.site.grid, plan.site.divisors) == (other.site.grid, other.site.divisors)
        and (plan.site.query_place, plan.site.key_place) == (other.site.query_place, other.site.key_place)
    )


def _operators(plan: SitePlan) -> list[str]:
    """The deeds of the operators of a plan; in tiles, queries are merged by what tiles them."""
    tiles = plan.tiling is not None
    guides = plan.guiding is not None or plan.branching is not None
    merges = plan.merging is not None and not tiles
    perturbs = plan.perturbing is not None
    given = {"reduce": plan.reduces, "tile": tiles, "merge": merges, "guide": guides, "perturb": perturbs}
    return [deed for deed, there in given.items() if there]


def _alike(visit: PlannedVisit, call: Call, plans: dict[int, SitePlan]) -> bool:
    """Whether a call is one more of ``visit``: the same pattern and the same work on grids of the same size."""
    if _form(visit.call) != _form(call) or visit.plans.keys() != plans.keys():
        return False
    return all(_same_work(plan, other) for plan, other in zip(visit.plans.values(), plans.values(), strict=True))


def _form(call: Call) -> Form:
    return read_form(*call)[0]


def _told_apart(visit: PlannedVisit, others: list[Call]) -> PlannedVisit:
    """``visit`` with the test by which its calls are known, where the owner is called in other ways as well."""
    form, tensors = read_form(*visit.call)
    same = [read_form(*call)[1] for call in others if _form(call) == form]
    if not same:
        return visit
    for core, plan in visit.plans.items():
        tokens = plan.site.q_tokens
        for index, tensor in enumerate(tensors):
            for axis, size in enumerate(tensor.shape):
                if size == tokens and axis > 0 and all(other[index].shape[axis] != size for other in same):
                    test = TokenTest(index, axis, operator_name(_operators(plan)[0], core, visit.number))
                    return PlannedVisit(**{**vars(visit), "tokens": test})
    site = next(iter(visit.plans.values())).site
    raise SlothError(
        f"{site.name}: {site.owner} is called several times in one run of the model, with tokens that mean different "
        f"things, and {site.q_tokens} tokens do not tell these calls apart; give example_inputs of another size"
    )


@dataclass(frozen=True)
class _Recapture:
    """Captures an owner again, on its own, for a call that no capture of it covers: one for each branch of a text."""

    visits: list[PlannedVisit]

    def __call__(self, owner: nn.Module, calls: list[Call]) -> Variant | None:
        form, tensors = read_form(*calls[0])
        visits = sorted(self.visits, key=lambda visit: _form(visit.call) != form)  # those of this form first
        visit = next((v for v in visits if v.tokens is None or v.tokens.holds(owner, tensors)), None)
        if visit is None:
            return None
        skeleton = Skeleton(owner, tensors[0].device if tensors else None)
        fakes = [*map(skeleton.fake_inputs, calls), None]
        again = PlannedVisit(**{**vars(visit), "call": fakes[0], "resized": fakes[1]})
        return _variant(skeleton, unbound(skeleton.model), again, alike=len(calls) > 1)[1]


def _variant(
    skeleton: Skeleton, owner: nn.Module, visit: PlannedVisit, *, alike: bool = False
) -> tuple[Rewritten, Variant]:
    """``alike``: what is done has to be the same at both sizes of the visit."""
    captured = capture(skeleton, owner, visit.call, visit.resized)
    if alike:
        _check_alike(captured, visit)
    rewritten = rewrite(captured, skeleton, visit.plans, visit.attentions, visit.number, per_sample=_per_sample(visit))
    form, tensors = read_form(*visit.call)
    operators = [
        operator_name(deed, core, visit.number) for core, plan in visit.plans.items() for deed in _operators(plan)
    ]
    variant = Variant(
        form,
        rewritten.function,
        sizes=None if captured.any_size else [tensor.shape for tensor in tensors],
        types=None if captured.any_type else [(tensor.dtype, tensor.device) for tensor in tensors],
        training=None if captured.any_mode else owner.training,
        tokens=visit.tokens,
        neutral_is_original=tuple(operators) if captured.inexact else (),
        values=captured.values,
    )
    return rewritten, variant


def _check_alike(captured: Capture, visit: PlannedVisit) -> None:
    """Raise :class:`SlothError` where an owner does not do the same with the text and the negative text."""
    assert visit.resized is not None
    one, other = (read_form(*call)[1] for call in (visit.call, visit.resized))
    if captured.alike and all(torch.equal(value, other[index]) for index, value in captured.values.items()):
        return
    shapes = "; ".join(f"{tuple(a.shape)}, {tuple(b.shape)}" for a, b in zip(one, other, strict=True))
    raise SlothError(
        f"{type(captured.owner).__name__} does not compute the same for the text and the negative text ({shapes}), "
        "because its Python goes by what differs: pad both to the same length, with masks where it takes any"
    )
