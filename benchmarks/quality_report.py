"""What is stored of a model, as numbers with intervals and as tables for docs/quality.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from common import Spread, Table
from numpy.typing import NDArray
from quality_measures import MEASURES
from quality_points import CLAIMS, OTHER_SEEDS, SERIES, STRENGTHS, UNPATCHED, Claim, Point, Series, points
from quality_statistics import Estimate, Reference, breaks_at, change, harmless_until, jackknife, verdict
from quality_store import Batch, Conditions, Store, evaluate, features


@dataclass(frozen=True)
class Result:
    """Of one point. Accuracies are shares; changes are against the unpatched model on the same prompts and noise.

    frechet: distance of the judge's features to those of real renderings. from_unpatched: to those of images that the
    unpatched model paints from other noise. time: of a batch, over that of the unpatched model. measures: (N,
    len(MEASURES)). thumbnails: (K, 64, 64, 3).
    """

    accuracy: Estimate
    accuracy_change: Estimate
    frechet: Estimate
    frechet_change: Estimate
    from_unpatched: float
    time: Spread
    seconds: float  # an image
    measures: NDArray[np.float64]
    thumbnails: NDArray[np.uint8]

    def measure(self, name: str) -> NDArray[np.float64]:
        return self.measures[:, MEASURES.index(name)]


@dataclass(frozen=True)
class Report:
    """All results of a model; ``unfinished`` names the points that have fewer images than the unpatched model has."""

    model: str
    machine: str
    conditions: Conditions
    images: int
    results: Mapping[Point, Result]
    unfinished: Sequence[str]

    def of(self, series: Series) -> list[tuple[str, Result]]:
        """The finished settings of a series, by label."""
        at = points()
        return [(label, self.results[at[spec]]) for label, spec in series.settings if at[spec] in self.results]

    def complete(self, series: Series) -> bool:
        return len(self.of(series)) == len(series.settings)

    def ends(self, claim: Claim) -> tuple[Result, Result] | None:
        before, after = (self.results.get(points()[spec]) for _, spec in claim.ends)
        return None if before is None or after is None else (before, after)


def gather(model: str, store: Store, batches: int, renderings: NDArray[np.float64]) -> Report | None:
    """What the store has in the first ``batches`` of each point, on the images that all have; None if the unpatched
    model has none. ``renderings``: features (N, F) of real renderings."""
    done = {point: store.done(point, batches) for point in (UNPATCHED, OTHER_SEEDS, *points().values())}
    enough = min(done[UNPATCHED], done[OTHER_SEEDS])
    if enough == 0:
        return None
    enough = whole_laps(done, enough)
    finished = {point: store.load(point, range(enough)) for point, number in done.items() if number >= enough}
    real = Reference(renderings)
    others = Reference(features(finished[OTHER_SEEDS]))
    base = finished[UNPATCHED]
    without = real.without(features(base))
    return Report(
        model=model,
        machine=base[-1].machine,
        conditions=store.conditions,
        images=enough * store.conditions.batch,
        results={point: _result(made, base, real, others, without) for point, made in finished.items()},
        unfinished=[point.name for point in done if point not in finished],
    )


def whole_laps(done: Mapping[Point, int], enough: int) -> int:
    """``enough`` batches, or one less where some points have so many: it was stopped in a lap."""
    return max(1, enough - 1) if enough - 1 in done.values() else enough


def share(flags: NDArray[np.float64]) -> Estimate:
    """The share of ones, with Wilson's interval."""
    return Estimate(float(flags.mean()), *evaluate.interval(int(flags.sum()), len(flags)))


def _result(
    made: Sequence[Batch],
    base: Sequence[Batch],
    real: Reference,
    others: Reference,
    base_without: NDArray[np.float64],
) -> Result:
    shown, measures = features(made), np.concatenate([each.measures for each in made])
    right, right_before = (np.concatenate([each.measures[:, 0] for each in side]) for side in (made, base))
    distance, without = real.distance(shown), real.without(shown)
    before = real.distance(features(base))
    return Result(
        accuracy=share(right),
        accuracy_change=change(right_before, right),
        frechet=jackknife(distance, without),
        frechet_change=jackknife(distance - before, without - base_without),
        from_unpatched=others.distance(shown),
        time=Spread.of(each.seconds / first.seconds for each, first in zip(made, base, strict=True)),
        seconds=sum(each.seconds for each in made) / len(right),
        measures=measures,
        thumbnails=made[0].thumbnails,
    )


