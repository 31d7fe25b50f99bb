"""Two pictures of a model: what operators cost and give over strength, and the same prompts over strength."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from quality_points import STRENGTHS, UNPATCHED, Series
from quality_report import Report, Result
from quality_statistics import BREAKING_DROP, HARMLESS_DROP, breaks_at, harmless_until
from quality_store import evaluate

INK, FAINT, SKY, BLUE, ORANGE, RED, GREEN = "#22223b", "#9a9aae", "#cfe3ef", "#2a6f97", "#e07a1f", "#c1121f", "#3a7d44"
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": INK,
    "ytick.color": INK,
    "savefig.dpi": 130,
}
COLUMNS = ("prompts that are right, %", "Frechet distance to renderings", "time / that of the unpatched model")
_APART = 0.07  # of a strength: lines of a panel, so that their intervals do not lie upon each other


def curves(report: Report, path: Path) -> None:
    """A row for each operator, a column for each of COLUMNS."""
    panels = [(operator, list(lines)) for operator, lines in groupby(STRENGTHS, lambda series: series.operator)]
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(13, 2.1 * len(panels) + 1.7), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
        figure.suptitle(f"{report.model}: operators over strength", fontsize=18, fontweight="bold", x=0.012, ha="left")
        grid = figure.subplots(len(panels), 3, sharey="col")
        for row, (operator, lines) in zip(grid, panels, strict=True):
            for column, axes in enumerate(row):
                _draw_panel(axes, report, lines, column)
            row[0].set_title(operator, loc="left", fontweight="bold", fontsize=12)
        for axes, title in zip(grid[0], COLUMNS, strict=True):
            axes.annotate(title, (0, 1), (0, 26), "axes fraction", textcoords="offset points", fontsize=12, color=BLUE)
        figure.legend(handles=_legend(), loc="outside lower left", ncols=6, frameon=False)
        figure.savefig(path)
        plt.close(figure)


def _legend() -> list[Any]:
    drops = f"{100 * HARMLESS_DROP:.0f} and {100 * BREAKING_DROP:.0f} points less"

    def mark(shape: str, face: str, edge: str, label: str) -> Any:
        return Line2D([], [], ls="", marker=shape, ms=8, mfc=face, mec=edge, mew=1.6, label=label)

    return [
        mark("o", INK, INK, "harmless"),
        mark("o", "white", INK, "neither"),
        mark("X", RED, RED, "broken"),
        Line2D([], [], color=FAINT, ls=(0, (4, 3)), label="unpatched"),
        Patch(color=SKY, alpha=0.6, label="its interval, 95 %"),
        Line2D([], [], color=RED, lw=0.9, alpha=0.5, label=drops),
    ]


def _draw_panel(axes: Any, report: Report, lines: list[Series], column: int) -> None:
    labels = [label for label, _ in lines[0].settings]
    value, low, high = _of(report.results[UNPATCHED], column)
    axes.axhspan(low, high, color=SKY, alpha=0.6, lw=0)
    axes.axhline(value, color=FAINT, lw=1.2, ls=(0, (4, 3)))
    if column == 0:
        for drop in (HARMLESS_DROP, BREAKING_DROP):
            axes.axhline(value - 100 * drop, color=RED, lw=0.7, alpha=0.35)
    for index, (series, colour) in enumerate(zip(lines, (BLUE, ORANGE), strict=False)):
        settings = report.of(series)
        if not settings:
            continue
        places = np.array([labels.index(label) for label, _ in settings]) + _APART * (2 * index - len(lines) + 1)
        middle, below, above = np.array([_of(result, column) for _, result in settings]).T
        axes.plot(places, middle, color=colour, lw=1.6, label=series.line or None)
        axes.errorbar(places, middle, (middle - below, above - middle), fmt="none", ecolor=colour, elinewidth=1.2)
        for place, at, kind in zip(places, middle, _kinds([result for _, result in settings]), strict=True):
            shape, size = ("X", 8) if kind == "broken" else ("o", 6.5)
            face = {"harmless": colour, "neither": "white", "broken": RED}[kind]
            edge = RED if kind == "broken" else colour
            axes.plot(place, at, shape, ms=size, mfc=face, mec=edge, mew=1.5, zorder=3)
    if column == 0 and len(lines) > 1:
        axes.legend(frameon=False, fontsize=9, loc="best", borderaxespad=0.1, handlelength=1.2)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlim(-0.5, len(labels) - 0.5)
    axes.set_xlabel(lines[0].parameter, labelpad=1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0)


def _of(result: Result, column: int) -> tuple[float, float, float]:
    """Value, low and high end."""
    if column == 2:
        return result.time.median, result.time.low, result.time.high
    each, scale = (result.accuracy, 100) if column == 0 else (result.frechet, 1)
    return scale * each.value, scale * each.low, scale * each.high


def _kinds(results: list[Result]) -> list[str]:
    changes = [result.accuracy_change for result in results]
    safe, broken = harmless_until(changes), breaks_at(changes)
    return [
        "harmless" if index < safe else "neither" if broken is None or index < broken else "broken"
        for index in range(len(changes))
    ]


def images(report: Report, path: Path) -> None:
    """A row for each operator: the unpatched model's images of some prompts, and those at each strength."""
    rows = [(series, report.of(series)) for series in STRENGTHS]
    plain = report.results[UNPATCHED]
    columns = 1 + max(len(series.settings) for series, _ in rows)
    with plt.rc_context({**STYLE, "font.size": 10}):
        figure = plt.figure(figsize=(2.4 * columns + 0.6, 1.1 * len(rows) + 1.6), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.03, h_pad=0.04, wspace=0.02, hspace=0.02)
        title = f"{report.model}: the same prompts and noise, over strength"
        figure.suptitle(title, fontsize=18, fontweight="bold", x=0.012, ha="left")
        prompts = "\n".join(evaluate.prompts(len(plain.thumbnails)))
        figure.supxlabel(f"{prompts}\n\ngreen: harmless; red: broken", fontsize=11, x=0.012, ha="left", linespacing=1.4)
        grid = figure.subplots(len(rows), columns)
        for (series, settings), cells in zip(rows, grid, strict=True):
            for axes in cells:
                axes.set_axis_off()
            shown = [("unpatched", plain, GREEN), *_coloured(series, settings)]
            for axes, (label, result, colour) in zip(cells, shown, strict=False):
                axes.imshow(_strip(result), interpolation="antialiased")
                axes.set_title(f"{label}: {100 * result.accuracy.value:.0f} % right", fontsize=10, color=colour, pad=3)
            name = series.title.replace(", ", ",\n")
            cells[0].text(
                -0.06, 0.5, f"{name}\n{series.parameter}", transform=cells[0].transAxes, ha="right", va="center"
            )
        figure.savefig(path)
        plt.close(figure)


def _coloured(series: Series, settings: list[tuple[str, Result]]) -> list[tuple[str, Result, str]]:
    colours = {"harmless": GREEN, "neither": INK, "broken": RED}
    kinds = _kinds([result for _, result in settings])
    return [(label, result, colours[kind]) for (label, result), kind in zip(settings, kinds, strict=True)]


def _strip(result: Result) -> Any:
    """The thumbnails side by side, enlarged, with white between them."""
    enlarged = [np.kron(each, np.ones((4, 4, 1), np.uint8)) for each in result.thumbnails]
    gap = np.full((enlarged[0].shape[0], 12, 3), 255, np.uint8)
    return np.concatenate([part for each in enlarged for part in (each, gap)][:-1], axis=1)
