"""UNets conditioned on text by cross-attention, or on nothing, of several blocks and processors."""

import math
from collections.abc import Callable
from typing import Any

import torch

from tests.zoo.recipe import Inputs, Random, Recipe


def unet_inputs(text: int = 7, dim: int = 16, scale: int = 1, **more: Any) -> Callable[[Random], Inputs]:
    """Inputs of a UNet that reads ``text`` tokens of ``dim`` channels; ``more`` are further inputs, or makers of such.

    The latent is twice the grid of tokens, times ``scale``.
    """

    def make(r: Random) -> Inputs:
        return {
            "sample": r.normal(r.batch, 4, scale * r.height, scale * r.width),
            "timestep": r.timesteps(),
            "encoder_hidden_states": r.normal(r.batch, text, dim),
            **{name: value(r) if callable(value) else value for name, value in more.items()},
        }

    return make


def text_time(r: Random) -> Inputs:
    """The pooled text and the sizes that SDXL reads."""
    sizes = [128.0, 192.0, 0.0, 0.0, 128.0, 192.0]
    return {"text_embeds": r.normal(r.batch, 32), "time_ids": torch.tensor([sizes] * r.batch)}


def plain_processors(model: Any) -> None:
    """baddbmm, softmax and bmm, as before PyTorch 2."""
    from diffusers.models.attention_processor import AttnProcessor

    model.set_attn_processor(AttnProcessor())


SD15 = {
    "block_out_channels": (16, 32),
    "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
    "out_channels": 4,
    "in_channels": 4,
    "layers_per_block": 1,
    "sample_size": 24,
}

SDXL = {
    **SD15,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2),
    "attention_head_dim": (2, 4),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}

RECIPES = {
    "UNet2DModel": Recipe(
        {
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 8,
            "out_channels": 3,
            "in_channels": 3,
            "layers_per_block": 2,
            "sample_size": 32,
        },
        lambda r: {"sample": r.normal(r.batch, 3, r.height, r.width), "timestep": r.timesteps()},
    ),
    "UNet2DModel/ncsnpp": Recipe(
        {
            "block_out_channels": (32, 64, 64),
            "in_channels": 3,
            "layers_per_block": 1,
            "out_channels": 3,
            "time_embedding_type": "fourier",
            "norm_eps": 1e-6,
            "mid_block_scale_factor": math.sqrt(2.0),
            "norm_num_groups": None,
            "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D"),
            "up_block_types": ("SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"),
        },
        lambda r: {"sample": r.normal(r.batch, 3, r.height, r.width), "timestep": r.uniform(r.batch)},
        even=True,
    ),
    "UNet2DConditionModel/sd15": Recipe(
        SD15,
        unet_inputs(),
    ),
    "UNet2DConditionModel/linproj": Recipe(
        {
            **SD15,
            "use_linear_projection": True,
            "attention_head_dim": (2, 4),
            "only_cross_attention": False,
            "upcast_attention": True,
        },
        unet_inputs(),
    ),
    "UNet2DConditionModel/sdxl": Recipe(
        SDXL,
        unet_inputs(added_cond_kwargs=text_time),
    ),
    "UNet2DConditionModel/classcond": Recipe(
        {
            **SD15,
            "num_class_embeds": 10,
            "resnet_time_scale_shift": "scale_shift",
            "attention_head_dim": 8,
            "down_block_types": ("CrossAttnDownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "CrossAttnUpBlock2D"),
        },
        unet_inputs(class_labels=lambda r: r.integers(10, r.batch)),
    ),
    # additive text mask
    "UNet2DConditionModel/textmask": Recipe(
        SD15,
        unet_inputs(encoder_attention_mask=lambda r: r.valid(7, 5, torch.float32)),
    ),
    # AddedKV: text K/V before image K/V, q image only
    "UNet2DConditionModel/simplecross": Recipe(
        {
            **SD15,
            "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "resnet_time_scale_shift": "scale_shift",
            "attention_head_dim": 8,
        },
        unet_inputs(),
    ),
    # latent upscaler: cross-attention at three levels, self-attention only at the deepest
    "UNet2DConditionModel/kblocks": Recipe(
        {
            "block_out_channels": (32, 32, 64, 64),
            "down_block_types": ("KDownBlock2D",) + ("KCrossAttnDownBlock2D",) * 3,
            "mid_block_type": None,
            "up_block_types": ("KCrossAttnUpBlock2D",) * 3 + ("KUpBlock2D",),
            "cross_attention_dim": 16,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "layers_per_block": 2,
            "act_fn": "gelu",
            "resnet_time_scale_shift": "scale_shift",
            "time_embedding_type": "fourier",
            "timestep_post_act": "gelu",
            "conv_in_kernel": 1,
            "conv_out_kernel": 1,
            "downsample_padding": None,
            "norm_num_groups": None,
            "addition_time_embed_dim": None,
        },
        unet_inputs(scale=4),
    ),
    # gated self-attention over [img, 5 objects]
    "UNet2DConditionModel/gligen": Recipe(
        {**SD15, "attention_type": "gated", "cross_attention_dim": 16},
        unet_inputs(
            cross_attention_kwargs=lambda r: {
                "gligen": {
                    "boxes": r.uniform(r.batch, 5, 4),
                    "positive_embeddings": r.normal(r.batch, 5, 16),
                    "masks": torch.ones(r.batch, 5),
                }
            }
        ),
    ),
    # SlicedAttnProcessor: baddbmm+softmax+bmm in a loop
    "UNet2DConditionModel/sliced": Recipe(
        SD15,
        unet_inputs(),
        prepare=lambda model: model.set_attention_slice(1),
    ),
    # AttnProcessor: baddbmm + softmax + bmm
    "UNet2DConditionModel/vanillaproc": Recipe(
        SD15,
        unet_inputs(),
        prepare=plain_processors,
    ),
    # fused qkv
    "UNet2DConditionModel/fused": Recipe(
        SD15,
        unet_inputs(),
        prepare=lambda model: model.fuse_qkv_projections(),
    ),
}
