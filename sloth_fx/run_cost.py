"""What the attentions of a model cost over a run: figures, and plain data."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

from sloth_fx.operators import KeyLayout
from sloth_fx.report import SiteReport
from sloth_fx.schedule import Moment
from sloth_fx.site import LatentSize
from sloth_fx.work import Work


@dataclass(frozen=True)
class SiteCost:
    """A site without operators (``before``), and at each of the ``steps``; ``layouts`` are ``None`` where nothing is
    planned. ``once`` is what a step takes without a second branch: ``steps`` have what both take."""

    site: SiteReport
    before: Work
    steps: tuple[Work, ...]
    layouts: tuple[KeyLayout | None, ...]
    once: tuple[Work, ...]

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
