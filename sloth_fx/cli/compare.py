"""``sloth-fx compare``: a grid of images over the values of one or two fields of a spec."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from sloth_fx.cli.console import add_row, out, progress, say, say_json, table
from sloth_fx.cli.inspect import AsJson
from sloth_fx.cli.judge import Judge, frechet
from sloth_fx.cli.models import import_extra, open_pipeline
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
from sloth_fx.cli.sheet import Cell, Sheet, difference, difference_map
from sloth_fx.cli.spec_files import as_text, read_specs
from sloth_fx.cli.vary import Variation
from sloth_fx.spec import Spec

EXAMPLE = (
    "Example: sloth-fx compare stable-diffusion-v1-5 --spec spec.json --prompt 'a sloth' "
    "--vary rate=1,2,4,8 --vary mode=2d_avg,2d_max -o grid.png"
)
_MOST = 2


@dataclass(frozen=True)
class Painted:
    """The images of one cell, what was varied in it, and numbers about it."""

    values: tuple[str, ...]
    images: list[Any]
    numbers: dict[str, float]


def compare(
    pipeline: Pipeline,
    prompt: Prompt,
    spec: SpecFile,
    vary: Annotated[list[str], typer.Option(help="FIELD=VALUE,VALUE,...; once for columns, and once more for rows.")],
    negative_prompt: NegativePrompt = None,
    seed: Seed = 0,
    steps: Steps = 30,
    guidance: Guidance = None,
    size: Size = None,
    count: Annotated[int, typer.Option(min=1, help="Images per cell, for the numbers; the first is shown.")] = 1,
    judge: Annotated[
        Path | None, typer.Option(help="A folder with an image classifier, whose labels are phrases.")
    ] = None,
    dtype: DtypeOption = Dtype.FLOAT32,
    device: Device = "cpu",
    output: Annotated[Path, typer.Option("-o", "--output", help="The PNG to write.")] = Path("compare.png"),
    as_json: AsJson = False,
) -> None:
    """Paint a grid of images, all from the same noise, over the values of one or two fields of a spec.

    Below each image is a map of where it differs from the unpatched one, on one scale for all.

    With a judge, there is also the share of images that show what the prompt promises, and nothing else.
    """
    check_writable(output, PNG)
    import_extra("matplotlib")
    specs, variations = read_specs(spec), _parsed(vary)
    combinations = list(product(*(each.values for each in variations)))
    cells = [_varied(specs, variations, values) for values in combinations]  # all are checked before any is painted
    settings = Settings.of(
        prompt=prompt,
        negative_prompt=negative_prompt,
        seed=seed,
        steps=steps,
        guidance=guidance,
        size=size,
        count=count,
    )
    referee = Judge(judge) if judge is not None else None
    pipe = open_pipeline(pipeline, dtype.value, device)
    with progress((1 + len(cells)) * steps) as bar:
        task = bar.task_ids[0]
        bar.update(task, description="unpatched")
        plain = paint(pipe, settings, [], lambda: bar.advance(task))
        found = [Painted((), plain, _numbers(plain, plain, referee, prompt))]
        for values, each in zip(combinations, cells, strict=True):
            bar.update(task, description=", ".join(values))
            images = paint(pipe, settings, each, lambda: bar.advance(task))
            found.append(Painted(values, images, _numbers(images, plain, referee, prompt)))
    sheet = _sheet(found[0], found[1:], variations, specs, settings)
    text = as_text(specs, vary=vary, pipeline=type(pipe).__name__, **asdict(settings))
    save_png(sheet.draw(), output, text)
    if as_json:
        cells_data = [
            dict(zip([v.field for v in variations], each.values, strict=False)) | each.numbers for each in found
        ]
        say_json({"output": str(output), "cells": cells_data})
    else:
        _show(found, variations)
        say(f"\n{output}")


def _parsed(vary: Sequence[str]) -> list[Variation]:
    variations = [Variation.parse(each) for each in vary]
    if len(variations) > _MOST:
        raise typer.BadParameter(
            f"a grid has columns and rows: give it once or twice, not {len(variations)} times", param_hint="--vary"
        )
    if len({each.field for each in variations}) < len(variations):
        raise typer.BadParameter(f"{variations[0].field} is given twice", param_hint="--vary")
    return variations


def _varied(specs: Sequence[Spec], variations: Sequence[Variation], values: Sequence[str]) -> list[Spec]:
    found = list(specs)
    for variation, value in zip(variations, values, strict=True):
        found = variation.apply(found, value)
    return found


def _numbers(images: Sequence[Any], plain: Sequence[Any], judge: Judge | None, prompt: str) -> dict[str, float]:
    far = [difference(a, b).mean() for a, b in zip(images, plain, strict=True)]
    numbers = {"difference": float(np.mean(far))}
    if judge is not None:
        numbers["right"] = float(judge.right(images, [prompt] * len(images)).mean())
        if len(images) > 1:
            numbers["frechet"] = frechet(judge.features(images), judge.features(plain))
    return numbers


def _sheet(
    plain: Painted,
    painted: Sequence[Painted],
    variations: Sequence[Variation],
    specs: Sequence[Spec],
    settings: Settings,
) -> Sheet:
    columns = variations[0]
    rows = variations[1] if len(variations) > 1 else None
    differences = {each.values: difference(each.images[0], plain.images[0]) for each in painted}
    most = max(float(each.max()) for each in differences.values())
    by_values = {each.values: each for each in painted}

    def cell(*values: str) -> Cell:
        each = by_values[values]
        return Cell([each.images[0], difference_map(differences[values], most)], _lines(each.numbers))

    first = Cell([plain.images[0]], _lines(plain.numbers)[1:])
    cells = [
        [Cell() if index else first, *(cell(value, *other) for value in columns.values)]
        for index, other in enumerate([(value,) for value in rows.values] if rows is not None else [()])
    ]
    return Sheet(
        title=f"{' + '.join(type(spec).__name__ for spec in specs)}: {' and '.join(each.field for each in variations)}",
        lines=[f'"{settings.prompt}", seed {settings.seed}, {settings.steps} steps'],
        columns=["unpatched", *(f"{columns.field} = {value}" for value in columns.values)],
        rows=[f"{rows.field} = {value}" for value in rows.values] if rows is not None else [""],
        cells=cells,
        footer=[
            f"Below each image: its difference from the unpatched one, from black (0) to yellow ({most:.0f} of 255)."
        ],
    )


def _lines(numbers: dict[str, float]) -> list[str]:
    lines = [f"differs by {numbers['difference']:.1f} of 255"]
    if "right" in numbers:
        lines.append(f"right: {numbers['right']:.0%}")
    if "frechet" in numbers:
        lines.append(f"Frechet: {numbers['frechet']:.3g}")
    return lines


def _show(found: Sequence[Painted], variations: Sequence[Variation]) -> None:
    names = list(found[0].numbers)
    rows = table(*(each.field for each in variations), *names, numbers="_" * len(variations) + "r" * len(names))
    for each in found:
        values = each.values or ("unpatched", *[""] * (len(variations) - 1))
        numbers = (f"{each.numbers[name]:.0%}" if name == "right" else f"{each.numbers[name]:.3g}" for name in names)
        add_row(rows, *values, *numbers)
    out().print(rows)
