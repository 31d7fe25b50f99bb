"""``sloth-fx plan``: what a spec will do at each step and site, and what that saves."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from sloth_fx.cli.console import add_row, out, say, say_json, table
from sloth_fx.cli.inspect import AsJson, Component, ModelPath
from sloth_fx.cli.models import OpenedModel, import_extra, latent_pixels, open_model
from sloth_fx.cli.options import Dtype, SpecFile, check_writable, width_and_height
from sloth_fx.cli.spec_files import read_specs
from sloth_fx.cost import RunCost, SiteCost, estimate
from sloth_fx.errors import SlothError
from sloth_fx.operators import KeyLayout
from sloth_fx.site import LatentSize

EXAMPLE = "Example: sloth-fx plan stable-diffusion-v1-5 --spec spec.json --size 768x512 --steps 30 --picture plan.png"
_UNITS = ("", "k", "M", "G", "T", "P")


def plan(
    model: ModelPath,
    spec: SpecFile,
    size: Annotated[str, typer.Option(metavar="WxH", help="Of the image, in pixels.")] = "1024x1024",
    steps: Annotated[int, typer.Option(min=1, help="Of the sampling run.")] = 30,
    step: Annotated[int | None, typer.Option(min=1, help="Show this step; default: the one with least to do.")] = None,
    phases: Annotated[int | None, typer.Option(min=1, help="Quantise the schedules to so many phases.")] = None,
    text: Annotated[int | None, typer.Option(min=1, help="Text tokens; default: as in the trial run.")] = None,
    frames: Annotated[int, typer.Option(min=1, help="Frames of the latent of a video.")] = 1,
    latent: Annotated[str | None, typer.Option(metavar="WxH", help="Of the latent, in its own units.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="The type of keys and values.")] = Dtype.FLOAT16,
    component: Component = None,
    picture: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw it, too.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a spec will do at each step and site, and what it saves. The model is built without weights.

    Counted is attention of all kinds: query times key, and weight times value.

    It is that of one image and one call of the model per step; classifier-free guidance makes two. What a spec asks the
    model once more (PAG, SEG, TPG, SLG, SAG, Perturb) is in it.

    Projections, softmax and the pooling itself are not counted.
    """
    if picture is not None:
        check_writable(picture, ".png")
        import_extra("matplotlib")
    specs = read_specs(spec)
    opened = open_model(model, component)
    where = _latent(opened, size, latent, frames)
    cost = estimate(opened.model, specs, where, steps=steps, phases=phases, text=text, number_bytes=dtype.bytes)
    shown = min(range(steps), key=cost.flops) if step is None else step - 1
    if shown >= steps:
        raise typer.BadParameter(f"the run has {steps} steps", param_hint="--step")
    if picture is not None:
        from sloth_fx.cli.plan_picture import draw

        names = ", ".join(dict.fromkeys(type(each).__name__ for each in specs))
        draw(cost, picture, f"{names} on {cost.model}", _of_what(cost))
    if as_json:
        say_json(cost.to_dict())
        return
    say(f"{cost.model}: {_of_what(cost)}\n")
    _show_sites(cost, shown)
    _show_steps(cost)
    _show_totals(cost)
    if picture is not None:
        say(f"picture: {picture}")


