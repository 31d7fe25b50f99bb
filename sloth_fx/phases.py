"""Time cut into phases: all that happens in one is done as if it were its middle, and is one compiled graph."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sloth_fx.schedule import Moment


@dataclass(frozen=True)
class Phases:
    """``count`` equal parts of the run, on the clock that the plans follow.

    That clock is progress, or for ``by_sigma`` how far ln sigma has come from 2.8 to -2.2, the span in which the
    release of 2023-12-11 measures time.
    """

    count: int
    by_sigma: bool

    def number(self, moment: Moment) -> int:
        """The phase, from 0 to count - 1, in which a moment lies."""
        time = moment.progress
        if self.by_sigma:
            sigma = moment.sigma or 0.0
            time = 1 - min(max((math.log(sigma) + 2.2) / 5, 0.0), 1.0) if sigma > 0 else 1.0
        return min(int(time * self.count), self.count - 1)

    def middle(self, phase: int) -> Moment:
        """The moment at which all of a phase is evaluated."""
        time = (phase + 0.5) / self.count
        return Moment(time, math.exp(5 * (1 - time) - 2.2) if self.by_sigma else None)
