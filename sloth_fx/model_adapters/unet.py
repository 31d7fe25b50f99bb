"""UNets: latents as feature maps, and the noise schedules that they were trained with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sloth_fx.model_adapters.parameters import family, video
from sloth_fx.model_adapters.trial import Size, Trial
from sloth_fx.schedule import NoiseSchedule


def _side(index: int) -> Size:
    def side(trial: Trial) -> int:
        sample = trial.field("sample_size", 64)
        return int(sample if isinstance(sample, int) else sample[index])

    return side


SIZES: dict[str, Size] = {"text": 77, "height": _side(0), "width": _side(1)}


def text_of(first: int, last: int | None) -> Callable[[Trial], Any]:
    """The text that AudioLDM2's attentions from ``first`` to ``last`` of each layer read; they differ in channels."""

    def text(trial: Trial) -> Any:
        block = trial.field("cross_attention_dim")
        while isinstance(block, (list, tuple)) and isinstance(block[0], (list, tuple)):
            block = block[0]
        layers = list(block) if isinstance(block, (list, tuple)) else [block]
        channels = [each for each in layers[first:last] if each is not None]
        return trial.zeros(trial.size("batch"), trial.size("text"), channels[0]) if channels else None

    return text


VALUES = {
    "timestep": "long",
    "encoder_hidden_states": "batch text encoder_hid_dim|cross_attention_dim",
    "encoder_attention_mask": None,
}
STABLE_DIFFUSION = NoiseSchedule()
DDPM = NoiseSchedule(beta_start=0.0001, beta_end=0.02, kind="linear")

ADAPTERS = {
    "UNet2DConditionModel": family("bchw", latent="sample", trial=SIZES, values=VALUES, noise=STABLE_DIFFUSION),
    "UNet2DModel": family("bchw", latent="sample", trial=SIZES, values=VALUES, noise=DDPM),
    "DreamLiteUNetModel": family("bchw", latent="sample", trial=SIZES, values=VALUES),
    "AudioLDM2UNet2DConditionModel": family(
        "bchw",
        latent="sample",
        trial=SIZES,
        values={**VALUES, "encoder_hidden_states": text_of(0, 2), "encoder_hidden_states_1": text_of(2, None)},
        noise=NoiseSchedule(beta_start=0.0015, beta_end=0.0195),
    ),
    "Kandinsky3UNet": family(
        "bchw",
        latent="sample",
        trial={"height": 64, "width": 96, "text": 77},
        values={**VALUES, "encoder_attention_mask": "bool batch text"},
    ),
    "StableCascadeUNet": family(
        "bchw",
        latent="sample",
        timestep="timestep_ratio",
        timesteps=1,
        text=("clip_text", "clip_text_pooled"),
        trial={"height": 32, "width": 48, "text": 77},
        values={
            "clip_text_pooled": "batch 1 clip_text_pooled_in_channels",
            "clip_text": "batch text clip_text_in_channels if clip_text_in_channels",
            "clip_img": "batch 1 clip_image_in_channels if clip_image_in_channels",
            "effnet": "batch effnet_in_channels 4 6 if effnet_in_channels",
        },
    ),
    "UVit2DModel": family(
        "bhw",
        latent="input_ids",
        timestep=None,
        trial={"text": 77},
        values={
            "input_ids": "long batch height width",
            "encoder_hidden_states": "batch text encoder_hidden_size",
            "pooled_text_emb": "batch cond_embed_dim",
            "micro_conds": lambda trial: trial.zeros(
                trial.size("batch"), trial.size("micro_cond_embed_dim") // trial.size("micro_cond_encode_dim")
            ),
        },
    ),
    "UniDiffuserModel": family(
        "bchw",
        latent="latent_image_embeds",
        timestep="timestep_img",
        text=("prompt_embeds",),
        trial={**SIZES, "text": "num_text_tokens"},
        values={
            "image_embeds": "batch 1 clip_img_dim",
            "prompt_embeds": "batch text text_dim",
            "timestep_img": "long batch",
            "timestep_text": "long batch",
        },
        noise=STABLE_DIFFUSION,
    ),
    "UNet1DModel": family(
        "bcw",
        latent="sample",
        channels="in_channels",
        trial={"width": "sample_size"},
    ),
    "UNet3DConditionModel": video(latent="sample", trial=SIZES, values=VALUES, noise=STABLE_DIFFUSION),
    "UNetMotionModel": video(
        latent="sample",
        trial={**SIZES, "images": lambda trial: trial.size("batch") * trial.size("time")},
        values={**VALUES, "encoder_hidden_states": "images text cross_attention_dim"},
        noise=NoiseSchedule(kind="linear"),
    ),
    "UNetSpatioTemporalConditionModel": video(
        "btchw",
        latent="sample",
        trial={**SIZES, "text": 1},
        values={
            **VALUES,
            "timestep": "",
            "added_time_ids": lambda trial: trial.zeros(
                trial.size("batch"),
                trial.size("projection_class_embeddings_input_dim") // trial.size("addition_time_embed_dim"),
            ),
        },
    ),
    "I2VGenXLUNet": video(
        latent="sample",
        trial=SIZES,
        values={
            **VALUES,
            "fps": "long batch",
            "image_latents": "batch in_channels time height width",
            "image_embeddings": "batch cross_attention_dim",
        },
    ),
}
