"""The picture of a plan: what is left of the work over a run, and of the keys of each site."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import PercentFormatter

from sloth_fx.cost import RunCost, SiteCost

INK, FAINT, BLUE, SKY = "#22223b", "#9a9aae", "#2a6f97", "#cfe3ef"
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": INK,
    "ytick.color": INK,
    "savefig.dpi": 150,
}
STAGES = {"in": "input\nblocks", "middle": "middle", "out": "output\nblocks"}
_ROW = 0.34  # inches
_REST = "cross-attention and text"


def draw(cost: RunCost, path: Path, title: str, subtitle: str) -> None:
    """Write a PNG: above what is left of all attention, below how many keys the queries of each site see."""
    groups = [group for group in cost.groups() if group[0].site.on_image]
    tall = _ROW * len(groups)
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(13, 3.6 + tall), layout="constrained")
        above, below = figure.subplots(2, 1, height_ratios=(1.7, tall), sharex=True)
        engine: Any = figure.get_layout_engine()
        engine.set(w_pad=0.14, h_pad=0.12, hspace=0.04)
        figure.suptitle(title, fontsize=18, fontweight="bold", x=0.012, ha="left")
        _draw_work(above, cost, subtitle)
        _draw_keys(below, cost, groups)
        for axes in (above, below):
            axes.spines[:].set_visible(False)
            axes.tick_params(which="both", length=0)
        figure.savefig(path)
        plt.close(figure)


def _draw_work(axes: Any, cost: RunCost, subtitle: str) -> None:
    """A stack with a layer for each grid, the largest one first, and one for all that is not image tokens alone."""
    steps, whole = len(cost.moments), max(cost.flops_before(), 1)
    layers: dict[str, Any] = {}
    for each in cost.sites:
        work = np.array([each.flops(now) for now in each.steps]) / whole
        name = _grid(each, cost) if each.site.on_image else _REST
        layers[name] = layers.get(name, 0) + work
    if _REST in layers:
        layers[_REST] = layers.pop(_REST)  # on top
    colours = [plt.get_cmap("YlGnBu")(place) for place in np.linspace(0.82, 0.3, max(len(layers) - 1, 1))]
    bottom = np.zeros(steps)
    for name, work in layers.items():
        colour = FAINT if name == _REST else colours.pop(0)
        axes.bar(np.arange(steps), work, 1.0, bottom, color=colour, lw=0, label=name)
        bottom = bottom + work
    axes.plot([-0.5, steps - 0.5], [1, 1], color=FAINT, lw=1.2, ls=(0, (4, 3)))
    axes.annotate("unpatched", (steps - 0.5, 1), (0, 3), textcoords="offset points", ha="right", color=FAINT)
    top = max(1.0, *bottom)  # a second branch makes it more than there was
    axes.set(ylim=(0, 1.12 * top), ylabel="attention\nthat is left", yticks=np.arange(0, top + 0.01, 0.5))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_title(
        f"{subtitle}\nover the run {cost.flops_left:.0%} of the operations of attention are left, "
        f"and {cost.bytes_left:.0%} of the keys and values; {cost.graphs} compiled graphs",
        fontsize=12,
        loc="left",
        pad=12,
        linespacing=1.6,
    )
    axes.legend(loc="upper left", bbox_to_anchor=(1.005, 1.02), frameon=False, fontsize=10, labelspacing=0.3)


def _draw_keys(axes: Any, cost: RunCost, groups: list[list[SiteCost]]) -> None:
    steps = len(cost.moments)
    left = np.array([[now.keys / max(group[0].before.keys, 1) for now in group[0].steps] for group in groups])
    axes.imshow(left, aspect="auto", cmap="YlGnBu_r", vmin=0, vmax=1.15, interpolation="nearest")
    axes.set_yticks(np.arange(len(groups) + 1) - 0.5, minor=True)
    axes.grid(which="minor", axis="y", color="white", lw=1.6)
    axes.set_yticks(range(len(groups)), [_row_label(group, cost) for group in groups])
    numbers = [step for step in range(steps) if steps <= 12 or step == 0 or (step + 1) % 5 == 0]
    axes.set_xticks(numbers, [str(step + 1) for step in numbers])
    axes.set(xlim=(-0.5, steps - 0.5), xlabel="step of the sampling run")
    axes.set_title("keys that a query sees", fontsize=12, loc="left", pad=8)
    for row, group in enumerate(groups):
        for start, stop, keys in _runs([round(now.keys) for now in group[0].steps]):
            if (stop - start) / steps * 9 < 0.11 * len(str(keys)):  # inches: it would not fit
                continue
            colour = "white" if left[row, start] < 0.55 else INK
            axes.text((start + stop - 1) / 2, row, str(keys), ha="center", va="center", fontsize=9, color=colour)
        where = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center"}
        acts = " + ".join(group[0].site.operators)
        axes.annotate(f"of {group[0].before.keys:.0f}", (1, row), (10, 0), **where)
        axes.annotate(acts or "left alone", (1, row), (68, 0), fontsize=9, color=INK if acts else FAINT, **where)
    _draw_stages(axes, groups)


def _draw_stages(axes: Any, groups: list[list[SiteCost]]) -> None:
    row = 0
    for stage, members in groupby(groups, key=lambda group: group[0].site.stage):
        count = len(list(members))
        place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center", "ha": "right"}
        axes.annotate(STAGES[stage], (0, row + (count - 1) / 2), (-104, 0), fontweight="bold", **place)
        row += count
        if row < len(groups):
            axes.axhline(row - 0.5, color="white", lw=6)


def _runs(values: list[int]) -> list[tuple[int, int, int]]:
    """(start, stop, value) of each run of equal values."""
    found: list[tuple[int, int, int]] = []
    for value, members in groupby(values):
        start = found[-1][1] if found else 0
        found.append((start, start + len(list(members)), value))
    return found


def _grid(site: SiteCost, cost: RunCost) -> str:
    grid = site.site.grid_at(cost.latent)
    return "x".join(map(str, grid)) if grid is not None else "-"


def _row_label(group: list[SiteCost], cost: RunCost) -> str:
    kind = f"{group[0].site.kind} " if group[0].site.kind != "self" else ""
    return f"{len(group)} x {kind}{_grid(group[0], cost)}"
