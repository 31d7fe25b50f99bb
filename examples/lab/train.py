"""Train the lab's networks, one command each, in this order; every command can be stopped and goes on when run again.

    python examples/lab/train.py text           # the text encoder, shared by all
    python examples/lab/train.py vae            # the autoencoder, shared by all
    python examples/lab/train.py judge          # tells which things are where
    python examples/lab/train.py unet           # lab-unet, a StableDiffusionPipeline
    python examples/lab/train.py dit            # lab-dit, a StableDiffusion3Pipeline
    python examples/lab/train.py unet-student   # lab-unet-student: 4 steps, no guidance
    python examples/lab/train.py dit-student    # lab-dit-student

What is not finished is kept in out/lab/; what is goes to examples/lab/, the denoisers in half precision. On two CPU
cores the first three take minutes and the denoisers hours; on a GPU (--device cuda) all are a matter of minutes.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from distillation import FlowStudent, VelocityStudent
from objectives import Autoencoder, Denoising, Flow, Judging, Text, Velocity, pictures, tokenized
from scenes import random_scene
from torch import Tensor, nn
from training import Loop, mean_weights
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

HERE = Path(__file__).parent
PARTS = HERE.parents[1] / "out" / "lab"
GUIDANCE = 4.0

# steps, batch, learning rate
PLANS: dict[str, tuple[int, int, float]] = {
    "text": (2500, 64, 1e-3),
    "vae": (2000, 32, 1e-3),
    "judge": (9000, 64, 5e-4),
    "unet": (6000, 64, 8e-4),
    "dit": (12000, 64, 6e-4),
    "unet-student": (1200, 32, 1e-4),
    "dit-student": (1200, 32, 1e-4),
}


def arguments() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("network", choices=tuple(PLANS))
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", type=torch.device)
    options.add_argument("--minutes", type=float, default=math.inf, help="stop after so long, to go on another time")
    options.add_argument("--export", action="store_true", help="only write what has been trained so far")
    options.add_argument("--steps", type=int, help="instead of the plan's")
    options.add_argument("--threads", type=int, help="of the CPU; default: all")
    return options.parse_args()


def main() -> None:
    options = arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    steps, batch, rate = PLANS[options.network]
    objective, export = COMMANDS[options.network](batch, options.device)
    folder = PARTS / options.network
    steps = options.steps or steps
    loop = Loop(folder, steps, rate)
    if not options.export and not loop.run(objective, minutes=options.minutes, name=options.network):
        print("stopped; the same command goes on")
        return
    mean_weights(folder, objective.networks)
    objective.networks.eval()
    export(objective)
    log = json.loads((folder / "log.json").read_text(encoding="utf-8"))
    (HERE / "logs").mkdir(exist_ok=True)
    text = json.dumps({"steps": steps, "batch": batch, "learning_rate": rate, "log": thinned(log)})
    (HERE / "logs" / f"{options.network}.json").write_text(text + "\n", encoding="utf-8")


def thinned(log: list[dict[str, float]], most: int = 100) -> list[dict[str, float]]:
    """Means over equal parts of the log."""
    size = math.ceil(len(log) / most)
    parts = [log[first : first + size] for first in range(0, len(log), size)]
    return [{"step": part[-1]["step"], "loss": round(sum(e["loss"] for e in part) / len(part), 5)} for part in parts]


# Parts

Exporter = Callable[[Any], None]


def text(batch: int, device: torch.device) -> tuple[Any, Exporter]:
    tokenizer = models.tokenizer()

    def export(objective: Text) -> None:
        objective.networks["encoder"].save_pretrained(PARTS / "text_encoder")
        tokenizer.save_pretrained(PARTS / "tokenizer")

    return Text(tokenizer, models.text_encoder(tokenizer), batch), export


def vae(batch: int, device: torch.device) -> tuple[Any, Exporter]:
    def export(objective: Autoencoder) -> None:
        trained = objective.networks["vae"]
        random = np.random.default_rng(0)
        with torch.no_grad():
            images = pictures([random_scene(random) for _ in range(512)], device)
            deviation = trained.encode(images).latent_dist.mean.std().item()
        trained.register_to_config(scaling_factor=1 / deviation)
        trained.save_pretrained(PARTS / "autoencoder")

    return Autoencoder(models.vae(), batch, device), export


def judge(batch: int, device: torch.device) -> tuple[Any, Exporter]:
    def export(objective: Judging) -> None:
        objective.networks["judge"].cpu().save_pretrained(HERE / "judge")

    return Judging(models.judge(), batch, device), export


# Denoisers


def unet_schedule() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
        set_alpha_to_one=True,
    )


def flow_schedule() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler()


class Encoder:
    """Texts as the pipelines give them to their denoisers."""

    def __init__(self, device: torch.device) -> None:
        self.tokenizer = CLIPTokenizer.from_pretrained(PARTS / "tokenizer")
        self.model = CLIPTextModelWithProjection.from_pretrained(PARTS / "text_encoder").to(device).eval()
        self.device = device

    @torch.no_grad()
    def for_unet(self, texts: list[str]) -> Tensor:
        return self.model(tokenized(self.tokenizer, texts).to(self.device)).last_hidden_state

    @torch.no_grad()
    def for_dit(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """The encoder twice, as SD3 has two of CLIP's kind."""
        out = self.model(tokenized(self.tokenizer, texts).to(self.device), output_hidden_states=True)
        return torch.cat([out.hidden_states[-2]] * 2, dim=-1), torch.cat([out.text_embeds] * 2, dim=-1)


