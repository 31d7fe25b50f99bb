"""What attention costs over a sampling run, and what is left of it: counted, not measured.

Counted are the two matrix products of each attention, query with key and weight with value: 4 * head_dim operations
for each head and each pair of a query and a key that it sees, for one sample and one call of the model. Projections,
softmax, and the pooling itself are not. Memory is that of the keys and values that attention takes, each once,
however many tiles see it, and for as many heads as there are of queries. A negative text counts as many tokens as the
text has. What guidance by perturbed attention asks the model once more is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple

from torch import nn

from sloth_fx.checks import between, require
from sloth_fx.errors import SlothError
from sloth_fx.inspection import context, report
from sloth_fx.operators import KeyLayout
from sloth_fx.operators.merging import merged_tokens
from sloth_fx.phases import Phases
from sloth_fx.plan import SitePlan, clocks
from sloth_fx.planner import make_plan
from sloth_fx.report import SiteReport
from sloth_fx.schedule import Moment
from sloth_fx.site import AttentionSite, LatentSize
from sloth_fx.spec import Spec
from sloth_fx.transform import transform

COUNT = between(1, 1_000_000, whole=True)
_APART = frozenset(
    {"NearSightedTile", "NearSightedAttention", "HyperTile", "TokenMerging"}
)  # at most once in each branch


class Work(NamedTuple):
    """What one attention does for one sample: ``queries`` that attend, ``pairs`` of a query and a key it sees, and
    ``stored`` keys; of one head, and of all windows or frames that are attended each on their own."""

    queries: int
    pairs: int
    stored: int

    @property
    def keys(self) -> float:
        """Keys that a query sees, on the average."""
        return self.pairs / max(self.queries, 1)


@dataclass(frozen=True)
class SiteCost:
    """A site without operators (``before``), and at each step; ``layouts`` are ``None`` where nothing is planned."""

    site: SiteReport
    before: Work
    steps: tuple[Work, ...]
    layouts: tuple[KeyLayout | None, ...]

    @property
    def channels(self) -> int:
        """Numbers in a query, of all heads together."""
        return self.site.heads * self.site.head_dim

    def flops(self, work: Work) -> int:
        """Operations of both products."""
        return 4 * self.channels * work.pairs

    def numbers(self, work: Work) -> int:
        """How many numbers all keys and values hold."""
        return 2 * self.channels * work.stored


@dataclass(frozen=True, kw_only=True)
class RunCost:
    """What the attentions of a model cost, for one sample, over a run of ``len(moments)`` steps.

    ``uncounted`` are the sites left out: linear attention, and image tokens of which the grid is not known.
    ``number_bytes`` is the size of one number in bytes. ``graphs`` is how many graphs ``torch.compile`` makes of the
    whole model in this run, ``block_graphs`` how many of its blocks where these are compiled one by one.
    """

    model: str
    latent: LatentSize
    moments: tuple[Moment, ...]
    sites: tuple[SiteCost, ...]
    uncounted: tuple[SiteReport, ...]
    number_bytes: int
    graphs: int
    block_graphs: int

    def flops_before(self) -> int:
        """Of one step, without operators."""
        return sum(each.flops(each.before) for each in self.sites)

    def flops(self, step: int) -> int:
        """Of one step (0 to ``len(moments)`` - 1)."""
        return sum(each.flops(each.steps[step]) for each in self.sites)

    def bytes_before(self) -> int:
        """Of the keys and values of all attentions in one step, without operators."""
        return self.number_bytes * sum(each.numbers(each.before) for each in self.sites)

    def bytes(self, step: int) -> int:
        """Of the keys and values of all attentions in one step."""
        return self.number_bytes * sum(each.numbers(each.steps[step]) for each in self.sites)

    @property
    def flops_left(self) -> float:
        """The share of the operations of all attentions that is left, over the whole run."""
        steps = len(self.moments)
        return sum(map(self.flops, range(steps))) / max(steps * self.flops_before(), 1)

    @property
    def bytes_left(self) -> float:
        """The share of the keys and values of all attentions that is left, over the whole run."""
        steps = len(self.moments)
        return sum(map(self.bytes, range(steps))) / max(steps * self.bytes_before(), 1)

    def spans(self) -> list[range]:
        """The steps, cut where some layout changes."""
        by_layouts = groupby(range(len(self.moments)), key=lambda step: [each.layouts[step] for each in self._planned])
        return [range(steps[0], steps[-1] + 1) for steps in (list(group) for _, group in by_layouts)]

    def groups(self) -> list[list[SiteCost]]:
        """The sites in order of execution, those that cost the same throughout taken together."""
        groups: dict[Any, list[SiteCost]] = {}
        for each in self.sites:
            site = each.site
            kind = site.kind, site.stage, site.grid_at(self.latent), site.operators, each.channels
            groups.setdefault((*kind, each.before, each.steps, each.layouts), []).append(each)
        return list(groups.values())

    @property
    def _planned(self) -> list[SiteCost]:
        return [each for each in self.sites if each.layouts[0] is not None]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON; operations (``flops``) and bytes are per step, and for one sample."""
        return {
            "model": self.model,
            "latent": list(self.latent),
            "number_bytes": self.number_bytes,
            "graphs": self.graphs,
            "block_graphs": self.block_graphs,
            "flops_left": self.flops_left,
            "bytes_left": self.bytes_left,
            "unpatched": {"flops": self.flops_before(), "bytes": self.bytes_before()},
            "steps": [
                {**moment._asdict(), "flops": self.flops(step), "bytes": self.bytes(step)}
                for step, moment in enumerate(self.moments)
            ],
            "sites": [_site_dict(each) for each in self.sites],
            "uncounted": [site.to_dict() for site in self.uncounted],
        }


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
    acting = {site.name for site in found if site.operators}
    plans = {plan.site.name: plan for plan in make_plan(specs, found.sites, strict=strict).sites}
    plans = {name: plan for name, plan in plans.items() if name in acting}
    moments = _moments(patched, steps)
    at = _in_phases(moments, phases, list(plans.values()))
    scale = _latent_per_token(found.sites)
    counted = [site for site in found if site.kind != "linear" and not (site.on_image and site.grid_at(size) is None)]
    sites = tuple(_site_cost(_with_text(site, text), plans.get(site.name), at, size, scale) for site in counted)
    if context(patched).branched:
        sites = _with_branches(sites, shares=context(patched).shares)
    layouts = [tuple(each.layouts[step] for each in sites if each.site.name in plans) for step in range(steps)]
    return RunCost(
        model=found.model,
        latent=size,
        moments=moments,
        sites=sites,
        uncounted=tuple(site for site in found if site not in counted),
        number_bytes=number_bytes or next((p.element_size() for p in model.parameters() if p.is_floating_point()), 4),
        graphs=len(set(layouts)),
        block_graphs=len({layout for each in layouts for layout in each}),
    )


