"""Wan and its relatives: video, text by cross-attention."""

from typing import Any

import torch

from tests.zoo.recipe import FRAMES, Inputs, Random, Recipe


def wan_inputs(r: Random, *, channels: int = 4, frames: int = FRAMES, text: int = 7, **more: Any) -> Inputs:
    return {
        "hidden_states": r.normal(r.batch, channels, frames, r.height, r.width),
        "timestep": r.timesteps(),
        "encoder_hidden_states": r.normal(r.batch, text, 16),
        **more,
    }


WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 256,
    "ffn_dim": 32,
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 32,
}


def animate2_inputs(r: Random) -> Inputs:
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    frames = 2
    return {
        "hidden_states": [r.normal(16, frames, r.height, r.width) for _ in range(r.batch)],
        "timestep": torch.ones(r.batch),
        "encoder_hidden_states": [r.normal(7, 32) for _ in range(r.batch)],
        "condition_latents": [r.normal(20, frames, r.height, r.width) for _ in range(r.batch)],
        "encoder_hidden_states_image": r.normal(r.batch, 5, 1280),
        "kv_cache": WanAnimate2KVCache(2),
        "kv_cache_mode": "extract",
        "seq_len": frames * r.tokens,
        "offset_grid_sizes": torch.tensor([[frames, *r.grid]]),
    }


ANY = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 256,
    "ffn_dim": 32,
    "num_layers": 2,
    "cross_attn_norm": True,
    "rope_max_seq_len": 32,
    "gate_value": 0.25,
    "deltatime_type": "r",
}


def any_inputs(r: Random, frames: int = FRAMES, **more: Any) -> Inputs:
    return {
        "hidden_states": r.normal(r.batch, frames, 4, r.height, r.width),
        "timestep": torch.full((r.batch, frames), 500.0),
        "r_timestep": torch.full((r.batch, frames), 250.0),
        "encoder_hidden_states": r.normal(r.batch, 7, 16),
        **more,
    }


def helios_inputs(r: Random) -> Inputs:
    return {
        "hidden_states": r.normal(r.batch, 4, 2, r.height, r.width),
        "timestep": r.timesteps(),
        "encoder_hidden_states": r.normal(r.batch, 7, 16),
        "indices_hidden_states": torch.arange(6.0, 8.0)[None].repeat(r.batch, 1),
        "indices_latents_history_short": torch.tensor([[5.0]] * r.batch),
        "indices_latents_history_mid": torch.tensor([[4.0]] * r.batch),
        "indices_latents_history_long": torch.arange(4.0)[None].repeat(r.batch, 1),
        "latents_history_short": r.normal(r.batch, 4, 1, r.height, r.width),
        "latents_history_mid": r.normal(r.batch, 4, 1, r.height, r.width),
        "latents_history_long": r.normal(r.batch, 4, 4, r.height, r.width),
    }


RECIPES = {
    "WanTransformer3DModel": Recipe(
        WAN,
        wan_inputs,
    ),
    # two cross-attentions summed (text, image); the text length is hard-wired to 512 by the split
    "WanTransformer3DModel/i2v": Recipe(
        {**WAN, "image_dim": 16, "added_kv_proj_dim": 24, "pos_embed_seq_len": None},
        lambda r: wan_inputs(r, text=512, encoder_hidden_states_image=r.normal(r.batch, 5, 16)),
    ),
    "SkyReelsV2Transformer3DModel": Recipe(
        WAN,
        wan_inputs,
    ),
    # diffusion forcing: a timestep per frame, block-causal bool mask (1,1,L,L)
    "SkyReelsV2Transformer3DModel/df": Recipe(
        {**WAN, "num_frame_per_block": FRAMES},
        lambda r: {**wan_inputs(r), "timestep": r.integers(1000, r.batch, FRAMES), "enable_diffusion_forcing": True},
    ),
    "ChronoEditTransformer3DModel": Recipe(
        {
            "patch_size": (1, 2, 2),
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 16,
            "freq_dim": 16,
            "ffn_dim": 32,
            "num_layers": 2,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "eps": 1e-6,
            "image_dim": None,
            "added_kv_proj_dim": None,
            "rope_max_seq_len": 64,
            "pos_embed_seq_len": None,
            "rope_temporal_skip_len": 8,
        },
        lambda r: wan_inputs(r, frames=2, encoder_hidden_states_image=None),
    ),
    # a second stack of control blocks
    "WanVACETransformer3DModel": Recipe(
        {**WAN, "num_layers": 3, "vace_layers": [0, 2], "vace_in_channels": 12},
        lambda r: wan_inputs(r, control_hidden_states=r.normal(r.batch, 12, FRAMES, r.height, r.width)),
    ),
    # face cross-attention per frame: (B*T, HW) x (B*T, n)
    "WanAnimateTransformer3DModel": Recipe(
        {
            **WAN,
            "in_channels": 12,
            "latent_channels": 4,
            "image_dim": 16,
            "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 16,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        lambda r: wan_inputs(
            r,
            channels=12,
            text=512,
            encoder_hidden_states_image=r.normal(r.batch, 5, 16),
            pose_hidden_states=r.normal(r.batch, 4, FRAMES - 1, r.height, r.width),
            face_pixel_values=r.normal(r.batch, 3, 5, 16, 16),
        ),
    ),
    # reference ('extract') pass; generation pass needs flex + KV cache
    "WanAnimate2Transformer3DModel": Recipe(
        {
            "patch_size": (1, 2, 2),
            "text_len": 16,
            "in_dim": 36,
            "dim": 64,
            "ffn_dim": 64,
            "freq_dim": 64,
            "text_dim": 32,
            "out_dim": 16,
            "num_heads": 2,
            "num_layers": 2,
            "cross_attn_norm": True,
            "use_img_emb": True,
        },
        animate2_inputs,
    ),
    "AnyFlowTransformer3DModel": Recipe(
        ANY,
        any_inputs,
    ),
    # flex_attention with BlockMask (chunk-causal), padded to 128
    "AnyFlowFARTransformer3DModel": Recipe(
        {**ANY, "compressed_patch_size": (1, 4, 4), "full_chunk_limit": 3},
        lambda r: any_inputs(r, 4, chunk_partition=[2, 2]),
    ),
    # history tokens at three patch sizes in front of the video tokens
    "HeliosTransformer3DModel": Recipe(
        {
            "patch_size": (1, 2, 2),
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 16,
            "freq_dim": 256,
            "ffn_dim": 32,
            "num_layers": 2,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "rope_dim": (4, 4, 4),
            "has_multi_term_memory_patch": True,
            "guidance_cross_attn": True,
            "zero_history_timestep": True,
            "is_amplify_history": True,
        },
        helios_inputs,
    ),
}
