"""The two pictures of step_by_step.py: what is left of the keys over a run, and where the queries of one tile look."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

from sloth_fx.operators import KeyLayout
from sloth_fx.site import AttentionSite

STAGES = {"in": "input\nblocks", "middle": "middle", "out": "output\nblocks"}
INK, FAINT, PAPER, SKY, BLUE, ORANGE = "#22223b", "#9a9aae", "#f4f4f8", "#cfe3ef", "#2a6f97", "#e07a1f"
STYLE = {
    "font.size": 11,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": INK,
    "ytick.color": INK,
    "savefig.dpi": 150,
}


@dataclass(frozen=True)
class Tile:
    """A panel of the second picture: the moment in words, and the layout of the site then."""

    title: str
    layout: KeyLayout


def keys_over_steps(path: Path, sites: list[AttentionSite], kept: np.ndarray, work: np.ndarray) -> None:
    """A heat map.

    Args:
        path: where to write it.
        sites: the self-attention sites, in order of execution.
        kept: (sites, steps), the share of the keys that are left, 0..1.
        work: (steps,), the pairs of query and key that are left, over all sites, as a share.
    """
    steps = kept.shape[1]
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(12.5, 2.9 + 0.32 * len(sites)), layout="constrained")
        above, below = figure.subplots(2, 1, height_ratios=(1.2, 0.32 * len(sites)), sharex=True)
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        figure.suptitle("How many keys each self-attention layer looks at", fontsize=18, fontweight="bold")

        above.fill_between(np.arange(-0.5, steps), np.append(work, work[-1]), step="post", color=BLUE, alpha=0.85, lw=0)
        above.set(ylim=(0, 1), ylabel="attention\nwork left")
        above.yaxis.set_major_formatter(PercentFormatter(1))
        above.set_yticks([0, 0.5, 1])
        above.set_title(
            f"Slothful Attention: over the whole run, {work.mean():.0%} of the work of self-attention is left",
            fontsize=12,
            loc="left",
            pad=10,
        )

        image = below.imshow(kept, aspect="auto", cmap="YlGnBu_r", vmin=0, vmax=1, interpolation="nearest")
        below.set_xticks(np.arange(steps + 1) - 0.5, minor=True)
        below.set_yticks(np.arange(len(sites) + 1) - 0.5, minor=True)
        below.grid(which="minor", color="white", lw=0.6)
        below.tick_params(which="minor", length=0)
        below.set_yticks(range(len(sites)), [_grid_label(site) for site in sites])
        below.set_xticks([i for i in range(steps) if (i + 1) % 5 == 0 or i == 0])
        below.set_xticklabels([str(i + 1) for i in below.get_xticks()])
        below.set(xlim=(-0.5, steps - 0.5), xlabel="step of the sampling run")
        _stage_labels(below, sites)
        for row, shares in enumerate(kept):
            words = f"down to {shares.min():.0%}" if shares.min() < 1 else "all"
            where = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center"}
            below.annotate(words, (1, row), (8, 0), fontsize=10, color=INK if shares.min() < 1 else FAINT, **where)
        bar = figure.colorbar(image, ax=[above, below], pad=0.02, aspect=30, format=PercentFormatter(1))
        bar.set_label("keys that are left\n(dark: few, light: all)", labelpad=10)
        bar.outline.set_visible(False)
        for axes in (above, below):
            axes.spines[:].set_visible(False)
            axes.tick_params(which="both", length=0)
        figure.savefig(path)
        plt.close(figure)


def tile_view(path: Path, site: AttentionSite, panels: list[Tile]) -> None:
    """For each panel: the grid of a site, its tiles, and what the queries of one of them see."""
    with plt.rc_context(STYLE):
        size = (6.4 * len(panels), 8.6)
        figure, rows = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        height, width = panels[0].layout.grid
        figure.get_layout_engine().set(rect=(0, 0, 1, 0.93))
        title = f"Near-sighted Attention: where the queries of one tile look ({height}x{width} tokens)"
        figure.suptitle(title, fontsize=18, fontweight="bold", y=0.98)
        for axes, panel in zip(rows[0], panels, strict=True):
            _draw_tile(axes, panel)
        entries = rows[0][0].get_legend_handles_labels()
        figure.legend(
            *entries, loc="upper center", bbox_to_anchor=(0.5, 0.945), ncols=3, frameon=False, markerscale=1.6
        )
        figure.savefig(path)
        plt.close(figure)


def _draw_tile(axes: Axes, panel: Tile) -> None:
    layout = panel.layout
    height, width = layout.grid
    rows, columns = ([run.start + i * run.size for run in axis for i in range(run.tiles)] for axis in layout.runs())
    sizes = [[run.size for run in axis for _ in range(run.tiles)] for axis in layout.runs()]
    row, column = len(rows) // 2, (len(columns) - 1) // 2
    top, left, tall, wide = rows[row], columns[column], sizes[0][row], sizes[1][column]

    axes.add_patch(Rectangle((0, 0), width, height, color=PAPER, zorder=0))
    axes.add_patch(Rectangle((left, top), wide, tall, color=SKY, lw=0, zorder=1, label="the tile, with its queries"))
    for edge in (*rows, height):
        axes.plot([0, width], [edge, edge], color=FAINT, lw=1.6, zorder=2)
    for edge in (*columns, width):
        axes.plot([edge, edge], [0, height], color=FAINT, lw=1.6, zorder=2)
    axes.add_patch(Rectangle((left, top), wide, tall, fill=False, edgecolor=BLUE, lw=2.6, zorder=4))

    local = _positions((top, left), (tall, wide), layout.window)
    axes.scatter(*local, s=11, color=BLUE, zorder=5, label="keys of the tile")
    far = _positions((0, 0), layout.grid, layout.samples) if layout.samples else np.empty((2, 0))
    style = {"marker": "D", "edgecolor": "white", "lw": 0.4, "zorder": 6}
    axes.scatter(*far, s=30, color=ORANGE, label="samples of the whole grid", **style)
    seen = local.shape[1] + far.shape[1]
    axes.set_title(panel.title, fontsize=13, pad=10)
    axes.set_xlabel(
        f"{len(rows)}x{len(columns)} tiles of up to {tall}x{wide} tokens\n"
        f"each query sees {local.shape[1]} keys of its tile + {far.shape[1]} samples\n"
        f"= {seen} of {layout.tokens} keys ({seen / layout.tokens:.0%})",
        labelpad=10,
        linespacing=1.5,
    )
    axes.set(xlim=(-0.4, width + 0.4), ylim=(height + 0.4, -0.4), aspect="equal", xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _positions(start: tuple[int, int], size: tuple[int, int], stride: tuple[int, int]) -> np.ndarray:
    """The middle of every ``stride``-th token, the first one at ``start``: (2, tokens), x before y."""
    down, across = (np.arange(0, length, step) for length, step in zip(size, stride, strict=True))
    y, x = np.meshgrid(start[0] + down + 0.5, start[1] + across + 0.5, indexing="ij")
    return np.stack([x.ravel(), y.ravel()])


def _grid_label(site: AttentionSite) -> str:
    return f"{site.grid[0]}x{site.grid[1]}" if site.grid is not None else f"{site.q_tokens} tokens"


def _stage_labels(axes: Axes, sites: list[AttentionSite]) -> None:
    row = 0
    for stage, group in groupby(sites, key=lambda site: site.stage):
        count = len(list(group))
        middle = row + (count - 1) / 2
        axes.annotate(
            STAGES[stage],
            (0, middle),
            (-58, 0),
            ("axes fraction", "data"),
            textcoords="offset points",
            va="center",
            ha="right",
            fontweight="bold",
        )
        row += count
        if row < len(sites):
            axes.axhline(row - 0.5, color="white", lw=4)
