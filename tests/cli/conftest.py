"""A tiny Stable Diffusion on disk, with a tokenizer of letters, and what else the commands take."""

import json
import re
import string

import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, ViTConfig, ViTForImageClassification
from typer.testing import CliRunner

from sloth_fx.cli.app import app
from tests.models import TEXT, two_levels

LABELS = ("red circle on the left", "blue square", "circle")


class Result:
    """What a command printed, and how it ended. ``words`` is stderr on one line, without frames."""

    def __init__(self, done):
        self.code, self.out, self.err = done.exit_code, done.stdout, done.stderr
        self.words = " ".join(re.sub("[│╭╮╰╯─]", " ", self.err).split())
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception


@pytest.fixture(scope="session")
def run():
    """Runs ``sloth-fx`` with arguments."""
    return lambda *arguments: Result(CliRunner().invoke(app, [str(each) for each in arguments]))


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """The folder of a pipeline whose images have 8 pixels per latent."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pipelines") / "tiny"
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocabulary = {token: index for index, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    text = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=TEXT,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=11,
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
        pad_token_id=vocabulary["<|endoftext|>"],
    )
    vae = AutoencoderKL(
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=11),
        unet=two_levels(),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def judge(tmp_path_factory):
    """The folder of a classifier with random weights."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=24,
        patch_size=8,
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
        problem_type="multi_label_classification",
    )
    folder = tmp_path_factory.mktemp("judges") / "vit"
    ViTForImageClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def spec(tmp_path):
    """A spec file."""
    file = tmp_path / "spec.json"
    file.write_text(json.dumps({"version": 1, "type": "SlothfulAttention", "keep_middle": False}))
    return file
