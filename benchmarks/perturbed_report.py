"""What was measured of guidance by perturbed attention, as tables for docs/perturbation_measured.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from common import Table
from perturbed_points import BASE, MIDDLE_SAG, SERIES
from perturbed_results import BETTER, SHARES, Floats, Result, Sheet, moved
from quality_statistics import RESAMPLES, Estimate, verdict

TITLES = {
    "things": "things right, %",
    "background": "background right, %",
    "all": "both right, %",
    "fault": "background fault",
    "Frechet": "Frechet distance",
}
GOOD, BEYOND, KNEE = ("0.5", "0.75", "1"), ("1.5", "3"), ("1.5", "3")
FLATTER = 0.5  # of the growth below the knee: less is called saturated


@dataclass(frozen=True)
class Claim:
    """What is said of SAG, what was measured of it, and whether it is so."""

    text: str
    measured: str
    from_to: str
    change: str
    answer: str


def name(guidance: float) -> str:
    return "without CFG" if guidance == 1 else f"CFG {guidance:g}"


def text(model: str, sheets: Mapping[float, Sheet]) -> str:
    """The section of a model: conditions, claims, pictures, all points."""
    first = next(iter(sheets.values()))
    images = ", ".join(f"{len(sheet.base.images)} {name(guidance)}" for guidance, sheet in sheets.items())
    late = [f"{point} {name(guidance)}" for guidance, sheet in sorted(sheets.items()) for point in sheet.unfinished]
    parts = [
        f"{first.machine}; {first.conditions.steps} steps. Images a point: {images}.",
        "What is said of SAG:",
        str(claims(sheets)),
        f"![Accuracy, backgrounds and Frechet distance over scale](perturbation-{model}.png)",
        f"![The same prompts over scale](perturbation-{model}-images.png)",
        "All points; changes are against the unpatched model (scale 0), on the same prompts and noise:",
        str(everything(model, sheets)),
        f"Not finished yet: {', '.join(late)}." if late else "",
    ]
    return "\n\n".join(filter(None, parts))


def claims(sheets: Mapping[float, Sheet]) -> Table:
    table = Table("claim", "guidance", "measured", "scale", "change (95 %)", "so?")
    for guidance, sheet in sheets.items():
        at = {BASE: sheet.base, **dict(sheet.of(MIDDLE_SAG))}
        if len(at) <= len(MIDDLE_SAG.settings):
            table.add("of SAG in the middle", name(guidance), "", "", "", "not finished")
            continue
        for claim in (*_repairs(at), _saturates(at), *_is_good(at)):
            cells = (claim.measured, claim.from_to, claim.change, f"**{claim.answer}**")
            table.add(claim.text, name(guidance), *cells)
    return table


def _repairs(at: Mapping[str, Result]) -> list[Claim]:
    """From none to the default."""
    return [_better("repairs backgrounds", at, measure, (BASE,), ("0.75",)) for measure in ("background", "fault")]


def _saturates(at: Mapping[str, Result]) -> Claim:
    """How steeply images move away from the unpatched model's between 1.5 and 3, over how they do up to 1.5."""
    low, high = (at[label].each["moved"] for label in KNEE)
    slope = ratio(high - low, low)
    answer = "not measurable here"
    if slope.high < FLATTER or slope.low > FLATTER:
        answer = "yes" if slope.high < FLATTER else "no"
    means = f"images move by {low.mean():.1f} levels, then {high.mean():.1f}: the slope after 1.5 over that before it"
    return Claim("its effect saturates near 1.5", means, "1.5 to 3", f"{slope:.2f}", answer)


def _is_good(at: Mapping[str, Result]) -> list[Claim]:
    sides = (("0.5 to 1 is better than none", (BASE,)), ("0.5 to 1 is better than more", BEYOND))
    return [_better(text, at, measure, worse, GOOD) for text, worse in sides for measure in ("all", "Frechet")]


def _better(text: str, at: Mapping[str, Result], measure: str, before: Sequence[str], after: Sequence[str]) -> Claim:
    sides = [[at[label] for label in labels] for labels in (before, after)]
    old, new = (float(np.mean([each.value(measure).value for each in side])) for side in sides)
    change = moved(*sides, measure)
    answer = verdict(change, BETTER[measure], old)
    measured = f"{TITLES[measure].removesuffix(', %')}: {_shown(old, measure)} to {_shown(new, measure)}"
    to = "mean of " if max(len(before), len(after)) > 1 else ""
    return Claim(text, measured, f"{'/'.join(before)} to {to}{'/'.join(after)}", _change(change, measure), answer)


def ratio(above: Floats, below: Floats, seed: int = 0) -> Estimate:
    """The mean of ``above`` (N,) over that of ``below``; its interval by paired bootstrap."""
    count = len(above)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    low, high = np.percentile((drawn @ above) / (drawn @ below), (2.5, 97.5))
    return Estimate(float(above.mean() / below.mean()), float(low), float(high))


def everything(model: str, sheets: Mapping[float, Sheet]) -> Table:
    """A row for each point and guidance."""
    header = [part for title in TITLES.values() for part in (f"{title} (95 %)", "change")]
    table = Table("guidance", "method", "where", "scale", *header, "moved")
    for guidance, sheet in sheets.items():
        rows = [("none", "", BASE, sheet.base)]
        for series in SERIES[model]:
            rows += [(series.operator, series.line or "", label, each) for label, each in sheet.of(series)]
        for method, place, label, each in rows:
            cells = []
            for measure in TITLES:
                change = _change(moved([sheet.base], [each], measure), measure) if each is not sheet.base else ""
                cells += [_scaled(each.value(measure), measure), change]
            table.add(name(guidance), method, place, label, *cells, f"{each.value('moved').value:.1f}")
    return table


def _shown(value: float, measure: str) -> str:
    return f"{100 * value:.1f} %" if measure in SHARES else f"{value:.2f}"


def _scaled(value: Estimate, measure: str) -> str:
    return f"{100 * value:.1f}" if measure in SHARES else f"{value:.2f}"


def _change(change: Estimate, measure: str) -> str:
    return f"{100 * change:+.1f}" if measure in SHARES else f"{change:+.2f}"