def _vae() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(PARTS / "autoencoder")


def unet(batch: int, device: torch.device) -> tuple[Any, Exporter]:
    encode = Encoder(device).for_unet
    objective = Velocity(models.unet(), _vae(), encode, batch, device, "unet", scheduler=unet_schedule())
    return objective, lambda trained: unet_pipeline(trained).save_pretrained(HERE / "lab-unet")


def dit(batch: int, device: torch.device) -> tuple[Any, Exporter]:
    objective = Flow(models.dit(), _vae(), Encoder(device).for_dit, batch, device, "dit")
    return objective, lambda trained: dit_pipeline(trained).save_pretrained(HERE / "lab-dit")


def unet_student(batch: int, device: torch.device) -> tuple[Any, Exporter]:
    shared = (_vae(), Encoder(device).for_unet, batch, device, "unet-student")
    teacher = DiffusionPipeline.from_pretrained(HERE / "lab-unet", dtype=torch.float32).unet
    objective = VelocityStudent(teacher, *shared, scheduler=unet_schedule(), guidance=GUIDANCE)
    return objective, lambda trained: unet_pipeline(trained).save_pretrained(HERE / "lab-unet-student")


def dit_student(batch: int, device: torch.device) -> tuple[Any, Exporter]:
    shared = (_vae(), Encoder(device).for_dit, batch, device, "dit-student")
    teacher = DiffusionPipeline.from_pretrained(HERE / "lab-dit", dtype=torch.float32).transformer
    objective = FlowStudent(teacher, *shared, scheduler=flow_schedule(), guidance=GUIDANCE)
    return objective, lambda trained: dit_pipeline(trained).save_pretrained(HERE / "lab-dit-student")


def unet_pipeline(trained: Denoising) -> StableDiffusionPipeline:
    encoder = Encoder(torch.device("cpu"))
    plain = CLIPTextModel(encoder.model.config)
    plain.load_state_dict(encoder.model.text_model.state_dict())
    return StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=plain,
        tokenizer=encoder.tokenizer,
        unet=nn.Module.half(trained.denoiser.cpu()),
        scheduler=unet_schedule(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def dit_pipeline(trained: Denoising) -> StableDiffusion3Pipeline:
    encoder = Encoder(torch.device("cpu"))
    tokenizer_3, text_encoder_3 = models.silent_encoder()
    return StableDiffusion3Pipeline(
        transformer=nn.Module.half(trained.denoiser.cpu()),
        scheduler=flow_schedule(),
        vae=_vae(),
        text_encoder=encoder.model,
        tokenizer=encoder.tokenizer,
        text_encoder_2=encoder.model,
        tokenizer_2=encoder.tokenizer,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )


COMMANDS: dict[str, Callable[[int, torch.device], tuple[Any, Exporter]]] = {
    "text": text,
    "vae": vae,
    "judge": judge,
    "unet": unet,
    "dit": dit,
    "unet-student": unet_student,
    "dit-student": dit_student,
}

if __name__ == "__main__":
    main()
