"""What one attention does: how many queries attend, how many keys each of them sees, and how many keys there are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sloth_fx.operators import KeyLayout
from sloth_fx.operators.merging import merged_tokens
from sloth_fx.plan import SitePlan
from sloth_fx.site import AttentionSite, LatentSize


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

    def times(self, count: int) -> Work:
        return Work(*(count * each for each in self))

    def plus(self, other: Work) -> Work:
        return Work(*(one + more for one, more in zip(self, other, strict=True)))


NOTHING = Work(0, 0, 0)


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


@dataclass(frozen=True)
class Tokens:
    """The tokens of a site: ``image`` ones, and the (queries, keys) that are ``others``; in each of ``sequences``
    windows, frames or pixel columns that are attended on their own. ``reads_image``: its keys have image tokens."""

    image: int
    others: tuple[int, int]
    reads_image: bool
    sequences: int

    @classmethod
    def at(cls, site: AttentionSite, latent: LatentSize, scale: float) -> Tokens:
        """Those of ``site`` for a ``latent`` of which a token at depth 1 is ``scale`` rows or columns."""
        grid = site.grid_at(latent)
        image, located = (math.prod(grid), math.prod(site.grid)) if grid is not None and site.grid else (0, 0)
        others = site.q_tokens - located, site.kv_tokens - (located if site.on_image else 0)
        return cls(image, others, site.on_image, _sequences(site, latent, scale) if grid is not None else 1)

    @property
    def whole(self) -> Work:
        """All queries see all keys."""
        queries = self.image + self.others[0]
        return Work(queries, queries * self._keys, self._keys).times(self.sequences)

    @property
    def apart(self) -> Work:
        """Each image token sees itself and the others, which see everything. An image token that sees nothing but
        itself takes no product."""
        if not any(self.others):
            return NOTHING
        pairs = self.image * (1 + self.others[1]) + self.others[0] * self._keys
        return Work(self.image + self.others[0], pairs, self._keys).times(self.sequences)

    def planned(self, plan: SitePlan, layout: KeyLayout) -> Work:
        """As ``plan`` has it."""
        return work_of(plan, layout, others=self.others).times(self.sequences)

    @property
    def _keys(self) -> int:
        return self.others[1] + (self.image if self.reads_image else 0)


def latent_per_token(sites: Sequence[AttentionSite]) -> float:
    """Latent rows or columns per token at depth 1."""
    whole = (site for site in sites if site.grid is not None and None not in (site.divisors or (None,))[-2:])
    return next((site.downscale / site.depth for site in whole), 1.0)


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
