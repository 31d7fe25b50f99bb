"""A sampling run with Slothful Attention, step by step: what each step saves, and two pictures of what is left.

    python benchmarks/step_by_step.py
    python benchmarks/step_by_step.py --device cuda --steps 30 --runs 15

At each step the UNet as it is and the patched one are timed in turn. "keys" and "pairs" are the shares that are left,
of the keys of self-attention and of its pairs of a query and a key. The row "all" is the whole run. --out gets
keys_over_steps.png, with how many keys each layer looks at over 30 steps, and near_sighted_tile.png, with where the
queries of one tile of Near-sighted Attention look.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Table, in_mode, inputs, interleave, model_parser, modes, parse, publish, sharing_copy, unet, warmups
from step_pictures import Tile, keys_over_steps, tile_view
from torch import nn

import sloth_fx
from sloth_fx import cost
from sloth_fx.spec import Spec

COLUMNS = ("model", "pixels", "mode", "step", "keys", "pairs", "unpatched ms", "patched ms", "times the UNet", "runs")
PICTURE_STEPS = 30


def arguments() -> argparse.Namespace:
    options = model_parser(__doc__, runs=1)
    options.add_argument("--steps", type=int, default=8, help="of the sampling run, default 8")
    options.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures, default out")
    options.set_defaults(models=["sd15"])
    return parse(options, cpu={"sizes": [512]}, gpu={"sizes": [1024]})


def self_attention(model: nn.Module, spec: Spec, example: dict[str, Any], steps: int) -> list[cost.SiteCost]:
    run = cost.estimate(model, spec, example["sample"].shape[-2:], steps=steps, example_inputs=example)
    return [each for each in run.sites if each.site.kind == "self"]


def keys_left(sites: list[cost.SiteCost], step: int) -> float:
    """The share of the keys that each query sees, over all sites."""
    return sum(each.steps[step].keys for each in sites) / sum(each.before.keys for each in sites)


def pairs_left(sites: list[cost.SiteCost], step: int) -> float:
    return sum(each.flops(each.steps[step]) for each in sites) / sum(each.flops(each.before) for each in sites)


def draw(model: nn.Module, example: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    sites = self_attention(model, sloth_fx.SlothfulAttention(), example, PICTURE_STEPS)
    kept = np.array([[work.keys / each.before.keys for work in each.steps] for each in sites])
    work = np.array([pairs_left(sites, step) for step in range(PICTURE_STEPS)])
    keys_over_steps(folder / "keys_over_steps.png", [each.site for each in sites], kept, work)
    first = self_attention(model, sloth_fx.NearSightedAttention(), example, PICTURE_STEPS)[0]
    moments = {"at the start of sampling": 0, "at the peak, 40% of the run": round(0.4 * PICTURE_STEPS)}
    panels = [Tile(title, first.layouts[step]) for title, step in moments.items()]
    tile_view(folder / "near_sighted_tile.png", first.site, panels)
    print(f"Pictures: {folder / 'keys_over_steps.png'}, {folder / 'near_sighted_tile.png'}", flush=True)


def rows_of(model: nn.Module, example: dict[str, Any], options: argparse.Namespace, mode: str) -> list[list[str]]:
    """A row for each step, and one for the run."""
    spec, steps = sloth_fx.SlothfulAttention(), options.steps
    sites = self_attention(model, spec, example, steps)
    patched = sloth_fx.transform(model, spec, example_inputs=example)
    moment, run = sloth_fx.context(patched), in_mode(patched, mode)
    sides = {"unpatched": partial(in_mode(sharing_copy(model), mode), **example), "patched": partial(run, **example)}
    rows, numbers = [], []
    for step in range(steps):
        moment.step(step, steps)
        timing = interleave(sides, options, warmup=warmups(options, mode), what=f"step {step + 1} of {steps}, {mode}")
        left = keys_left(sites, step), pairs_left(sites, step)
        numbers.append((*left, timing.median("unpatched"), timing.median("patched")))
        times = *map(timing.ms, sides), f"{timing.ratio('patched', 'unpatched'):.3f}"
        rows.append([str(step + 1), *(f"{100 * each:.0f} %" for each in left), *times, str(timing.runs)])
    keys, pairs, before, after = np.transpose(numbers)
    times = f"{1e3 * before.sum():.0f}", f"{1e3 * after.sum():.0f}", f"{after.sum() / before.sum():.3f}"
    return [*rows, ["all", f"{100 * keys.mean():.0f} %", f"{100 * pairs.mean():.0f} %", *times, ""]]


def main() -> None:
    options = arguments()
    table = Table(*COLUMNS)
    for name in options.models:
        model = unet(name, device=options.device, dtype=options.dtype, tiny=options.tiny)
        model(**inputs(model, 64, options))  # the first call of all takes longer than any other
        for size in options.sizes:
            example = inputs(model, size, options)
            if (name, size) == (options.models[0], options.sizes[0]):
                draw(model, example, options.out)
            for mode in modes(options):
                torch.compiler.reset()
                for row in rows_of(model, example, options, mode):
                    table.add(name, str(size), mode, *row)
    publish(options, "step_by_step", table)


if __name__ == "__main__":
    main()
