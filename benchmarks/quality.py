"""What operators do to images: Frechet distance, prompt accuracy and time over strength, on the pipelines of the lab.

    python benchmarks/quality.py                          # all points, 300 images each (1000 on a GPU), then the report
    python benchmarks/quality.py --images 1000            # goes on from there
    python benchmarks/quality.py --models lab-unet --points slothful tokendownsample
    python benchmarks/quality.py --report                 # writes docs/quality.md from what there is

Every batch of images is kept as soon as it is made, in out/quality/: stop it at any time, and the same command goes on.
What was made with another spec, other weights, steps, guidance, batches or type of device is not used. How it is
measured, and what the words mean, is in docs/quality.md.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, environment
from numpy.typing import NDArray
from quality_plots import curves, images
from quality_points import OTHER_SEEDS, UNPATCHED, Point, points
from quality_report import gather, insert, text
from quality_store import LAB, Conditions, Painter, Store, digest, evaluate, missing
from tqdm import tqdm

from sloth_fx.cli.judge import Judge

MODELS = {"lab-unet": "unet", "lab-dit": "dit"}  # and what examples/lab/train.py calls them
RENDERINGS = 3000  # for the Frechet distance
FEWEST = 4  # images a point, to have a covariance


def parser(doc: str | None, out: str, page: str) -> ArgumentParser:
    """The options of all that measures images of the lab. Some defaults are filled in by :func:`parse`."""
    options = ArgumentParser(description=doc, formatter_class=RawDescriptionHelpFormatter)
    options.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    options.add_argument("--images", type=int, help="a point, rounded up to batches; 300 on a CPU, else 1000")
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--batch", type=int, help="images painted at once; 25 on a CPU, else 100")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", type=torch.device)
    options.add_argument("--points", nargs="+", metavar="NAME", help="only those whose name contains one of these")
    options.add_argument("--report", action="store_true", help="make no images, only write the report")
    options.add_argument("--out", type=Path, default=ROOT / "out" / out, help="where results are kept")
    options.add_argument("--page", type=Path, default=ROOT / "docs" / page)
    options.add_argument("--list", action="store_true", help="the names of all points, and nothing else")
    return options


def parse(options: ArgumentParser) -> Namespace:
    """The options as given, and the device's defaults where they are not."""
    given = options.parse_args()
    on_cpu = given.device.type == "cpu"
    given.images = given.images or (300 if on_cpu else 1000)
    given.batch = given.batch or (25 if on_cpu else 100)
    if given.images < FEWEST or given.batch < 1 or given.steps < 1:
        options.error(f"--images has to be at least {FEWEST}, --batch and --steps at least 1")
    given.dtype, given.tiny = torch.float32, False  # for the line about the machine
    return given


def main() -> None:
    arguments = parser(__doc__, "quality", "quality.md")
    arguments.add_argument("--guidance", type=float, default=4.0)
    options = parse(arguments)
    if options.list:
        print("\n".join(point.name for point in chosen(None)))
        return
    torch.set_grad_enabled(False)
    require("judge", *options.models)
    judge = Judge(LAB / "judge")
    reals = renderings(judge, options.out)
    batches = -(-options.images // options.batch)
    wanted = chosen(options.points)
    for model in options.models:
        weights = digest(LAB / model, LAB / "judge")
        conditions = Conditions(weights, options.steps, options.guidance, options.batch, options.device.type)
        store = Store(options.out / model, conditions)
        if not options.report:
            left = missing(store, wanted, batches)
            if left:
                painter = Painter(pipeline(model, options.device), judge, conditions, environment(options))
                fill(store, painter, left, model, batches * len(wanted))
        publish(model, store, batches, reals, options.page)


def require(*folders: str) -> None:
    """Raises SystemExit, saying how to make it, where a model of the lab is not there."""
    for folder in folders:
        if not (LAB / folder).is_dir():
            network = MODELS.get(folder, folder)
            raise SystemExit(f"{LAB / folder} is not there: python examples/lab/train.py {network} makes it")


def chosen(names: Sequence[str] | None) -> list[Point]:
    """The points with such names, and always the unpatched ones."""
    return [UNPATCHED, OTHER_SEEDS, *named(points().values(), names)]


def named(found: Iterable[Point], names: Sequence[str] | None) -> list[Point]:
    """The points whose name contains one of ``names``, all for None. Raises SystemExit for a name that is in none."""
    found = list(found)
    for name in names or ():
        if not any(name in each.name for each in found):
            raise SystemExit(f"no point has {name!r} in its name; --list shows them")
    return [each for each in found if names is None or any(name in each.name for name in names)]


def pipeline(model: str, device: torch.device) -> Any:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(LAB / model).to(device, torch.float32)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.to(memory_format=torch.channels_last)  # convolutions of a CPU take less time so
    pipe.set_progress_bar_config(disable=True)
    return pipe


def renderings(judge: Judge, folder: Path, count: int = RENDERINGS) -> NDArray[np.float64]:
    """The judge's features of real renderings, of which the first are of the prompts."""
    path = folder / f"renderings-{count}-{digest(LAB / 'judge')}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        np.save(path, judge.features([image for _, image in evaluate.renderings(count)]))
    return np.load(path)


def fill(store: Store, painter: Painter, left: Sequence[tuple[Point, int]], model: str, total: int) -> None:
    with tqdm(total=total, initial=total - len(left), desc=model, unit="batch", smoothing=0.02) as bar:
        for point, batch in left:
            bar.set_postfix_str(point.name)
            store.save(point, batch, painter.batch(point, batch))
            bar.update()


def publish(model: str, store: Store, batches: int, reals: NDArray[np.float64], page: Path) -> None:
    report = gather(model, store, batches, reals)
    if report is None:
        print(f"{model}: nothing is stored of the unpatched model under these conditions; nothing is written")
        return
    curves(report, page.parent / f"quality-{model}.png")
    images(report, page.parent / f"quality-{model}-images.png")
    insert(page, model, text(report))


if __name__ == "__main__":
    main()
