"""UNets of other families, and the transformers that UNets are made of, on their own."""

from typing import Any

import torch

from tests.zoo.recipe import Recipe
from tests.zoo.unets import unet_inputs


def dreamlite_processors(model: Any) -> None:
    """The stand-alone class keeps AttnProcessor2_0, which cannot do MQA with qk_norm; the UNet installs this one."""
    from diffusers.models.attention_processor import Attention
    from diffusers.models.unets.unet_dreamlite import DreamLiteAttnProcessor2_0

    for module in model.modules():
        if isinstance(module, Attention):
            module.set_processor(DreamLiteAttnProcessor2_0())


CASCADE = {
    "conditioning_dim": 32,
    "block_out_channels": (32, 32),
    "num_attention_heads": (2, 2),
    "down_num_layers_per_block": (1, 1),
    "up_num_layers_per_block": (1, 1),
    "switch_level": (False,),
    "clip_image_in_channels": 24,
    "clip_text_in_channels": 16,
    "clip_text_pooled_in_channels": 16,
    "dropout": (0.0, 0.0),
}

RECIPES = {
    "Kandinsky3UNet": Recipe(
        {
            "in_channels": 4,
            "time_embedding_dim": 4,
            "groups": 2,
            "attention_head_dim": 4,
            "layers_per_block": 2,
            "block_out_channels": (16, 32, 32),
            "cross_attention_dim": 8,
            "encoder_hid_dim": 32,
        },
        lambda r: {
            "sample": r.normal(r.batch, 4, r.height, r.width),
            "timestep": torch.tensor(10),
            "encoder_hidden_states": r.normal(r.batch, 7, 32),
            "encoder_attention_mask": r.valid(7, 5, torch.int64),
        },
        even=True,
    ),
    # self_attn=True: kv = [image tokens, clip tokens]
    "StableCascadeUNet/prior": Recipe(
        CASCADE,
        lambda r: {
            "sample": r.normal(r.batch, 16, r.rows, r.columns),
            "timestep_ratio": r.uniform(r.batch),
            "clip_text_pooled": r.normal(r.batch, 1, 16),
            "clip_text": r.normal(r.batch, 7, 16),
            "clip_img": r.normal(r.batch, 1, 24),
        },
    ),
    # same attention modules run several times (repeat mappers)
    "StableCascadeUNet/decoder": Recipe(
        {
            "in_channels": 4,
            "out_channels": 4,
            "conditioning_dim": 32,
            "block_out_channels": (16, 32),
            "num_attention_heads": (-1, 2),
            "down_num_layers_per_block": (1, 1),
            "up_num_layers_per_block": (1, 1),
            "down_blocks_repeat_mappers": (1, 1),
            "up_blocks_repeat_mappers": (2, 2),
            "block_types_per_layer": (
                ("SDCascadeResBlock", "SDCascadeTimestepBlock"),
                ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
            ),
            "switch_level": None,
            "clip_text_pooled_in_channels": 16,
            "dropout": (0.0, 0.0),
            "effnet_in_channels": 8,
            "pixel_mapper_in_channels": 3,
            "patch_size": 2,
        },
        lambda r: {
            "sample": r.normal(r.batch, 4, 2 * r.height, 2 * r.width),
            "timestep_ratio": r.uniform(r.batch),
            "clip_text_pooled": r.normal(r.batch, 1, 16),
            "effnet": r.normal(r.batch, 8, r.rows // 2, r.columns // 2),
        },
    ),
    # num_kv_heads=1 (MQA), qk norm
    "DreamLiteUNetModel": Recipe(
        {
            "sample_size": 24,
            "in_channels": 4,
            "out_channels": 4,
            "down_block_types": ("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
            "mid_block_type": "DreamLiteUNetMidBlock2DCrossAttn",
            "up_block_types": ("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
            "block_out_channels": (16, 32),
            "cross_attention_dim": 16,
            "attention_head_dim": 2,
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "transformer_layers_per_block": 1,
        },
        unet_inputs(),
    ),
    # logits over a codebook; up/down blocks have their own attention
    "UVit2DModel": Recipe(
        {
            "hidden_size": 32,
            "cond_embed_dim": 16,
            "micro_cond_encode_dim": 8,
            "micro_cond_embed_dim": 40,
            "encoder_hidden_size": 16,
            "vocab_size": 64,
            "codebook_size": 48,
            "in_channels": 16,
            "block_out_channels": 16,
            "num_res_blocks": 1,
            "block_num_heads": 2,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "sample_size": 12,
        },
        lambda r: {
            "input_ids": r.integers(64, r.batch, r.rows, r.columns),
            "encoder_hidden_states": r.normal(r.batch, 7, 16),
            "pooled_text_emb": r.normal(r.batch, 16),
            "micro_conds": torch.tensor([[128.0, 192, 0, 0, 6]] * r.batch),
        },
    ),
    "UNetControlNetXSModel": Recipe(
        {
            "sample_size": 16,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (8, 16),
            "cross_attention_dim": 8,
            "transformer_layers_per_block": 1,
            "num_attention_heads": 2,
            "norm_num_groups": 4,
            "upcast_attention": False,
            "ctrl_block_out_channels": (4, 8),
            "ctrl_num_attention_heads": 2,
            "ctrl_max_norm_num_groups": 2,
            "ctrl_conditioning_embedding_out_channels": (2, 2),
        },
        unet_inputs(
            dim=8, controlnet_cond=lambda r: r.normal(r.batch, 3, 2 * r.height, 2 * r.width), conditioning_scale=1.0
        ),
    ),
    # no image grid; causal mask
    "PriorTransformer": Recipe(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "embedding_dim": 8,
            "num_embeddings": 13,
            "additional_embeddings": 4,
        },
        lambda r: {
            "hidden_states": r.normal(r.batch, 8),
            "timestep": r.timesteps(),
            "proj_embedding": r.normal(r.batch, 8),
            "encoder_hidden_states": r.normal(r.batch, 13, 8),
            "attention_mask": r.valid(13, 10, torch.bool),
        },
    ),
    "Transformer2DModel": Recipe(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 32,
            "num_layers": 2,
            "cross_attention_dim": 16,
            "norm_num_groups": 8,
        },
        lambda r: {
            "hidden_states": r.normal(r.batch, 32, r.rows, r.columns),
            "encoder_hidden_states": r.normal(r.batch, 7, 16),
        },
    ),
    # discrete, square only
    "Transformer2DModel/vq": Recipe(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 1,
            "cross_attention_dim": 16,
            "sample_size": 8,
            "num_vector_embeds": 20,
            "num_embeds_ada_norm": 100,
        },
        lambda r: {
            "hidden_states": r.integers(20, r.batch, 64),
            "encoder_hidden_states": r.normal(r.batch, 7, 16),
            "timestep": torch.tensor(3),
        },
    ),
    "DualTransformer2DModel": Recipe(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 32,
            "num_layers": 1,
            "cross_attention_dim": 16,
            "norm_num_groups": 8,
        },
        lambda r: {
            "hidden_states": r.normal(r.batch, 32, r.rows, r.columns),
            "encoder_hidden_states": r.normal(r.batch, 77 + 257, 16),
        },
    ),
    # MQA by repeat_interleave before sdpa
    "DreamLiteTransformer2DModel": Recipe(
        {
            "num_attention_heads": 4,
            "attention_head_dim": 8,
            "in_channels": 32,
            "num_layers": 1,
            "cross_attention_dim": 16,
            "norm_num_groups": 8,
            "qk_norm": "rms_norm",
            "num_kv_heads": 1,
            "use_linear_projection": True,
        },
        lambda r: {
            "hidden_states": r.normal(r.batch, 32, r.rows, r.columns),
            "encoder_hidden_states": r.normal(r.batch, 7, 16),
        },
        prepare=dreamlite_processors,
    ),
}