def work_of(plan: SitePlan, layout: KeyLayout, *, others: tuple[int, int] = (0, 0)) -> Work:
    """What a site does at a moment with this ``layout``; ``others`` are the (queries, keys) of other tokens.

    Image queries see the keys of their tile, the samples and the others; other queries all keys but the samples.
    """
    border = plan.pooling.border
    merging, queries, pairs = plan.merging, 0, 0
    for rows, columns in layout.groups():
        tokens = rows.size * columns.size
        if merging is not None and plan.merged_tokens != "kv":
            tokens -= merged_tokens((rows.size, columns.size), merging.cell, merging.ratio)
        here = layout.frames * rows.tiles * columns.tiles * tokens
        queries += here
        pairs += here * (layout.local_tokens((rows, columns), border) + layout.sample_tokens(border) + others[1])
    stored = layout.gathered_tokens(border) + others[1]
    if merging is not None and plan.merged_tokens != "q":  # nothing else is done to the keys then
        away = layout.frames * merged_tokens(layout.grid, merging.cell, merging.ratio)
        stored -= away
        pairs -= queries * away
    return Work(queries + others[0], pairs + others[0] * (stored - layout.sample_tokens(border)), stored)


def _site_cost(
    site: SiteReport, plan: SitePlan | None, moments: Sequence[Moment], latent: LatentSize, scale: float
) -> SiteCost:
    grid = site.grid_at(latent)
    image, located = (math.prod(grid), math.prod(site.grid)) if grid is not None and site.grid else (0, 0)
    others = site.q_tokens - located, site.kv_tokens - (located if site.on_image else 0)
    keys = others[1] + (image if site.on_image else 0)
    queries = image + others[0]
    times = _sequences(site, latent, scale) if grid is not None else 1
    before = Work(*(times * each for each in (queries, queries * keys, keys)))
    if plan is None:
        return SiteCost(site, before, (before,) * len(moments), (None,) * len(moments))
    layouts = tuple(plan.layout(moment, latent) for moment in moments)
    if site.kind == "cross":  # which is guided, and nothing else
        twice = Work(before.queries, 2 * before.pairs, 2 * before.stored)
        return SiteCost(site, before, tuple(twice if layout.guided else before for layout in layouts), layouts)
    works = [work_of(plan, layout, others=others) for layout in layouts]
    return SiteCost(site, before, tuple(Work(*(times * each for each in work)) for work in works), layouts)


