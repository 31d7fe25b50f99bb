"""What each operator does to the images of the lab's pipelines: a labelled picture of each pipeline, in out/.

    python examples/demo.py                                  # lab-unet and lab-dit
    python examples/demo.py --pipelines lab-unet-student     # 4 steps, without guidance

The images of a column start from the same noise. The lab's judge says which of them show what their prompt asks for.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from pictures import Row, sheet
from PIL import Image

import sloth_fx
from sloth_fx import cost
from sloth_fx.cli.judge import Judge
from sloth_fx.spec import Spec

LAB, INDEX = Path(__file__).parent / "lab", "model_index.json"
SETTINGS = {"lab-unet": (20, 4.0), "lab-dit": (20, 4.0), "lab-unet-student": (4, 1.0), "lab-dit-student": (4, 1.0)}
PROMPTS = (
    "a large filled red circle on the left and a large filled blue square on the right on a white background",
    "a large filled yellow triangle at the top and a large outlined purple circle at the bottom on a black background",
    "a large filled cyan cross in the middle on a checkered brown background",
    "a small filled green square on the left and a large outlined red triangle on the right on a grey background",
    "a large outlined blue circle in the middle on a striped white background",
    "a small filled purple cross at the top and a small yellow square at the bottom on a dotted black background",
    "a large outlined green cross on the left and a small filled cyan circle on the right on a brown background",
    "a large filled red triangle in the middle on a striped grey background",
)
FOOTER = (
    "All images of a column start from the same noise. Time: of the whole run, over that of the unpatched one, each "
    "measured once. Pairs left: of a query and a key, in all attention of the run. Marks: whether the lab's judge sees "
    "what the prompt says, and nothing else."
)
SILENT_TOKENS = 1  # of the lab's T5, which says nothing: the pipeline's own 256 would be no different
OPERATORS: dict[str, Spec | None] = {  # for 16 x 16 and 8 x 8 tokens; the words go below the name
    "the pipeline as it is": None,
    "rate 6, and 4 in output blocks: keys are pooled": sloth_fx.SlothfulAttention(),
    "tile_size 4: tiles of 4 x 4 tokens, and samples of the rest": sloth_fx.NearSightedTile(tile_size=4),
    "tile_size 4, rate 6 and 4: both at once": sloth_fx.NearSightedAttention(base_tile_size=4, peak_tile_size=4),
    "factors 2: every second row and column of keys": sloth_fx.TokenDownsample(factors=(2,)),
    "tile_size 32: tiles of 4 x 4 tokens": sloth_fx.HyperTile(tile_size=32, swap_size=1),
    "ratio 0.5: half of the tokens are merged": sloth_fx.TokenMerging(ratio=0.5),
}


@dataclass(frozen=True)
class Painter:
    """A pipeline, and what it paints."""

    pipe: Any
    prompts: tuple[str, ...]
    steps: int
    guidance: float

    def paint(self, spec: Spec | None) -> tuple[list[Image.Image], float]:
        """An image for each prompt, from the same noise every time, and the seconds it took."""
        options: dict[str, Any] = {"num_inference_steps": self.steps, "guidance_scale": self.guidance}
        if "max_sequence_length" in inspect.signature(self.pipe.__call__).parameters:
            options["max_sequence_length"] = SILENT_TOKENS
        noise = [torch.Generator().manual_seed(seed) for seed in range(len(self.prompts))]
        with sloth_fx.attach(self.pipe, spec) if spec else nullcontext():
            began = time.perf_counter()
            images = self.pipe(list(self.prompts), generator=noise, **options).images
            return images, time.perf_counter() - began

    def pairs_left(self, spec: Spec) -> float:
        """The share of the pairs of query and key that is left, over all attention of the run."""
        denoiser = getattr(self.pipe, "unet", None) or self.pipe.transformer
        size = denoiser.config.sample_size
        text = self.pipe.tokenizer.model_max_length + (SILENT_TOKENS if hasattr(self.pipe, "tokenizer_3") else 0)
        return cost.estimate(denoiser, spec, (size, size), steps=self.steps, text=text).flops_left


def rows_of(painter: Painter, judge: Judge | None, name: str) -> list[Row]:
    """A row for each operator."""
    rows, first = [], 0.0
    painter.pipe.set_progress_bar_config(desc=f"{name}, warming up", leave=False)
    replace(painter, steps=1).paint(None)  # the first run of all takes longer than any other
    for words, spec in OPERATORS.items():
        title = type(spec).__name__ if spec else "unpatched"
        painter.pipe.set_progress_bar_config(desc=f"{name}, {len(rows) + 1} of {len(OPERATORS)}: {title}", leave=False)
        images, seconds = painter.paint(spec)
        first = first or seconds
        left = painter.pairs_left(spec) if spec else 1.0
        marks = judge.right(images, painter.prompts).tolist() if judge else None
        numbers = [("time", f"{seconds / first:.2f}x"), ("pairs left", f"{left:.0%}")]
        numbers += [("right", f"{sum(marks)} of {len(marks)}")] if marks is not None else []
        rows.append(Row(title, words, numbers, images, marks))
    return rows


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lab", type=Path, default=LAB, metavar="FOLDER", help="holds the pipelines and the judge")
    parser.add_argument("--pipelines", nargs="+", choices=tuple(SETTINGS), help="default: the teachers that are there")
    parser.add_argument("--steps", type=int, help="of the sampling run: 20, and 4 for students")
    parser.add_argument("--tiny", action="store_true", help="2 steps and 2 prompts, to try it out")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures")
    options = parser.parse_args()
    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    if options.pipelines is None:
        teachers = [name for name in ("lab-unet", "lab-dit") if (options.lab / name / INDEX).is_file()]
        options.pipelines = teachers or ["lab-unet"]
    there = [name for name in options.pipelines if (options.lab / name / INDEX).is_file()]
    judged = (options.lab / "judge" / "config.json").is_file()
    missing = [name for name in options.pipelines if name not in there] + ["judge"] * (not judged)
    for name in missing:
        trainer = f"examples/lab/train.py {name.removeprefix('lab-')}"
        print(f"{name} is not in {options.lab}: {trainer} trains it", file=sys.stderr)
    if not there:
        sys.exit("There is no pipeline to show; examples/lab/train.py --help says how to train them.")
    options.out.mkdir(parents=True, exist_ok=True)
    prompts, judge = PROMPTS[: 2 if options.tiny else None], Judge(options.lab / "judge") if judged else None
    for name in there:
        steps, guidance = SETTINGS[name]
        steps = options.steps or (2 if options.tiny else steps)
        painter = Painter(diffusers.DiffusionPipeline.from_pretrained(options.lab / name), prompts, steps, guidance)
        rows = rows_of(painter, judge, name)
        about = f"{name}, a {type(painter.pipe).__name__}: {steps} steps, guidance {guidance:g}"
        path = options.out / f"{name}.png"
        sheet("What each operator does to the images", about, prompts, rows, [FOOTER]).save(path)
        print(f"\n{about}")
        for row in rows:
            print(f"  {row.name:<20}", *(f"  {what} {value:>6}" for what, value in row.numbers))
        print(f"  picture: {path}\n", flush=True)


if __name__ == "__main__":
    main()
