"""diffusers' UNets: trial inputs from the config, and the noise schedules that they were trained with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sloth_fx.model_adapters.adapter import Inputs, ModelAdapter
from sloth_fx.schedule import NoiseSchedule

_TEXT_TOKENS = 77


def _sample(config: Any, dtype: torch.dtype) -> torch.Tensor:
    size = config.sample_size or 64
    rows, columns = (size, size) if isinstance(size, int) else size
    return torch.zeros(2, config.in_channels, rows, columns, dtype=dtype, device="meta")


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _unconditional(model: nn.Module) -> Inputs:
    """``UNet2DModel``: latent (or pixels), timestep, and a class label where the config asks for one."""
    config: Any = model.config
    dtype = _dtype(model)
    inputs: Inputs = {"sample": _sample(config, dtype), "timestep": torch.zeros((), dtype=torch.int64, device="meta")}
    if config.class_embed_type is not None or config.num_class_embeds is not None:
        inputs["class_labels"] = torch.zeros(2, dtype=torch.int64, device="meta")
    return inputs


def _conditional(model: nn.Module) -> Inputs:
    """``UNet2DConditionModel``: also text, class labels, and SDXL's pooled text and size embeddings."""
    config: Any = model.config
    dtype = _dtype(model)

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, device="meta")

    text_dim = config.encoder_hid_dim or config.cross_attention_dim
    if not isinstance(text_dim, int):
        text_dim = text_dim[0]
    inputs: Inputs = {
        "sample": _sample(config, dtype),
        "timestep": torch.zeros((), dtype=torch.int64, device="meta"),
        "encoder_hidden_states": zeros(2, _TEXT_TOKENS, text_dim),
    }
    if config.class_embed_type == "simple_projection" or config.class_embed_type == "projection":
        inputs["class_labels"] = zeros(2, config.projection_class_embeddings_input_dim)
    elif config.class_embed_type is not None or config.num_class_embeds is not None:
        inputs["class_labels"] = torch.zeros(2, dtype=torch.int64, device="meta")
    if config.time_cond_proj_dim is not None:
        inputs["timestep_cond"] = zeros(2, config.time_cond_proj_dim)
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": zeros(2, pooled), "time_ids": zeros(2, 6)}
    return inputs


ADAPTERS = {
    "UNet2DConditionModel": ModelAdapter(
        latent="sample", timestep="timestep", noise=NoiseSchedule(), inputs=_conditional
    ),
    "UNet2DModel": ModelAdapter(
        latent="sample",
        timestep="timestep",
        noise=NoiseSchedule(beta_start=0.0001, beta_end=0.02, kind="linear"),
        inputs=_unconditional,
    ),
}