def _with_branches(sites: Sequence[SiteCost], *, shares: bool) -> tuple[SiteCost, ...]:
    """The sites of a model that runs in two branches while any of them is guided."""
    by_step = zip(*(each.layouts for each in sites), strict=True)
    guided = [any(layout is not None and layout.guided for layout in layouts) for layouts in by_step]

    def in_both(cost: SiteCost) -> SiteCost:
        once = [cost.before if cost.site.kind == "cross" else work for work in cost.steps]
        steps = [_twice(cost.site, work, shares) if two else work for work, two in zip(once, guided, strict=True)]
        return replace(cost, steps=tuple(steps))

    return tuple(map(in_both, sites))


def _twice(site: SiteReport, work: Work, shares: bool) -> Work:
    """What a site does in two branches. Where these share the image, it attends to itself once (twice, if attention has
    a mask, which is not known here)."""
    if shares and site.kind != "cross" and site.text is None:
        return work
    if not shares or site.kind != "joint" or _APART.intersection(site.operators):
        return Work(*(2 * each for each in work))
    text = site.text[1] - site.text[0] if site.text is not None else 0
    queries = text if site.q_tokens == site.kv_tokens else 0
    image = Work(work.queries - queries, (work.queries - queries) * (work.stored - text), work.stored - text)
    return Work(work.queries + queries, 2 * work.pairs - image.pairs, work.stored + text)


def _sequences(site: AttentionSite, latent: LatentSize, scale: float) -> int:
    """How many windows, frames or pixel columns of one sample are attended each on their own; 1 for the whole."""
    assert site.grid is not None
    assert site.divisors is not None
    count = 1
    missing = 3 - len(site.grid)  # frames that the host makes part of the batch
    divisors = (None,) * missing + site.divisors
    for length, tokens, divisor, per_token in zip(
        latent, (1,) * missing + site.grid, divisors, (1, scale * site.depth, scale * site.depth), strict=True
    ):
        count *= 1 if divisor is not None else math.ceil(math.ceil(length / per_token) / tokens)
    return count


def _latent_per_token(sites: Sequence[AttentionSite]) -> float:
    """Latent rows or columns per token at depth 1."""
    whole = (site for site in sites if site.grid is not None and None not in (site.divisors or (None,))[-2:])
    return next((site.downscale / site.depth for site in whole), 1.0)


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
        moments.append(Moment(clock.progress, clock.sigma))
    return tuple(moments)


def _in_phases(moments: Sequence[Moment], count: int | None, plans: Sequence[SitePlan]) -> Sequence[Moment]:
    """The moments that steps are evaluated at."""
    if count is None:
        return moments
    phases = Phases(count, by_sigma="sigma" in clocks(plans))
    return [phases.middle(phases.number(moment)) for moment in moments]


def _site_dict(cost: SiteCost) -> dict[str, Any]:
    def plain(work: Work) -> dict[str, Any]:
        return {**work._asdict(), "keys": work.keys, "flops": cost.flops(work), "kv_numbers": cost.numbers(work)}

    return {
        **cost.site.to_dict(),
        "unpatched": plain(cost.before),
        "steps": [
            {**plain(work), "layout": layout._asdict() if layout is not None else None}
            for work, layout in zip(cost.steps, cost.layouts, strict=True)
        ],
    }
