"""What a negative prompt does to the lab's students of few steps: by NAG, by classifier-free guidance, or not at all.

    python benchmarks/negatives.py
    python benchmarks/negatives.py --models lab-unet-student --markdown docs/negatives.md

Each open prompt leaves something open ("a red circle" does not say where), and its negative prompt names one way to
fill it ("on the left"). Measured, by the judge:
    negative rate    how often what the negative prompt names is in the picture
    kept             how often what the prompt asks for is there
    right            of full captions, with a negative prompt that names what is not in them: how often the picture
                     shows what the caption says and nothing else
All sides see the same prompts and noise. What has been painted is kept in out/negatives/, and not painted again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import negatives_plots
import numpy as np
import torch
from common import ROOT, Table, publish
from quality_statistics import change
from quality_store import LAB, digest, evaluate
from scenes import COLOURS, PLACES, SHAPES, full_caption, random_scene
from tqdm import tqdm

import sloth_fx
from sloth_fx.cli.judge import Judge

SEED = 5  # of the prompts; no training has seen them
BASE = sloth_fx.NAG()


@dataclass(frozen=True)
class Task:
    """A prompt, a negative prompt, and what the prompt asks for by the judge's labels; ``None`` for a full caption."""

    prompt: str
    negative: str
    asked: str | None


@dataclass(frozen=True)
class Side:
    """A way to paint. ``guidance`` above 1 is classifier-free guidance, with the negative prompt in its other half."""

    name: str
    nag: sloth_fx.NAG | None = None
    guidance: float = 1.0
    steps: int = 4

    @property
    def calls(self) -> int:
        """Images that pass the denoiser for one that is painted."""
        return self.steps * (2 if self.guidance > 1 else 1)


PLAIN = Side("no negative prompt")
SIDES = (
    PLAIN,
    Side("CFG 1.5", guidance=1.5),
    Side("CFG 2", guidance=2.0),
    Side("CFG 4", guidance=4.0),
    Side("CFG 2, 2 steps", guidance=2.0, steps=2),
    Side("NAG", BASE),
)
SWEEPS = {
    "scale": [Side(f"NAG scale={value:g}", replace(BASE, scale=value)) for value in (2.0, 3.0, 8.0, 12.0)],
    "tau": [Side(f"NAG tau={value:g}", replace(BASE, tau=value)) for value in (1.0, 1.5, 5.0, math.inf)],
    "alpha": [Side(f"NAG alpha={value:g}", replace(BASE, alpha=value)) for value in (0.125, 0.5, 0.75, 1.0)],
    "stop": [Side(f"NAG stop={value:g}", replace(BASE, stop=value)) for value in (0.25, 0.5, 0.75)],
}
ABLATIONS = (  # besides tau=inf, which does not normalise, and alpha=1, which does not blend
    Side("NAG norm=l2", replace(BASE, norm="l2")),
    Side("NAG tau=inf, alpha=1", replace(BASE, tau=math.inf, alpha=1.0)),
)
MEASURES = ("negative", "kept", "right")
Flags = dict[str, list[int]]


def all_sides() -> list[Side]:
    return [*SIDES, *(side for sweep in SWEEPS.values() for side in sweep), *ABLATIONS]


def tasks(count: int) -> list[Task]:
    """Open prompts, a third each with place, colour and shape left open, and as many full captions."""
    random = np.random.default_rng(SEED)

    def one_of(choices: Sequence[str]) -> str:
        return choices[random.integers(len(choices))]

    found = []
    for index in range(count):
        colour, shape, place = one_of(tuple(COLOURS)), one_of(SHAPES), one_of(tuple(PLACES))
        thing = f"{colour} {shape}"
        found.append(
            (Task(f"a {thing}", place, thing), Task(shape, colour, shape), Task(colour, shape, colour))[index % 3]
        )
    for _ in range(count):
        caption = full_caption(random_scene(random))
        others = [word for word in (*COLOURS, *SHAPES) if word not in caption.split()]
        found.append(Task(caption, one_of(others), None))
    return found