def _latent(opened: OpenedModel, size: str, latent: str | None, frames: int) -> LatentSize:
    if latent is not None:
        columns, rows = width_and_height(latent, "--latent")
        return LatentSize(frames, rows, columns)
    pixels = latent_pixels(opened)
    width, height = width_and_height(size)
    if width % pixels or height % pixels:
        raise SlothError(f"--size {width}x{height}: both have to be multiples of {pixels}, pixels per latent")
    return LatentSize(frames, height // pixels, width // pixels)


def _of_what(cost: RunCost) -> str:
    frames, rows, columns = cost.latent
    of_frames = f"{frames} frames of " if frames > 1 else ""
    text = sorted({site.site.text[1] - site.site.text[0] for site in cost.sites if site.site.text is not None})
    words = f", {' and '.join(map(str, text))} text tokens" if text else ""
    return f"latent of {of_frames}{rows} rows and {columns} columns{words}, {len(cost.moments)} steps"


def _show_sites(cost: RunCost, step: int) -> None:
    moment = cost.moments[step]
    sigma = f", sigma {moment.sigma:.3g}" if moment.sigma is not None else ""
    say(f"Step {step + 1} of {len(cost.moments)} (progress {moment.progress:.2f}{sigma}):\n")
    rows = table("sites", "stage", "kind", "grid", "queries", "keys", "of", "left", "what is done", numbers="____rrrr")
    for group in cost.groups():
        first = group[0]
        count = f"  (x{len(group)})" if len(group) > 1 else ""
        grid = first.site.grid_at(cost.latent)
        place = (first.site.name + count, first.site.stage, first.site.kind, "x".join(map(str, grid)) if grid else "-")
        now = first.steps[step]
        left = f"{now.pairs / max(first.before.pairs, 1):.0%}"
        add_row(rows, *place, now.queries, f"{now.keys:.0f}", f"{first.before.keys:.0f}", left, _deed(first, step))
    out().print(rows)
    say("")


def _deed(site: SiteCost, step: int) -> str:
    layout = site.layouts[step]
    twice = ", in two branches" if site.steps[step] != site.once[step] else ""
    if layout is None:
        return (f"- ({site.site.note})" if site.site.note else "-") + twice
    words = ", ".join(_words(layout))
    merged = site.before.queries - site.once[step].queries
    words = ", ".join(filter(None, [words, f"{merged} queries merged" if merged > 0 else ""]))
    return f"{'+'.join(site.site.operators)}: {words or 'nothing at this step'}{twice}"


def _words(layout: KeyLayout) -> Iterator[str]:
    """What a layout does, in words."""
    along = "along the tokens" if layout.flat else ""
    if layout.tile is not None:
        rows, columns = (sum(run.tiles for run in axis) for axis in layout.runs())
        yield f"{rows}x{columns} tiles of {layout.tile[0]}x{layout.tile[1]}"
    if layout.window != (1, 1):
        yield f"1 of {math.prod(layout.window)} keys {along or f'({layout.window[0]}x{layout.window[1]})'}"
    if layout.frame_window > 1:
        yield f"1 of {layout.frame_window} frames"
    if layout.samples is not None:
        yield f"samples of 1 in {math.prod(layout.samples)} {along or f'({layout.samples[0]}x{layout.samples[1]})'}"
    if layout.guided:
        yield "guided"
    if layout.perturbed:
        yield "perturbed"


def _show_steps(cost: RunCost) -> None:
    rows = table("steps", "progress", "attention", "left", "keys and values", "left", numbers="rrrrrr")
    for span in cost.spans():
        first, flops, size = span[0], cost.flops(span[0]), cost.bytes(span[0])
        steps = f"{first + 1}-{span[-1] + 1}" if len(span) > 1 else str(first + 1)
        shares = f"{flops / max(cost.flops_before(), 1):.0%}", f"{size / max(cost.bytes_before(), 1):.0%}"
        place = (steps, f"{cost.moments[first].progress:.2f}")
        add_row(rows, *place, f"{scaled(flops)}FLOP", shares[0], f"{scaled(size)}B", shares[1])
    out().print(rows)
    say("")


def _show_totals(cost: RunCost) -> None:
    steps = len(cost.moments)
    after, before = sum(map(cost.flops, range(steps))), steps * cost.flops_before()
    say(f"Attention of the run: {scaled(after)}FLOP of {scaled(before)}FLOP, {cost.flops_left:.0%} are left.")
    mean = sum(map(cost.bytes, range(steps))) / steps
    say(
        f"Keys and values of a step: {scaled(mean)}B of {scaled(cost.bytes_before())}B, {cost.bytes_left:.0%} are left."
    )
    say(f"Compiled graphs: {cost.graphs} of the whole model, or {cost.block_graphs} of each block compiled by itself.")
    say("For one image and one call per step; all kinds of attention, but no projections, softmax or pooling.")
    if cost.uncounted:
        names = ", ".join(site.name for site in cost.uncounted[:3])
        say(f"Not counted, because linear or on no known grid: {len(cost.uncounted)} sites, such as {names}.")


def scaled(number: float) -> str:
    """A number with three digits and the prefix of its unit: 12.3 G."""
    power = min(int(math.log10(number) // 3), len(_UNITS) - 1) if number >= 1 else 0
    return f"{number / 1000**power:.3g} {_UNITS[power]}"
