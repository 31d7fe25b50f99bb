"""What the parameters of a denoiser's forward are called, and what they hold: the table for models of any family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sloth_fx.model_adapters.adapter import ModelAdapter
from sloth_fx.model_adapters.trial import LATENT_CHANNELS, Size, Trial, TrialInputs, Values

TEXT_CHANNELS = (
    "text_dim|text_embed_dim|in_text_dim|context_in_dim|cap_feat_dim|caption_channels|encoder_hid_dim|"
    "joint_attention_dim|cross_attention_input_dim|cond_token_dim|condition_dim|llm_features_dim|dit_text_dim|"
    "encoder_hidden_size|cross_attention_dim|hidden_size"
)
"""Fields of a config that hold the channels of the text, the most telling first."""


def grid_shape(trial: Trial) -> tuple[int, int, int]:
    """(frames, rows, columns) in tokens."""
    return trial.size("frames"), trial.size("rows"), trial.size("columns")


def shapes_of_images(trial: Trial) -> list[Any]:
    """For each image of the batch, the grids in its sequence: just its own."""
    return [[grid_shape(trial)] for _ in range(trial.size("batch"))]


def per_image(description: str) -> Callable[[Trial], Any]:
    """A list with such a tensor for each image of the batch."""
    return lambda trial: [trial.tensor(description) for _ in range(trial.size("batch"))]


def rotary_pair(channels: str) -> tuple[str, str]:
    """Cosines and sines for each token."""
    return f"tokens {channels}", f"tokens {channels}"


PARAMETERS: Values = {
    "timestep": "batch",
    "timesteps": "batch",
    "t": "batch",
    "time": "batch",
    "guidance": "batch if guidance_embeds",
    "encoder_hidden_states": f"batch text {TEXT_CHANNELS}",
    "encoder_attention_mask": "bool batch text",
    "encoder_hidden_states_mask": "bool batch text",
    "context": f"batch text {TEXT_CHANNELS}",
    "encoder_hidden_states_image": "batch 257 image_dim if image_dim",
    "image_embeds": "batch 5 image_embed_dim|image_proj_dim if image_embed_dim|image_proj_dim",
    "pooled_projections": "batch pooled_projection_dim|in_text_dim2",
    "img_ids": lambda trial: trial.grid_ids(),
    "txt_ids": "text 3",
    "img_shapes": shapes_of_images,
    "num_frames": lambda trial: trial.size("frames"),
    "original_size": "batch 2",
    "target_size": "batch 2",
    "crop_coords": "batch 2",
    "class_labels": "long batch if num_class_embeds",
    "controlnet_cond": "batch in_channels height width",
}


def family(
    axes: str,
    *,
    latent: str | None = "hidden_states",
    timestep: str | None = "timestep",
    channels: str = LATENT_CHANNELS,
    trial: Mapping[str, Size] | None = None,
    values: Values | None = None,
    **fields: Any,
) -> ModelAdapter:
    """An adapter of which the trial inputs follow the table above, but for sizes in ``trial`` and ``values``;
    ``fields`` are those of the adapter."""
    inputs = TrialInputs(latent, axes, PARAMETERS, channels, trial or {}, values or {})
    return ModelAdapter(latent=latent, axes=axes, timestep=timestep, inputs=inputs, **fields)


def video(axes: str = "bcthw", *, trial: Mapping[str, Size] | None = None, **rest: Any) -> ModelAdapter:
    """A family whose latent has frames."""
    return family(axes, trial={"frames": 3, **(trial or {})}, **rest)