class Painter:
    """Paints tasks at any side with one pipeline. Each NAG keeps a patched denoiser of its own."""

    def __init__(self, pipe: Any, judge: Judge, batch: int) -> None:
        self.pipe, self.judge, self.batch = pipe, judge, batch

    def paint(self, side: Side, given: Sequence[Task]) -> Iterator[tuple[list[Task], list[Any]]]:
        """Batch by batch, the tasks and their images."""
        parts = [(first, list(given[first : first + self.batch])) for first in range(0, len(given), self.batch)]
        if side.nag is None:
            for first, part in parts:
                yield part, self._images(side, first, part)
            return
        with sloth_fx.attach(self.pipe, side.nag, negative_prompt=[task.negative for task in parts[0][1]]) as handle:
            for first, part in parts:
                handle.negative_prompt = [task.negative for task in part]
                yield part, self._images(side, first, part)

    def _images(self, side: Side, first: int, part: Sequence[Task]) -> list[Any]:
        noise = [torch.Generator().manual_seed(SEED + first + index) for index in range(len(part))]
        guided = {"negative_prompt": [task.negative for task in part]} if side.guidance > 1 else {}
        return list(
            self.pipe(
                [task.prompt for task in part],
                generator=noise,
                height=64,
                width=64,
                num_inference_steps=side.steps,
                guidance_scale=side.guidance,
                **guided,
                **evaluate.options(self.pipe),
            ).images
        )

    def measure(self, side: Side, given: Sequence[Task], bar: Any) -> Flags:
        flags: Flags = {name: [] for name in MEASURES}
        for part, images in self.paint(side, given):
            for task, shown in zip(part, self.judge.scores(images) > 0.5, strict=True):
                labels = [label for label, there in zip(self.judge.labels, shown, strict=True) if there]
                if task.asked is None:
                    flags["right"].append(int(set(labels) == set(self.judge.promised(task.prompt))))
                    continue
                flags["negative"].append(int(any(has(label, task.negative) for label in labels)))
                flags["kept"].append(int(any(has(label, task.asked) for label in labels)))
            bar.update(len(part))
        return flags


def has(label: str, phrase: str) -> bool:
    return f" {phrase} " in f" {label} "


def measured(model: str, count: int, batch: int) -> dict[str, Flags]:
    """By name of a side, what was seen in its images; from disk, as far as it is there."""
    conditions = repr((digest(LAB / model, LAB / "judge"), count, batch, SEED))
    path = ROOT / "out" / "negatives" / f"{model}-{hashlib.sha256(conditions.encode()).hexdigest()[:12]}.json"
    found: dict[str, Flags] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    given = tasks(count)
    left = [side for side in all_sides() if key(side) not in found]
    painter = Painter(pipeline(model), Judge(LAB / "judge"), batch)
    with tqdm(total=len(left) * len(given), desc=model, unit="image") as bar:
        for side in left:
            bar.set_postfix_str(side.name)
            found[key(side)] = painter.measure(side, given, bar)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found), encoding="utf-8")
    return {side.name: found[key(side)] for side in all_sides()}


def key(side: Side) -> str:
    return repr((side.nag, side.guidance, side.steps))


def pipeline(model: str) -> Any:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(LAB / model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def rate(flags: Sequence[int]) -> str:
    low, high = evaluate.interval(sum(flags), len(flags))
    return f"{100 * sum(flags) / len(flags):.1f} ({100 * low:.1f} to {100 * high:.1f})"


def table(model: str, found: dict[str, Flags]) -> Table:
    rows = Table("model", "side", "calls", "negative rate, %", "kept, %", "right, %", "right: change, points")
    sides = {side.name: side for side in all_sides()}
    for name, flags in found.items():
        moved = change(np.array(found[PLAIN.name]["right"]), np.array(flags["right"])) if name != PLAIN.name else None
        points = (
            "" if moved is None else f"{100 * moved.value:+.1f} ({100 * moved.low:+.1f} to {100 * moved.high:+.1f})"
        )
        rows.add(model, name, str(sides[name].calls), *(rate(flags[each]) for each in MEASURES), points)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["lab-unet-student", "lab-dit-student"])
    parser.add_argument("--count", type=int, default=504, help="open prompts for each side, and as many captions")
    parser.add_argument("--batch", type=int, default=42)
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables into FILE, and plots beside it")
    parser.set_defaults(device=torch.device("cpu"), dtype=torch.float32, tiny=False)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    tables = []
    for model in options.models:
        if not (LAB / model).is_dir():
            print(f"{model} is not trained yet")
            continue
        began = time.perf_counter()
        found = measured(model, options.count, options.batch)
        tables.append(table(model, found))
        print(f"{model}: {time.perf_counter() - began:.0f} s")
        if options.markdown is not None:
            folder = options.markdown.parent
            negatives_plots.sweeps(model, found, BASE, SWEEPS, PLAIN.name, folder / f"negatives-{model}.png")
            painter = Painter(pipeline(model), Judge(LAB / "judge"), 6)
            chosen = [task for task in tasks(options.count) if task.asked is not None][:6]
            shown = {side.name: next(painter.paint(side, chosen))[1] for side in SIDES}
            negatives_plots.grid(chosen, shown, folder / f"negatives-{model}-pictures.png")
    if tables:
        publish(options, "negatives", *tables)


if __name__ == "__main__":
    main()