# Text


def text(report: Report) -> str:
    """The section of a model: conditions, regions, claims, pictures, all points."""
    conditions, plain, other = report.conditions, report.results[UNPATCHED], report.results[OTHER_SEEDS]
    parts = [
        f"{report.machine}; {report.images} images a point, {conditions.steps} steps, "
        f"guidance {conditions.guidance:g}.",
        f"Unpatched: {100 * plain.accuracy:.1f} % of the prompts are right, Frechet distance to renderings "
        f"{plain.frechet:.2f}, {plain.seconds:.2f} s an image. From other noise: {100 * other.accuracy:.1f} %, "
        f"{other.frechet:.2f}. Between these two sets of images, which differ by chance alone, the distance is "
        f"{plain.from_unpatched:.2f}.",
        str(regions(report)),
        f"![Accuracy, Frechet distance and time over strength](quality-{report.model}.png)",
        f"![The same prompts over strength](quality-{report.model}-images.png)",
        "What the author says of the parameters:",
        str(claims(report)),
        "All points:",
        str(everything(report)),
        f"Not finished yet: {', '.join(report.unfinished)}." if report.unfinished else "",
    ]
    return "\n\n".join(filter(None, parts))


def regions(report: Report) -> Table:
    table = Table("operator", "over", "harmless up to", "Frechet change", "time", "breaks at", "right there, %")
    for series in STRENGTHS:
        if not report.complete(series):
            table.add(series.title, series.parameter, "not finished", "", "", "", "")
            continue
        settings = report.of(series)
        changes = [result.accuracy_change for _, result in settings]
        safe, broken = harmless_until(changes), breaks_at(changes)
        cells = [series.title, series.parameter]
        if safe:
            label, last = settings[safe - 1]
            cells += [label, f"{last.frechet_change:+.2f}", f"{last.time:.2f}"]
        else:
            cells += ["none of these", "", ""]
        if broken is None:
            cells += ["none of these", ""]
        else:
            cells += [settings[broken][0], f"{100 * settings[broken][1].accuracy:.1f}"]
        table.add(*cells)
    return table


def claims(report: Report) -> Table:
    table = Table("claim", "at", "measured", "unpatched", "from", "to", "change (95 %)", "so?")
    for claim in CLAIMS:
        ends, labels = report.ends(claim), [label for label, _ in claim.ends]
        if ends is None:
            table.add(claim.text, claim.at, claim.measure, "", "", "", "", "not finished")
            continue
        plain, before, after = (each.measure(claim.measure) for each in (report.results[UNPATCHED], *ends))
        moved = change(before, after)
        means = [
            f"{plain.mean():.3g}",
            *(f"{side.mean():.3g} at {label}" for side, label in zip((before, after), labels, strict=True)),
        ]
        answer = verdict(moved, claim.direction, float(before.mean()))
        table.add(claim.text, claim.at, claim.measure, *means, f"{moved:+.3f}", f"**{answer}**")
    return table


def everything(report: Report) -> Table:
    """A row for each point, where it comes first."""
    table = Table(
        *("operator", "parameter", "value", "right, % (95 %)", "change, points", "Frechet (95 %)", "change"),
        *("Frechet to unpatched", "time (p20 to p80)"),
    )
    listed: set[int] = set()
    for series in SERIES:
        for label, each in report.of(series):
            if id(each) in listed:
                continue
            listed.add(id(each))
            table.add(
                *(series.title, series.parameter, label),
                *(f"{100 * each.accuracy:.1f}", f"{100 * each.accuracy_change:+.1f}"),
                *(f"{each.frechet:.2f}", f"{each.frechet_change:+.2f}", f"{each.from_unpatched:.2f}"),
                f"{each.time:.2f}",
            )
    return table


def insert(page: Path, model: str, section: str) -> None:
    """Put a section between the markers of a model. Raises ValueError for a page without them."""
    begin, end = f"<!-- begin quality {model} -->", f"<!-- end quality {model} -->"
    whole = page.read_text(encoding="utf-8")
    if begin not in whole or end not in whole:
        raise ValueError(f"{page} has no lines {begin} and {end} to write between")
    before, rest = whole.split(begin, 1)
    after = rest.split(end, 1)[1]
    page.write_text(f"{before}{begin}\n{section}\n{end}{after}", encoding="utf-8")
