"""``sloth-fx generate``: images with and without a spec, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from sloth_fx.cli.console import progress, say
from sloth_fx.cli.models import open_pipeline
from sloth_fx.cli.options import (
    Device,
    Dtype,
    DtypeOption,
    Guidance,
    NegativePrompt,
    Pipeline,
    Prompt,
    Seed,
    Size,
    SpecFile,
    Steps,
    check_writable,
)
from sloth_fx.cli.painting import Settings, paint
from sloth_fx.cli.png import PNG, save_png
from sloth_fx.cli.sheet import Cell, Sheet, difference
from sloth_fx.cli.spec_files import as_text, read_specs
from sloth_fx.spec import Spec

EXAMPLE = "Example: sloth-fx generate stable-diffusion-v1-5 --prompt 'a sloth' --spec spec.json --seed 7 -o sloth.png"


def generate(
    pipeline: Pipeline,
    prompt: Prompt,
    spec: SpecFile,
    negative_prompt: NegativePrompt = None,
    seed: Seed = 0,
    steps: Steps = 30,
    guidance: Guidance = None,
    size: Size = None,
    count: Annotated[int, typer.Option(min=1, help="How many images; each has a seed of its own.")] = 1,
    dtype: DtypeOption = Dtype.FLOAT32,
    device: Device = "cpu",
    output: Annotated[Path, typer.Option("-o", "--output", help="The PNG to write.")] = Path("out.png"),
) -> None:
    """Paint images without and with a spec, from the same noise, side by side in one PNG.

    The PNG carries the spec and the settings: sloth-fx spec show reads it, and so does --spec.
    """
    check_writable(output, PNG)
    specs = read_specs(spec)
    settings = Settings.of(
        prompt=prompt,
        negative_prompt=negative_prompt,
        seed=seed,
        steps=steps,
        guidance=guidance,
        size=size,
        count=count,
    )
    pipe = open_pipeline(pipeline, dtype.value, device)
    with progress(2 * steps) as bar:
        bar.update(bar.task_ids[0], description="without")
        without = paint(pipe, settings, [], lambda: bar.advance(bar.task_ids[0]))
        bar.update(bar.task_ids[0], description="with")
        patched = paint(pipe, settings, specs, lambda: bar.advance(bar.task_ids[0]))
    sheet = side_by_side(without, patched, specs, settings).draw()
    save_png(sheet, output, as_text(specs, pipeline=type(pipe).__name__, **asdict(settings)))
    far = sum(difference(a, b).mean() for a, b in zip(without, patched, strict=True)) / count
    images = f"{count} images" if count > 1 else "1 image"
    say(f"{output}: {images} without and with the spec; pixels differ by {far:.1f} of 255")


def side_by_side(without: Sequence[Any], patched: Sequence[Any], specs: Sequence[Spec], settings: Settings) -> Sheet:
    """A row for each image: without, with."""
    names = " + ".join(type(spec).__name__ for spec in specs)
    pairs = zip(without, patched, strict=True)
    return Sheet(
        title=names,
        lines=[f'"{settings.prompt}", {settings.steps} steps'],
        columns=["without", "with"],
        rows=[f"seed {settings.seed + index}" for index in range(settings.count)],
        cells=[[Cell([a]), Cell([b], [f"pixels differ by {difference(b, a).mean():.1f} of 255"])] for a, b in pairs],
    )
