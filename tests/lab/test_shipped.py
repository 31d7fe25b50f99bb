"""The pipelines that come along: they load as any folder does, and paint what they are told."""

from pathlib import Path

import pytest
import torch

from sloth_fx.cli.judge import Judge

LAB = Path(__file__).parents[2] / "examples" / "lab"
LARGEST = 12_000_000  # bytes of a file
COUNT = 5
SETTINGS = {
    "lab-unet": {"num_inference_steps": 10, "guidance_scale": 4.0},
    "lab-dit": {"num_inference_steps": 10, "guidance_scale": 4.0},
    "lab-unet-student": {"num_inference_steps": 4, "guidance_scale": 1.0},
    "lab-dit-student": {"num_inference_steps": 4, "guidance_scale": 1.0},
}


def test_every_pipeline_is_tried_here():
    assert {index.parent.name for index in LAB.glob("*/model_index.json")} == SETTINGS.keys()


@pytest.mark.parametrize("name", SETTINGS)
def test_it_paints_what_the_prompt_says(name):
    from diffusers import DiffusionPipeline
    from evaluate import prompts

    assert all(file.stat().st_size <= LARGEST for file in (LAB / name).rglob("*"))
    pipe = DiffusionPipeline.from_pretrained(LAB / name)
    pipe.set_progress_bar_config(disable=True)
    texts = prompts(COUNT)
    images = pipe(texts, generator=torch.Generator().manual_seed(1), height=64, width=64, **SETTINGS[name]).images
    judge = Judge(LAB / "judge")
    assert judge.right(images, texts).sum() >= COUNT - 1
    assert judge.right(images, texts[::-1]).sum() <= 1
