"""How often a pipeline paints what a prompt says, by the judge.

python examples/lab/evaluate.py judge                                # the judge itself, on real renderings
python examples/lab/evaluate.py lab-unet --guidance 4 --steps 20
python examples/lab/evaluate.py lab-unet-student --guidance 1 --steps 4 --count 300
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from scenes import draw, full_caption, random_scene
from tqdm import tqdm

from sloth_fx.cli.judge import Judge

HERE = Path(__file__).parent
HELD_OUT = 77  # seeds of prompts and renderings that no training has seen


def prompts(count: int) -> list[str]:
    random = np.random.default_rng(HELD_OUT)
    return [full_caption(random_scene(random)) for _ in range(count)]


def renderings(count: int) -> Iterator[tuple[str, Image.Image]]:
    random = np.random.default_rng(HELD_OUT)
    for _ in range(count):
        scene = random_scene(random)
        yield full_caption(scene), Image.fromarray(draw(scene))


def options(pipe: Any) -> dict[str, Any]:
    """SD3 puts 256 tokens of a T5 after the text unless told otherwise. The lab's T5 is silent, so one does as well."""
    return {"max_sequence_length": 1} if hasattr(pipe, "text_encoder_3") else {}


def paint(pipe: Any, texts: list[str], *, seed: int = 0, batch: int = 50, **given: Any) -> list[Image.Image]:
    """One image per text; each has noise of its own, whatever the batch is."""
    images: list[Image.Image] = []
    for first in tqdm(range(0, len(texts), batch), desc="painting", unit="batch"):
        chosen = texts[first : first + batch]
        noise = [torch.Generator().manual_seed(seed + first + index) for index in range(len(chosen))]
        images += pipe(chosen, generator=noise, height=64, width=64, **options(pipe), **given).images
    return images


def interval(right: int, count: int) -> tuple[float, float]:
    """Wilson's interval at 95 %."""
    z, share = 1.96, right / count
    middle, width = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + z * z / (4 * count**2))
    return (middle - width) / (1 + z * z / count), (middle + width) / (1 + z * z / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="judge, or a pipeline in examples/lab")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--picture", type=Path, help="the first images go there")
    given = parser.parse_args()
    judge = Judge(HERE / "judge")
    began = time.perf_counter()
    if given.folder == "judge":
        texts, images = map(list, zip(*renderings(given.count), strict=True))
    else:
        pipe = DiffusionPipeline.from_pretrained(HERE / given.folder)
        pipe.set_progress_bar_config(disable=True)
        texts = prompts(given.count)
        images = paint(pipe, texts, num_inference_steps=given.steps, guidance_scale=given.guidance)
    seconds = time.perf_counter() - began
    right = int(judge.right(images, texts).sum())
    low, high = interval(right, len(texts))
    print(f"{given.folder}: {right / len(texts):.1%} of {len(texts)} right ({low:.1%} to {high:.1%}); {seconds:.0f} s")
    if given.picture:
        rows = [
            np.concatenate([np.asarray(each) for each in images[first : first + 12]], 1) for first in range(0, 48, 12)
        ]
        Image.fromarray(np.concatenate(rows)).resize((12 * 128, 4 * 128), Image.Resampling.NEAREST).save(given.picture)


if __name__ == "__main__":
    main()
