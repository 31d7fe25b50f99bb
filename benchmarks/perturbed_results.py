"""What is stored of guidance by perturbed attention, as numbers with intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from backgrounds import backgrounds
from numpy.typing import NDArray
from perturbed_points import settings, tiers
from quality_measures import MEASURES
from quality_points import UNPATCHED, Point, Series
from quality_report import share, whole_laps
from quality_statistics import Estimate, Reference, change, jackknife
from quality_store import Batch, Conditions, Store, evaluate, features

Floats = NDArray[np.float64]

SHARES = ("things", "background", "all")
BETTER = {"things": 1, "background": 1, "all": 1, "fault": -1, "Frechet": -1}
"""All measures, and which way is better."""


@dataclass(frozen=True)
class Result:
    """Of the images of one point.

    each: (N,) by name. things: 1 where the judge sees those of the prompt and no other. background: 1 where it is that
    of the prompt. all: both. fault: how far the background is from one of that kind, in levels. moved: root mean square
    distance to the unpatched model's image, in levels.
    frechet: distance of the judge's features to those of renderings; without: the same without each group of images.
    images: (N, 64, 64, 3).
    """

    each: Mapping[str, Floats]
    frechet: float
    without: Floats
    images: NDArray[np.uint8]

    def value(self, measure: str) -> Estimate:
        if measure == "Frechet":
            return jackknife(self.frechet, self.without)
        values = self.each[measure]
        return share(values) if measure in SHARES else change(np.zeros(len(values)), values)


@dataclass(frozen=True)
class Sheet:
    """All results with the same guidance; ``unfinished`` names the points that have fewer images than others have."""

    machine: str
    conditions: Conditions
    results: Mapping[Point, Result]
    unfinished: Sequence[str]

    @property
    def base(self) -> Result:
        return self.results[UNPATCHED]

    def of(self, series: Series) -> list[tuple[str, Result]]:
        """The finished settings of a series, by label."""
        return [(label, self.results[point]) for label, point in settings(series) if point in self.results]


def moved(before: Sequence[Result], after: Sequence[Result], measure: str) -> Estimate:
    """From the mean of some points to the mean of others, on the same prompts and noise."""
    if measure == "Frechet":
        distance, without = (
            [np.mean([getattr(each, name) for each in side], axis=0) for side in (before, after)]
            for name in ("frechet", "without")
        )
        return jackknife(float(distance[1] - distance[0]), without[1] - without[0])
    return change(*(np.mean([each.each[measure] for each in side], axis=0) for side in (before, after)))


def gather(model: str, store: Store, batches: int, real: Reference) -> Sheet | None:
    """What the store has in the first ``batches`` of each point, on the images that all have; None if the unpatched
    model has none. ``real``: features of renderings."""
    points = [UNPATCHED, *(point for tier in tiers(model) for point in tier)]
    done = {point: store.done(point, batches) for point in points}
    if done[UNPATCHED] == 0:
        return None
    enough = whole_laps(done, done[UNPATCHED])
    finished = {point: store.load(point, range(enough)) for point, number in done.items() if number >= enough}
    base = _images(finished[UNPATCHED])
    return Sheet(
        machine=finished[UNPATCHED][-1].machine,
        conditions=store.conditions,
        results={point: _result(made, base, real) for point, made in finished.items()},
        unfinished=[point.name for point in points if point not in finished],
    )


def _result(made: Sequence[Batch], base: NDArray[np.uint8], real: Reference) -> Result:
    images, shown = _images(made), features(made)
    things = np.concatenate([batch.measures[:, MEASURES.index("right")] for batch in made])
    behind = backgrounds(images, evaluate.prompts(len(images)))
    each = {
        "things": things,
        "background": behind[:, 0],
        "all": things * behind[:, 0],
        "fault": behind[:, 1],
        "moved": np.sqrt(((images.astype(np.float64) - base) ** 2).mean(axis=(1, 2, 3))),
    }
    return Result(each, real.distance(shown), real.without(shown), images)


def _images(batches: Iterable[Batch]) -> NDArray[np.uint8]:
    return np.concatenate([each.thumbnails for each in batches])
