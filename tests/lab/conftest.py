"""The lab is no package: its files import each other by name, as scripts do, and so do the benchmarks."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "lab"))


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder with a judge, and pipelines by name, all with random weights."""
    import models
    import train
    from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
    from transformers import CLIPTextModel

    folder = tmp_path_factory.mktemp("lab")
    torch.manual_seed(0)
    models.judge().save_pretrained(folder / "judge")
    words, vae = models.tokenizer(), models.vae()
    encoder = models.text_encoder(words)
    unet = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(encoder.config),
        tokenizer=words,
        unet=models.unet(),
        scheduler=train.unet_schedule(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    silent_words, silent = models.silent_encoder()
    dit = StableDiffusion3Pipeline(
        transformer=models.dit(),
        scheduler=train.flow_schedule(),
        vae=vae,
        text_encoder=encoder,
        tokenizer=words,
        text_encoder_2=encoder,
        tokenizer_2=words,
        text_encoder_3=silent,
        tokenizer_3=silent_words,
    )
    for pipe in (unet, dit):
        pipe.set_progress_bar_config(disable=True)
    return folder, {"lab-unet": unet, "lab-dit": dit}


@pytest.fixture(scope="module")
def judge(lab):
    from sloth_fx.cli.judge import Judge

    return Judge(lab[0] / "judge")
