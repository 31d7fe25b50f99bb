"""Two pictures of guidance by perturbed attention: measures over scale, and the same prompts over scale."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, NullLocator
from perturbed_points import BASE, MIDDLE_SAG, SERIES
from perturbed_report import TITLES, name
from perturbed_results import SHARES, Result, Sheet
from quality_plots import BLUE, FAINT, GREEN, INK, ORANGE, RED, STYLE
from quality_points import Series

COLUMNS = ("things", "background", "fault", "Frechet")
SHOWN = 8  # prompts
_APART = 0.07  # of a scale: lines, so that their intervals do not lie upon each other


def curves(model: str, sheets: Mapping[float, Sheet], path: Path) -> None:
    """A row for each series of several scales, a column for each of COLUMNS, a line for each guidance."""
    rows = [series for series in SERIES[model] if len(series.settings) > 1]
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(15, 2.15 * len(rows) + 1.6), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
        title = f"{model}: guidance by perturbed attention over scale"
        figure.suptitle(title, fontsize=18, fontweight="bold", x=0.012, ha="left")
        grid = figure.subplots(len(rows), len(COLUMNS), sharey="col", squeeze=False)
        for series, panels in zip(rows, grid, strict=True):
            for axes, measure in zip(panels, COLUMNS, strict=True):
                _panel(axes, series, sheets, measure)
            panels[0].set_title(series.title, loc="left", fontweight="bold", fontsize=12)
        for axes, measure in zip(grid[0], COLUMNS, strict=True):
            better = "" if measure in SHARES else ", less is better"
            heading = TITLES[measure] + better
            axes.annotate(
                heading, (0, 1), (0, 26), "axes fraction", textcoords="offset points", fontsize=12, color=BLUE
            )
        handles = [
            plt.Line2D([], [], color=colour, marker="o", label=name(guidance))
            for guidance, colour in zip(sheets, (ORANGE, BLUE), strict=False)
        ]
        handles.append(plt.Line2D([], [], color=FAINT, ls=(0, (4, 3)), label="unpatched; bars are 95 % intervals"))
        figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), frameon=False)
        figure.savefig(path)
        plt.close(figure)


def _panel(axes: Any, series: Series, sheets: Mapping[float, Sheet], measure: str) -> None:
    labels = [BASE, *(label for label, _ in series.settings)]
    scale = 100 if measure in SHARES else 1
    for index, (sheet, colour) in enumerate(zip(sheets.values(), (ORANGE, BLUE), strict=False)):
        shown = [(BASE, sheet.base), *sheet.of(series)]
        found = [scale * result.value(measure) for _, result in shown]
        places = np.array([labels.index(label) for label, _ in shown]) + _APART * (2 * index - len(sheets) + 1)
        values = np.array([each.value for each in found])
        ends = np.array([(each.value - each.low, each.high - each.value) for each in found]).T
        axes.axhline(values[0], color=colour, lw=1, ls=(0, (4, 3)), alpha=0.5)
        axes.errorbar(places, values, np.maximum(ends, 0), color=colour, marker="o", ms=5.5, lw=1.6, elinewidth=1.2)
    if measure not in SHARES:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlim(-0.4, len(labels) - 0.6)
    axes.set_xlabel(series.parameter, labelpad=1)
    axes.grid(axis="y", color=FAINT, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0)


def images(model: str, sheet: Sheet, path: Path) -> None:
    """The prompts whose backgrounds the unpatched model paints worst: below them SAG at each scale, and the other
    series where their Frechet distance is least."""
    chosen = np.argsort(-sheet.base.each["fault"], kind="stable")[:SHOWN]
    rows: list[tuple[str, Result]] = [("none", sheet.base)]
    rows += [(f"SAG {label}", result) for label, result in sheet.of(MIDDLE_SAG)]
    for series in SERIES[model]:
        done = sheet.of(series)
        if series is not MIDDLE_SAG and len(series.settings) > 1 and done:
            label, best = min(done, key=lambda each: each[1].frechet)
            rows.append((f"{series.operator} {label}\n{series.line}", best))
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(1.3 * len(chosen) + 2.2, 1.36 * len(rows) + 0.7), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0.02, hspace=0.02)
        title = f"{model} {name(sheet.conditions.guidance)}: where its backgrounds are worst"
        figure.suptitle(title, fontsize=14, fontweight="bold", x=0.012, ha="left")
        for (label, result), cells in zip(rows, figure.subplots(len(rows), len(chosen), squeeze=False), strict=True):
            cells[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=10)
            for axes, index in zip(cells, chosen, strict=True):
                axes.imshow(result.images[index], interpolation="nearest")
                axes.set_xticks([])
                axes.set_yticks([])
                axes.spines[:].set(color=_colour(result, index), linewidth=2.5)
        figure.supxlabel(
            "green: all is right; black: the background is; red: it is not", fontsize=10, x=0.012, ha="left"
        )
        figure.savefig(path)
        plt.close(figure)


def _colour(result: Result, index: int) -> str:
    if result.each["all"][index]:
        return GREEN
    return INK if result.each["background"][index] else RED
