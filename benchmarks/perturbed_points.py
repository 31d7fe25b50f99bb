"""What is measured of guidance by perturbed attention: each method over its scale, the most telling first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from quality_points import Point, Series, points

from sloth_fx.perturbation_specs import PAG, SAG, SEG, SLG, TPG, PerturbationSpec

BASE = "0"
"""The label of the unpatched model, which is where every series begins."""

# The middle of lab-unet has 16 tokens, and hardly matters to it; its last two blocks have 16 x 16 each.
_LAST = {"stage": "out", "depth": (1, 1)}


def _over(spec: PerturbationSpec, place: str, *scales: float) -> Series:
    settings = tuple((f"{scale:g}", replace(spec, scale=scale)) for scale in scales)
    return Series(type(spec).__name__, "scale", settings, place)


MIDDLE_SAG = _over(SAG(), "in the middle", 0.25, 0.5, 0.75, 1, 1.5, 3)
SERIES = {
    "lab-unet": (
        MIDDLE_SAG,
        _over(PAG(where=_LAST), "in the last blocks", 0.5, 1, 2, 3),
        _over(SEG(where=_LAST), "in the last blocks", 0.25, 0.5, 1),
        _over(SLG(layers=(1,)), "block 1", 1, 2.8, 5),
        _over(TPG(), "in the input blocks", 0.25, 0.5, 1, 3),
        _over(SAG(where=_LAST), "in the last blocks", 0.75, 1.5),
        _over(SLG(layers=(3,)), "the middle", 2.8),
        _over(PAG(), "in the middle", 3),
        _over(SEG(), "in the middle", 3),
    ),
    "lab-dit": (
        MIDDLE_SAG,
        _over(SLG(layers=(2,)), "block 2", 1, 2.8, 5),
        _over(PAG(), "in the middle", 0.5, 1, 3, 5),
        _over(SEG(), "in the middle", 0.5, 1, 3, 5),
        _over(TPG(), "in the first blocks", 0.25, 0.5, 1, 3),
        _over(SLG(layers=(3,)), "block 3", 2.8),
    ),
}


def tiers(model: str) -> list[list[Point]]:
    """The points of a model, in the groups in which they are to be made."""
    at = points(SERIES[model])
    return [[at[spec] for _, spec in series.settings] for series in SERIES[model]]


def settings(series: Series) -> Iterable[tuple[str, Point]]:
    """Label and point of each setting."""
    at = points([series])
    return [(label, at[spec]) for label, spec in series.settings]
