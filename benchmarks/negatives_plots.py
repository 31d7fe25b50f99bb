"""Pictures of what a negative prompt does: rates over the parameters of NAG, and images side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from quality_plots import BLUE, FAINT, GREEN, ORANGE, STYLE
from quality_store import evaluate

LINES = {"negative": ("what it names appears", ORANGE), "kept": ("what is asked for is there", GREEN)}
LINES["right"] = ("full captions are right", BLUE)


def sweeps(
    model: str, found: Mapping[str, Any], base: Any, given: Mapping[str, Sequence[Any]], plain: str, path: Path
) -> None:
    """A panel for each parameter: rates with their intervals, and those without a negative prompt as thin lines."""
    with plt.rc_context(STYLE):
        figure, row = plt.subplots(1, len(given), figsize=(13, 4), sharey=True, layout="constrained")
        for axes, (name, sides) in zip(row, given.items(), strict=True):
            points = [(getattr(side.nag, name), side.name) for side in sides] + [(getattr(base, name), "NAG")]
            points.sort()
            for measure, (label, colour) in LINES.items():
                shares = [_share(found[each][measure]) for _, each in points]
                middle, low, high = np.array(shares).T * 100
                places = np.arange(len(points))
                axes.errorbar(places, middle, [middle - low, high - middle], color=colour, marker="o", label=label)
                axes.axhline(100 * _share(found[plain][measure])[0], color=colour, linewidth=0.8, linestyle=":")
            axes.set_xticks(places, ["∞" if value == math.inf else f"{value:g}" for value, _ in points])
            axes.set_xlabel(f"{name} (default {getattr(base, name):g})")
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color=FAINT, alpha=0.3)
        row[0].set_ylabel("% of images, 95 % intervals")
        row[0].set_ylim(0, 102)
        row[0].legend(frameon=False, loc="center left")
        figure.suptitle(f"{model}: NAG; dotted: no negative prompt", fontweight="bold", x=0.012, ha="left")
        figure.savefig(path)
        plt.close(figure)


def _share(flags: Sequence[int]) -> tuple[float, float, float]:
    return (sum(flags) / len(flags), *evaluate.interval(sum(flags), len(flags)))


def grid(tasks: Sequence[Any], shown: Mapping[str, Sequence[Any]], path: Path) -> None:
    """A column for each prompt, a row for each side."""
    with plt.rc_context(STYLE):
        figure, cells = plt.subplots(
            len(shown), len(tasks), figsize=(1.75 * len(tasks) + 1.4, 1.6 * len(shown) + 0.8), layout="constrained"
        )
        for row, (name, images) in zip(cells, shown.items(), strict=True):
            row[0].set_ylabel(name, rotation=0, ha="right", va="center")
            for axes, image in zip(row, images, strict=True):
                axes.imshow(np.asarray(image), interpolation="nearest")
                axes.set_xticks([])
                axes.set_yticks([])
                axes.spines[:].set_visible(False)
        for axes, task in zip(cells[0], tasks, strict=True):
            axes.set_title(f"{task.prompt}\nnot: {task.negative}", fontsize=10)
        figure.savefig(path)
        plt.close(figure)
