"""UNets for video: attention within each frame, then over the frames of each place."""

import torch

from tests.zoo.recipe import FRAMES, Recipe

RECIPES = {
    # spatial attn batch=B*T; temporal attn batch=B*H*W length T
    "UNet3DConditionModel": Recipe(
        {
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
            "cross_attention_dim": 8,
            "attention_head_dim": 4,
            "out_channels": 4,
            "in_channels": 4,
            "layers_per_block": 1,
            "sample_size": 24,
        },
        lambda r: {
            "sample": r.normal(r.batch, 4, FRAMES, r.rows, r.columns),
            "timestep": r.timesteps(),
            "encoder_hidden_states": r.normal(r.batch, 7, 8),
        },
    ),
    # temporal attn batch=B*H*W length T with sinusoidal pos
    "UNetMotionModel": Recipe(
        {
            "block_out_channels": (16, 32),
            "norm_num_groups": 16,
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
            "cross_attention_dim": 16,
            "num_attention_heads": 2,
            "out_channels": 4,
            "in_channels": 4,
            "layers_per_block": 1,
            "sample_size": 24,
            "motion_num_attention_heads": 2,
        },
        lambda r: {
            "sample": r.normal(r.batch, 4, FRAMES, r.rows, r.columns),
            "timestep": r.timesteps(),
            "encoder_hidden_states": r.normal(r.batch * FRAMES, 7, 16),
        },
    ),
    # cross-attention to ONE image token; temporal attn length T
    "UNetSpatioTemporalConditionModel": Recipe(
        {
            "block_out_channels": (32, 64),
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            "cross_attention_dim": 32,
            "num_attention_heads": 4,
            "out_channels": 4,
            "in_channels": 4,
            "layers_per_block": 1,
            "sample_size": 24,
            "projection_class_embeddings_input_dim": 24,
            "addition_time_embed_dim": 8,
        },
        lambda r: {
            "sample": r.normal(r.batch, FRAMES, 4, r.rows, r.columns),
            "timestep": torch.tensor(10.0),
            "encoder_hidden_states": r.normal(r.batch, 1, 32),
            "added_time_ids": torch.tensor([[6, 127, 0.02]] * r.batch),
        },
    ),
    # text kv = [text 7, image-latent tokens, 4 clip tokens]
    "I2VGenXLUNet": Recipe(
        {
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "sample_size": 24,
            "in_channels": 4,
            "out_channels": 4,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
            "cross_attention_dim": 8,
            "attention_head_dim": 4,
            "num_attention_heads": None,
            "norm_num_groups": 2,
        },
        lambda r: {
            "sample": r.normal(r.batch, 4, FRAMES, r.height, r.width),
            "timestep": r.timesteps(),
            "fps": torch.full((r.batch,), 16),
            "image_latents": r.normal(r.batch, 4, FRAMES, r.height, r.width),
            "image_embeddings": r.normal(r.batch, 8),
            "encoder_hidden_states": r.normal(r.batch, 7, 8),
        },
    ),
    # temporal only: batch=B*H*W, length T
    "TransformerTemporalModel": Recipe(
        {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 8, "num_layers": 1, "norm_num_groups": 2},
        lambda r: {"hidden_states": r.normal(r.batch * 5, 8, r.rows, r.columns), "num_frames": 5},
    ),
}
