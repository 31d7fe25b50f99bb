"""What the parameters of a denoiser's forward are called, and what they hold: the table for models of any family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

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


def id_columns(trial: Trial) -> int:
    """How many coordinates each token has: as many as the rotary embedding has axes."""
    return max(3, len(trial.field("axes_dims_rope", ())))


def shapes_of_images(trial: Trial) -> list[Any]:
    """For each image of the batch, the grids in its sequence: just its own."""
    return [[grid_shape(trial)] for _ in range(trial.size("batch"))]


def per_image(description: str) -> Callable[[Trial], Any]:
    """A list with such a tensor for each image of the batch."""
    return lambda trial: [trial.tensor(description) for _ in range(trial.size("batch"))]


def rotary_pair(channels: str) -> tuple[str, str]:
    """Cosines and sines for each token."""
    return f"tokens {channels}", f"tokens {channels}"


def class_labels(trial: Trial) -> torch.Tensor | None:
    """Class numbers, or an embedding where the config wants one projected."""
    if trial.field("class_embed_type") in ("simple_projection", "projection"):
        return trial.tensor("batch projection_class_embeddings_input_dim")
    return trial.tensor("long batch if class_embed_type|num_class_embeds")


def added_conditions(trial: Trial) -> dict[str, Any] | None:
    """SDXL's pooled text and sizes, or the image embeddings of Kandinsky."""
    added: dict[str, Any] = {}
    kind, projection = trial.field("addition_embed_type"), trial.field("encoder_hid_dim_type")
    if kind == "text_time":
        pooled = trial.size("projection_class_embeddings_input_dim") - 6 * trial.size("addition_time_embed_dim")
        added |= {"text_embeds": trial.zeros(trial.size("batch"), pooled), "time_ids": trial.tensor("batch 6")}
    if kind == "text_image":
        added |= {"text_embeds": trial.tensor("batch cross_attention_dim")}
    if kind == "image_hint":
        added |= {"hint": trial.zeros(trial.size("batch"), 3, 8 * trial.size("height"), 8 * trial.size("width"))}
    if kind == "text_image" or projection == "text_image_proj":
        added |= {"image_embeds": trial.tensor("batch cross_attention_dim")}
    elif kind in ("image", "image_hint") or projection == "image_proj":
        added |= {"image_embeds": trial.tensor("batch encoder_hid_dim")}
    return added or None


PARAMETERS: Values = {
    **dict.fromkeys(("timestep", "timesteps", "timestep_r", "r_timestep", "timestep_ratio", "t", "time"), "batch"),
    **dict.fromkeys(("encoder_hidden_states", "context", "prompt_embeds"), f"batch text {TEXT_CHANNELS}"),
    **dict.fromkeys(("encoder_attention_mask", "encoder_hidden_states_mask"), "bool batch text"),
    "encoder_hidden_states_image": "batch 257 image_dim if image_dim",
    "image_embeds": "batch 5 image_embed_dim|image_proj_dim if image_embed_dim|image_proj_dim",
    "pooled_projections": "batch pooled_projection_dim|in_text_dim2",
    "guidance": "batch if guidance_embeds",
    "timestep_cond": "batch time_cond_proj_dim if time_cond_proj_dim",
    "added_cond_kwargs": added_conditions,
    "class_labels": class_labels,
    "controlnet_cond": "batch in_channels height width",
    **dict.fromkeys(("original_size", "target_size", "crop_coords"), "batch 2"),
    "img_ids": lambda trial: trial.grid_ids(columns=id_columns(trial)),
    "txt_ids": lambda trial: trial.zeros(trial.size("text"), id_columns(trial)),
    "img_shapes": shapes_of_images,
    "num_frames": lambda trial: trial.size("frames"),
    "height": lambda trial: trial.size("rows"),
    "width": lambda trial: trial.size("columns"),
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
