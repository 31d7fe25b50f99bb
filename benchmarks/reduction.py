"""Slothful Attention in one UNet call: what it saves, against what it could save at most.

    python benchmarks/reduction.py
    python benchmarks/reduction.py --device cuda --compile --sizes 512 1024 2048

Sides, all over the same weights:
    unpatched   the UNet as it is
    patched     sloth_fx.transform(unet, SlothfulAttention.from_node(...)), driven
    naive       the same formula in an attention processor: averages of every window at every call, for keys and values
    ideal       where keys and values are reduced, they are given: neither pooling nor their projections cost anything
    tokens      (--tokens) the reduced tokens are given, and their projections are paid for

The strides change over a run of 30 steps; every distinct set of them is a row, with the number of its steps, and the
row "30 steps" is the average of a step. Target: ideal / patched at least 95 %, and patched / unpatched at most 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from common import (
    Table,
    Timing,
    difference,
    in_mode,
    inputs,
    interleave,
    model_parser,
    modes,
    parse,
    publish,
    sharing_copy,
    slow,
    unet,
    warmups,
)
from naive import Given, GivenTokens, Naive, Node, first_channels, give, with_processors
from torch import nn

import sloth_fx

STEPS = 30


class Setting(NamedTuple):
    """A strength, a moment of the run, and for how many of its steps the same strides hold."""

    slothful: tuple[float, float]
    progress: float
    steps: int
    complete: bool  # whether all settings of this strength are measured

    def __str__(self) -> str:
        return f"{self.slothful[0]:g}/{self.slothful[1]:g} at {self.progress:.2f}"


def pair(text: str) -> tuple[float, float]:
    first, second = (float(part) for part in text.split(":"))
    return first, second


def arguments() -> argparse.Namespace:
    options = model_parser(__doc__, runs=7)
    options.add_argument(
        "--slothful",
        type=pair,
        nargs="+",
        metavar="IN:OUT",
        help="strengths; of all but the first, only the commonest setting is measured. 6:4, on a GPU also 12:8",
    )
    options.add_argument("--tokens", action="store_true", help="also the side `tokens`")
    node, twice = (6.0, 4.0), (12.0, 8.0)
    return parse(
        options,
        cpu={"sizes": [512, 1024], "slothful": [node]},
        gpu={"sizes": [512, 1024, 2048], "slothful": [node, twice]},
    )


def transformed(model: nn.Module, slothful: tuple[float, float], example: dict[str, Any]) -> nn.Module:
    spec = sloth_fx.SlothfulAttention.from_node(in_slothful=slothful[0], out_slothful=slothful[1])
    return sloth_fx.transform(model, spec, example_inputs=example)


def settings(patched: nn.Module, slothful: tuple[float, float], only_commonest: bool) -> list[Setting]:
    """The distinct sets of strides of a run, the commonest first, each at one of the moments where it holds."""
    moment = sloth_fx.context(patched)
    found: dict[Any, list[int]] = {}
    for step in range(STEPS):
        moment.step(step, STEPS)
        found.setdefault(moment.layouts(), []).append(step)
    chosen = sorted(found.values(), key=len, reverse=True)[: 1 if only_commonest else None]
    complete = len(chosen) == len(found)
    return [Setting(slothful, steps[len(steps) // 2] / STEPS, len(steps), complete) for steps in chosen]


def sides_of(
    setting: Setting,
    model: nn.Module,
    patched: nn.Module,
    run: Callable[..., Any],
    example: dict[str, Any],
    mode: str,
    tokens: bool,
) -> dict[str, Callable[[], Any]]:
    moment = sloth_fx.context(patched)

    def call_patched() -> Any:
        moment.at(setting.progress)
        return run(**example)

    node = Node(
        latent=tuple(example["sample"].shape[-2:]),
        first_channels=first_channels(patched),
        progress=setting.progress,
        slothful=setting.slothful,
    )
    give(node, model, patched, example["sample"])
    makers = {"naive": Naive, "ideal": Given, **({"tokens": GivenTokens} if tokens else {})}
    found = {"patched": call_patched}
    for name, make in makers.items():
        found[name] = partial(in_mode(with_processors(sharing_copy(model), make, node), mode), **example)
    return found


def cells(timing: Timing, setting: Setting, tokens: bool) -> list[str]:
    def named(side: str) -> str:
        return f"{side} {setting}"

    reached = timing.reached(named("patched"), "unpatched", named("ideal"))
    return [
        *(timing.ms(side) for side in ("unpatched", *map(named, ("patched", "naive", "ideal")))),
        *([timing.ms(named("tokens"))] if tokens else []),
        f"{timing.ratio(named('patched'), 'unpatched'):.3f}",
        f"{timing.ratio(named('naive'), 'unpatched').median:.3f}",
        f"{100 * timing.ratio(named('ideal'), named('patched')).median:.1f} %",
        f"{100 * reached:.0f} %",
        difference(timing.results[named("patched")], timing.results[named("naive")]),
        str(timing.runs),
    ]


def averages(timing: Timing, chosen: list[Setting], tokens: bool) -> list[str]:
    """The row of a whole run."""
    total = sum(setting.steps for setting in chosen)
    mean = {
        side: sum(setting.steps * timing.median(f"{side} {setting}") for setting in chosen) / total
        for side in ("patched", "naive", "ideal", *(["tokens"] if tokens else []))
    }
    unpatched = timing.median("unpatched")
    return [
        f"{1e3 * unpatched:.0f}",
        *(f"{1e3 * each:.0f}" for each in mean.values()),
        f"{mean['patched'] / unpatched:.3f}",
        f"{mean['naive'] / unpatched:.3f}",
        f"{100 * mean['ideal'] / mean['patched']:.1f} %",
        f"{100 * (unpatched - mean['patched']) / (unpatched - mean['ideal']):.0f} %",
        "",
        str(timing.runs),
    ]


def main() -> None:
    options = arguments()
    table = Table(
        *("model", "pixels", "mode", "in/out at progress", "steps"),
        *("unpatched ms", "patched ms", "naive ms", "ideal ms"),
        *(["tokens ms"] if options.tokens else []),
        *("patched / unpatched", "naive / unpatched", "ideal / patched", "saving reached", "difference", "runs"),
    )
    for name in options.models:
        model = unet(name, device=options.device, dtype=options.dtype, tiny=options.tiny)
        model(**inputs(model, 64, options))  # the first call of all takes longer than any other
        for size in options.sizes:
            example = inputs(model, size, options)
            for mode in modes(options):
                torch.compiler.reset()
                quick = slow(options, size, mode)
                strengths = options.slothful[:1] if quick else options.slothful
                unpatched = in_mode(sharing_copy(model), mode)
                sides: dict[str, Callable[[], Any]] = {"unpatched": partial(unpatched, **example)}
                chosen = []
                for strength in strengths:
                    patched = transformed(model, strength, example)
                    some = settings(patched, strength, quick or strength != strengths[0])
                    run = in_mode(patched, mode)
                    for setting in some:
                        found = sides_of(setting, model, patched, run, example, mode, options.tokens)
                        sides.update({f"{side} {setting}": call for side, call in found.items()})
                    chosen += some
                timing = interleave(
                    sides, options, warmup=warmups(options, mode), what=f"reduction, {name}, {size} pixels, {mode}"
                )
                for setting in chosen:
                    row = cells(timing, setting, options.tokens)
                    table.add(name, str(size), mode, str(setting), str(setting.steps), *row)
                for strength in strengths:
                    whole = [setting for setting in chosen if setting.slothful == strength and setting.complete]
                    if len(whole) > 1:
                        row = averages(timing, whole, options.tokens)
                        label = f"{strength[0]:g}/{strength[1]:g}, {STEPS} steps"
                        table.add(name, str(size), mode, label, str(STEPS), *row)
    publish(options, "reduction", table)


if __name__ == "__main__":
    main()
