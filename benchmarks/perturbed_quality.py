"""What guidance by perturbed attention does to images, over scale, with and without classifier-free guidance: accuracy,
backgrounds and Frechet distance, on the pipelines of the lab.

    python benchmarks/perturbed_quality.py            # all points, 300 images each (1000 on a GPU), then the report
    python benchmarks/perturbed_quality.py --models lab-unet --points sag --guidance 1
    python benchmarks/perturbed_quality.py --report   # writes docs/perturbation_measured.md from what there is

Every batch of images is kept as soon as it is made, in out/perturbed/: stop it at any time, and the same command goes
on. What was made with another spec, other weights, steps, guidance, batches or type of device is not used. How it is
measured, and what the words mean, is in docs/perturbation_measured.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from common import environment
from perturbed_plots import curves, images
from perturbed_points import tiers
from perturbed_report import name, text
from perturbed_results import Sheet, gather
from quality import fill, named, parse, parser, pipeline, renderings, require
from quality_points import UNPATCHED, Point
from quality_report import insert
from quality_statistics import Reference
from quality_store import LAB, Conditions, Painter, Store, digest, missing

from sloth_fx.cli.judge import Judge


def main() -> None:
    arguments = parser(__doc__, "perturbed", "perturbation_measured.md")
    arguments.add_argument(
        "--guidance", type=float, nargs="+", default=[1.0, 4.0], help="1 is without; default 1 and 4"
    )
    options = parse(arguments)
    if options.list:
        print(
            "\n".join(f"{model}: {point.name}" for model in options.models for tier in tiers(model) for point in tier)
        )
        return
    torch.set_grad_enabled(False)
    require("judge", *options.models)
    judge = Judge(LAB / "judge")
    real = Reference(renderings(judge, options.out))
    batches = -(-options.images // options.batch)
    for model in options.models:
        weights = digest(LAB / model, LAB / "judge")
        stores = [
            Store(options.out / model, Conditions(weights, options.steps, each, options.batch, options.device.type))
            for each in options.guidance
        ]
        if not options.report:
            pipe = pipeline(model, options.device)
            for points in wanted(model, options.points):
                for store in stores:
                    painter = Painter(pipe, judge, store.conditions, environment(options), whole=True)
                    what = f"{model} {name(store.conditions.guidance)}"
                    fill(store, painter, missing(store, points, batches), what, batches * len(points))
        found = [gather(model, store, batches, real) for store in stores]
        publish(model, [sheet for sheet in found if sheet is not None], options.page)


def wanted(model: str, names: Sequence[str] | None) -> list[list[Point]]:
    """The points with such names, in the groups in which they are to be made; the unpatched model is in the first."""
    kept = named([point for tier in tiers(model) for point in tier], names)
    first, *others = filter(None, ([point for point in tier if point in kept] for tier in tiers(model)))
    return [[UNPATCHED, *first], *others]


def publish(model: str, found: Sequence[Sheet], page: Path) -> None:
    if not found:
        print(f"{model}: nothing is stored of the unpatched model under these conditions; nothing is written")
        return
    sheets = {sheet.conditions.guidance: sheet for sheet in found}
    curves(model, sheets, page.parent / f"perturbation-{model}.png")
    images(model, found[0], page.parent / f"perturbation-{model}-images.png")
    insert(page, model, text(model, sheets))


if __name__ == "__main__":
    main()
