"""The denoisers of peers.py: the UNets of common.py, and two transformers, with inputs for pictures of a given size."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import torch
from common import CONFIGS, TEXT_TOKENS, inputs, unet
from torch import nn

TRANSFORMERS: Mapping[str, Mapping[str, Any]] = {
    "pixart": {"num_layers": 28, "caption_channels": 4096, "use_additional_conditions": False},  # PixArt-Sigma
    "sd3": {  # SD3-Medium
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 192,
    },
}
_TINY = {
    "pixart": {"num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32, "caption_channels": 32},
    "sd3": {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "caption_projection_dim": 32,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
    },
}
PIXART_TEXT = 120
SD3_TEXT = 2 * TEXT_TOKENS
MODELS = (*CONFIGS, *TRANSFORMERS)


def denoiser(name: str, size: int, options: argparse.Namespace) -> nn.Module:
    """A model with random weights, for square pictures of ``size`` pixels. ``--layers`` cuts transformers short."""
    if name in CONFIGS:
        return unet(name, device=options.device, dtype=options.dtype, tiny=options.tiny)
    import diffusers

    kind = {"pixart": diffusers.PixArtTransformer2DModel, "sd3": diffusers.SD3Transformer2DModel}[name]
    config = {**TRANSFORMERS[name], **(_TINY[name] if options.tiny else {}), "sample_size": size // 8}
    if options.layers:
        config["num_layers"] = min(options.layers, config["num_layers"])
    with torch.device(options.device):
        model = kind(**config)
    return nn.Module.to(model, options.dtype).eval().requires_grad_(False)


def arguments_for(name: str, model: Any, size: int, options: argparse.Namespace) -> dict[str, Any]:
    """Arguments by keyword, of which the latent is the first."""
    if name in CONFIGS:
        return inputs(model, size, options)
    config, batch = model.config, options.batch

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=options.device).to(options.dtype)

    latent = {"hidden_states": random(batch, config.in_channels, size // 8, size // 8)}
    timestep = torch.full((batch,), 600, device=options.device)
    if name == "pixart":
        text = random(batch, PIXART_TEXT, config.caption_channels)
        sizes = {"resolution": None, "aspect_ratio": None}
        return {**latent, "encoder_hidden_states": text, "timestep": timestep, "added_cond_kwargs": sizes}
    text = random(batch, SD3_TEXT, config.joint_attention_dim)
    pooled = random(batch, config.pooled_projection_dim)
    return {**latent, "encoder_hidden_states": text, "pooled_projections": pooled, "timestep": timestep}


def call(model: Any, example: Mapping[str, Any]) -> Any:
    """The latent goes by position: that is where tomesd looks for it."""
    latent, *rest = example
    return model(example[latent], **{name: example[name] for name in rest})
