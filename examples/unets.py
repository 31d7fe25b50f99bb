"""UNets for the examples, with random weights: right in shape and speed, but they paint noise.

Real ones come from, for example,
``UNet2DConditionModel.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5", subfolder="unet")``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel

TINY = {"sample_size": 32, "block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 32}


def sd15(*, tiny: bool = False) -> UNet2DConditionModel:
    """The UNet of Stable Diffusion 1.5 (0.86 B parameters); tiny: one of the same blocks, of 32x32 latents."""
    if not tiny:
        return _random(UNet2DConditionModel, sample_size=64, cross_attention_dim=768)
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    return _random(
        UNet2DConditionModel, **TINY, down_block_types=down, up_block_types=up, attention_head_dim=4, norm_num_groups=8
    )


def sdxl(*, tiny: bool = False) -> UNet2DConditionModel:
    """The UNet of Stable Diffusion XL (2.6 B parameters); tiny: one of the same blocks, of 32x32 latents."""
    config: dict[str, Any] = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "use_linear_projection": True,
    }
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    if tiny:
        small = {"transformer_layers_per_block": (1, 2), "attention_head_dim": (4, 8), "norm_num_groups": 8}
        return _random(UNet2DConditionModel, **TINY, **config, **small, down_block_types=down, up_block_types=up)
    return _random(
        UNet2DConditionModel,
        **config,
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        cross_attention_dim=2048,
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        down_block_types=(*down, down[-1]),
        up_block_types=(up[0], *up),
    )


def inputs(unet: UNet2DConditionModel, batch: int = 1) -> dict[str, Any]:
    """Random arguments for a call of the UNet: latent, text, and what else it wants."""
    like = {"dtype": unet.dtype, "device": unet.device}
    size, config = unet.config.sample_size, unet.config
    given: dict[str, Any] = {
        "sample": torch.randn(batch, config.in_channels, size, size, **like),
        "encoder_hidden_states": torch.randn(batch, 77, config.cross_attention_dim, **like),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        edges = torch.tensor([[8.0 * size, 8.0 * size, 0, 0, 8.0 * size, 8.0 * size]] * batch, **like)
        given["added_cond_kwargs"] = {"text_embeds": torch.randn(batch, pooled, **like), "time_ids": edges}
    return given


def _random(make: Callable[..., UNet2DConditionModel], **config: Any) -> UNet2DConditionModel:
    """A model made without torch's own initialisation, which takes a minute for the large ones."""
    with torch.device("meta"):
        unet = make(**config)
    unet.to_empty(device="cpu")
    torch.manual_seed(0)
    noise = torch.empty(2**20 + 7).uniform_(-1, 1)  # of odd length, so that repeats of it do not line up
    for name, weight in unet.named_parameters():
        if weight.ndim == 1:
            weight.data.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        else:
            for part in weight.data.view(-1).split(noise.numel()):
                torch.mul(noise[: part.numel()], weight[0].numel() ** -0.5, out=part)
    return unet.eval()
