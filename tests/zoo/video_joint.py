"""HunyuanVideo, Kandinsky and their relatives: text and history in the sequence, sparse attention."""

from typing import Any

import torch

from tests.zoo.recipe import Inputs, Random, Recipe


def flex_only(model: Any) -> None:
    """Per-processor backend; model.set_attention_backend() would also change the process-wide default backend."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    for block in model.visual_transformer_blocks:
        block.self_attention.processor._attention_backend = AttentionBackendName.FLEX


def hunyuan(image_condition: str | None = None, **more: Any) -> Inputs:
    return {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 10,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "patch_size": 2,
        "patch_size_t": 1,
        "guidance_embeds": True,
        "text_embed_dim": 16,
        "pooled_projection_dim": 8,
        "rope_axes_dim": (2, 4, 4),
        "image_condition_type": image_condition,
        **more,
    }


def hunyuan_inputs(r: Random) -> Inputs:
    return {
        "hidden_states": r.normal(r.batch, 4, 2, r.height, r.width),
        "timestep": r.timesteps().float(),
        "encoder_hidden_states": r.normal(r.batch, 13, 16),
        "pooled_projections": r.normal(r.batch, 8),
        "encoder_attention_mask": r.valid(13, 9, torch.int64),
        "guidance": torch.full((r.batch,), 6000.0),
    }


def framepack_inputs(r: Random) -> Inputs:
    return {
        **hunyuan_inputs(r),
        "image_embeds": r.normal(r.batch, 5, 16),
        "indices_latents": torch.arange(8.0, 10.0),
        "latents_clean": r.normal(r.batch, 4, 2, r.height, r.width),
        "indices_latents_clean": torch.tensor([0.0, 7.0]),
        "latents_history_2x": r.normal(r.batch, 4, 2, r.height, r.width),
        "indices_latents_history_2x": torch.tensor([5.0, 6.0]),
        "latents_history_4x": r.normal(r.batch, 4, 4, r.height, r.width),
        "indices_latents_history_4x": torch.arange(1.0, 5.0),
    }


KANDINSKY6 = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": 16,
    "in_text_dim2": 8,
    "time_dim": 16,
    "patch_size": (1, 2, 2),
    "model_dim": 32,
    "ff_dim": 32,
    "num_text_blocks": 1,
    "num_visual_blocks": 2,
    "axes_dims": (4, 6, 6),
    "visual_cond": True,
    "in_audio_dim": 5,
    "out_audio_dim": 5,
    "ca_rope": True,
    "cross_gates": True,
    "fix_modulation": True,
    "text_token_padding": True,
}


def kandinsky6_inputs(r: Random) -> Inputs:
    return {
        "hidden_states": r.normal(r.batch, 2, r.height, r.width, 9),
        "encoder_hidden_states": r.normal(r.batch, 7, 16),
        "pooled_projections": r.normal(r.batch, 8),
        "timestep": r.timesteps().float(),
        "encoder_attention_mask": r.valid(7, 5, torch.bool),
        "audio_hidden_states": r.normal(r.batch, 9, 5),
    }


RECIPES = {
    # joint key mask; RoPE image only; refiner text-only
    "HunyuanVideoTransformer3DModel": Recipe(
        hunyuan(),
        hunyuan_inputs,
    ),
    "HunyuanVideoTransformer3DModel/tokenreplace": Recipe(
        hunyuan("token_replace"),
        hunyuan_inputs,
    ),
    # history tokens in front; image-embeds in the text part
    "HunyuanVideoFramepackTransformer3DModel": Recipe(
        hunyuan(has_image_proj=True, image_proj_dim=16, has_clean_x_embedder=True),
        framepack_inputs,
    ),
    # text = image+glyph+prompt, valid first
    "HunyuanVideo15Transformer3DModel": Recipe(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "mlp_ratio": 2.0,
            "patch_size": 1,
            "patch_size_t": 1,
            "text_embed_dim": 16,
            "text_embed_2_dim": 8,
            "image_embed_dim": 12,
            "rope_axes_dim": (2, 2, 4),
            "target_size": 16,
            "task_type": "i2v",
        },
        lambda r: {
            "hidden_states": r.normal(r.batch, 4, 2, r.rows, r.columns),
            "timestep": r.uniform(r.batch),
            "encoder_hidden_states": r.normal(r.batch, 9, 16),
            "encoder_hidden_states_2": r.normal(r.batch, 4, 8),
            "encoder_attention_mask": r.valid(9, 6, torch.float32),
            "encoder_attention_mask_2": torch.ones(r.batch, 4),
            "image_embeds": r.normal(r.batch, 3, 12),
        },
    ),
    # channels-last latents; RoPE rounds through bfloat16!
    "Kandinsky5Transformer3DModel": Recipe(
        {
            "in_visual_dim": 16,
            "in_text_dim": 16,
            "in_text_dim2": 8,
            "time_dim": 16,
            "out_visual_dim": 16,
            "patch_size": (1, 2, 2),
            "model_dim": 32,
            "ff_dim": 32,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (4, 6, 6),
            "visual_cond": False,
            "attention_type": "regular",
        },
        lambda r: {
            "hidden_states": r.normal(r.batch, 2, r.height, r.width, 16),
            "encoder_hidden_states": r.normal(r.batch, 7, 16),
            "timestep": r.timesteps().float(),
            "pooled_projections": r.normal(r.batch, 8),
            "visual_rope_pos": (torch.arange(2), torch.arange(r.rows), torch.arange(r.columns)),
            "text_rope_pos": torch.arange(7),
        },
    ),
    # NABLA: flex + BlockMask computed from q,k; 8x8 token tiles
    "Kandinsky5Transformer3DModel/nabla": Recipe(
        {
            "in_visual_dim": 16,
            "in_text_dim": 16,
            "in_text_dim2": 8,
            "time_dim": 16,
            "out_visual_dim": 16,
            "patch_size": (1, 2, 2),
            "model_dim": 32,
            "ff_dim": 32,
            "num_text_blocks": 1,
            "num_visual_blocks": 1,
            "axes_dims": (4, 6, 6),
            "visual_cond": False,
            "attention_type": "nabla",
        },
        lambda r: {
            "hidden_states": r.normal(1, 2, 32, 48, 16),
            "encoder_hidden_states": r.normal(1, 7, 16),
            "timestep": torch.tensor([500.0]),
            "pooled_projections": r.normal(1, 8),
            "visual_rope_pos": (torch.arange(2), torch.arange(16), torch.arange(24)),
            "text_rope_pos": torch.arange(7),
            "sparse_params": {
                "sta_mask": torch.ones(1, 1, 12, 12, dtype=torch.bool),
                "to_fractal": True,
                "P": 0.8,
                "attention_type": "nabla",
            },
        },
        prepare=flex_only,
    ),
    # video<->audio cross attention
    "Kandinsky6Transformer3DModel": Recipe(
        KANDINSKY6,
        kandinsky6_inputs,
    ),
    # flex_attention only, BlockMask from a softmax over block means; tokens reordered into 8x8 tiles
    "Kandinsky6SRTransformer3DModel": Recipe(
        {
            "in_visual_dim": 4,
            "out_visual_dim": 8,
            "time_dim": 16,
            "patch_size": (1, 1, 1),
            "model_dim": 32,
            "ff_dim": 32,
            "num_visual_blocks": 2,
            "axes_dims": (4, 6, 6),
            "nabla_window": (3, 3, 3),
        },
        lambda r: {"hidden_states": r.normal(r.batch, 2, 16, 24, 9), "timestep": r.timesteps().float()},
    ),
    # joint attention + extra text cross-attention
    "MotifVideoTransformer3DModel": Recipe(
        {
            "in_channels": 9,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 1,
            "num_single_layers": 2,
            "num_decoder_layers": 1,
            "mlp_ratio": 4.0,
            "patch_size": 2,
            "patch_size_t": 1,
            "qk_norm": "rms_norm",
            "norm_type": "layer_norm",
            "text_embed_dim": 32,
            "image_embed_dim": 4,
            "rope_theta": 256.0,
            "rope_axes_dim": (4, 4, 4),
            "enable_text_cross_attention_dual": True,
            "enable_text_cross_attention_single": True,
        },
        lambda r: {
            "hidden_states": r.normal(r.batch, 9, 2, r.height, r.width),
            "encoder_hidden_states": r.normal(r.batch, 13, 32),
            "timestep": r.timesteps(),
        },
    ),
}
