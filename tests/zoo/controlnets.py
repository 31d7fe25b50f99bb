"""ControlNets: half a denoiser, with attention of the same kinds."""

import torch

from tests.zoo.images import sd3_inputs
from tests.zoo.packed import FLUX, flux_inputs
from tests.zoo.recipe import Recipe
from tests.zoo.unets import text_time, unet_inputs

RECIPES = {
    "ControlNetModel": Recipe(
        {
            "block_out_channels": (16, 32),
            "norm_num_groups": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "cross_attention_dim": 16,
            "attention_head_dim": 4,
            "in_channels": 4,
            "layers_per_block": 1,
            "conditioning_embedding_out_channels": (8, 8),
        },
        unet_inputs(controlnet_cond=lambda r: r.normal(r.batch, 3, 2 * r.height, 2 * r.width)),
    ),
    "FluxControlNetModel": Recipe(
        {**FLUX, "pooled_projection_dim": 32},
        lambda r: {**flux_inputs(r), "controlnet_cond": r.normal(r.batch, r.tokens, 4)},
    ),
    "SD3ControlNetModel": Recipe(
        {
            "sample_size": 24,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "caption_projection_dim": 32,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 16,
            "out_channels": 4,
            "pos_embed_max_size": 24,
        },
        lambda r: {**sd3_inputs(r), "controlnet_cond": r.normal(r.batch, 4, r.height, r.width)},
    ),
    # ResidualAttentionBlock uses nn.MultiheadAttention
    "ControlNetUnionModel": Recipe(
        {
            "block_out_channels": (16, 32),
            "norm_num_groups": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "cross_attention_dim": 16,
            "attention_head_dim": 4,
            "in_channels": 4,
            "layers_per_block": 1,
            "num_control_type": 2,
            "num_trans_channel": 16,
            "num_trans_head": 2,
            "num_proj_channel": 16,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 80,
            "conditioning_embedding_out_channels": (16, 16),
        },
        unet_inputs(
            controlnet_cond=lambda r: [r.normal(r.batch, 3, 2 * r.height, 2 * r.width)],
            control_type=lambda r: torch.tensor([[1.0, 0.0]] * r.batch),
            control_type_idx=[0],
            added_cond_kwargs=text_time,
        ),
    ),
}
