"""Transformers for images whose latent is a picture: text by cross-attention, or joined and split again."""

import torch

from tests.zoo.recipe import Inputs, Random, Recipe


def hunyuan_dit_rope(r: Random, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    return get_2d_rotary_pos_embed(dim, ((0, 0), r.grid), r.grid, output_type="pt")


def sd3(dual: tuple[int, ...] = (), qk_norm: str | None = None) -> Inputs:
    return {
        "sample_size": 24,
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "caption_projection_dim": 32,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 16,
        "out_channels": 4,
        "pos_embed_max_size": 24,
        "dual_attention_layers": dual,
        "qk_norm": qk_norm,
    }


def sd3_inputs(r: Random) -> Inputs:
    return {
        "hidden_states": r.normal(r.batch, 4, r.height, r.width),
        "encoder_hidden_states": r.normal(r.batch, 13, 32),
        "pooled_projections": r.normal(r.batch, 16),
        "timestep": r.timesteps(),
    }


def lumina_rope(dim: int) -> torch.Tensor:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    return get_2d_rotary_pos_embed_lumina(dim, 384, 384)


RECIPES = {
    # class insists on square
    "DiTTransformer2DModel": Recipe(
        {
            "in_channels": 4,
            "out_channels": 8,
            "activation_fn": "gelu-approximate",
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "attention_bias": True,
            "num_layers": 2,
            "norm_type": "ada_norm_zero",
            "num_embeds_ada_norm": 8,
            "patch_size": 2,
            "sample_size": 20,
        },
        lambda r: {
            "hidden_states": r.normal(r.batch, 4, 20, 20),
            "timestep": r.timesteps(),
            "class_labels": r.integers(8, r.batch),
        },
    ),
    "PixArtTransformer2DModel": Recipe(
        {
            "sample_size": 16,
            "num_layers": 2,
            "patch_size": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "in_channels": 4,
            "cross_attention_dim": 16,
            "out_channels": 8,
            "attention_bias": True,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 8,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "use_additional_conditions": False,
            "caption_channels": 24,
        },
        lambda r: {
            "hidden_states": r.normal(r.batch, 4, r.height, r.width),
            "timestep": r.timesteps(),
            "encoder_hidden_states": r.normal(r.batch, 7, 24),
            "encoder_attention_mask": r.valid(7, 5, torch.int64),
            "added_cond_kwargs": {"aspect_ratio": None, "resolution": None},
        },
    ),
    # RoPE passed in by the caller; skip connections
    "HunyuanDiT2DModel": Recipe(
        {
            "sample_size": 16,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 4,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "cross_attention_dim": 8,
            "cross_attention_dim_t5": 8,
            "pooled_projection_dim": 4,
            "hidden_size": 16,
            "text_len": 5,
            "text_len_t5": 6,
            "activation_fn": "gelu-approximate",
        },
        lambda r: {
            "hidden_states": r.normal(r.batch, 4, r.height, r.width),
            "encoder_hidden_states": r.normal(r.batch, 5, 8),
            "text_embedding_mask": torch.ones(r.batch, 5),
            "encoder_hidden_states_t5": r.normal(r.batch, 6, 8),
            "text_embedding_mask_t5": torch.ones(r.batch, 6),
            "timestep": r.timesteps().float(),
            "image_meta_size": torch.tensor([[1024.0, 1024, 16, 16, 0, 0]] * r.batch),
            "style": torch.zeros(r.batch, dtype=torch.int64),
            "image_rotary_emb": hunyuan_dit_rope(r, 8),
        },
    ),
    "SD3Transformer2DModel": Recipe(
        sd3(),
        sd3_inputs,
    ),
    # dual attention: extra image-only self-attention in layers 0,1
    "SD3Transformer2DModel/sd35": Recipe(
        sd3((0, 1), "rms_norm"),
        sd3_inputs,
    ),
    # 8 register tokens prepended to the text
    "AuraFlowTransformer2DModel": Recipe(
        {
            "sample_size": 24,
            "patch_size": 2,
            "in_channels": 4,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "caption_projection_dim": 32,
            "joint_attention_dim": 32,
            "out_channels": 4,
            "pos_embed_max_size": 256,
        },
        lambda r: {
            "hidden_states": r.normal(r.batch, 4, r.height, r.width),
            "encoder_hidden_states": r.normal(r.batch, 13, 32),
            "timestep": r.uniform(r.batch),
        },
    ),
    "CogView3PlusTransformer2DModel": Recipe(
        {
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "out_channels": 4,
            "text_embed_dim": 8,
            "time_embed_dim": 8,
            "condition_dim": 2,
            "pos_embed_max_size": 16,
            "sample_size": 24,
        },
        lambda r: {
            "hidden_states": r.normal(r.batch, 4, r.height, r.width),
            "encoder_hidden_states": r.normal(r.batch, 13, 8),
            "timestep": r.timesteps(),
            "original_size": torch.tensor([[128, 192]] * r.batch),
            "target_size": torch.tensor([[128, 192]] * r.batch),
            "crop_coords": torch.zeros(r.batch, 2, dtype=torch.int64),
        },
    ),
    # RoPE on the image part only
    "CogView4Transformer2DModel": Recipe(
        {
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "out_channels": 4,
            "text_embed_dim": 8,
            "time_embed_dim": 8,
            "condition_dim": 4,
        },
        lambda r: {
            "hidden_states": r.normal(r.batch, 4, r.height, r.width),
            "encoder_hidden_states": r.normal(r.batch, 13, 8),
            "timestep": r.timesteps(),
            "original_size": torch.tensor([[128, 192]] * r.batch),
            "target_size": torch.tensor([[128, 192]] * r.batch),
            "crop_coords": torch.zeros(r.batch, 2, dtype=torch.int64),
        },
    ),
    "GlmImageTransformer2DModel": Recipe(
        {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "text_embed_dim": 32,
            "time_embed_dim": 16,
            "condition_dim": 8,
            "prior_vq_quantizer_codebook_size": 64,
        },
        lambda r: {
            "hidden_states": r.normal(r.batch, 4, r.height, r.width),
            "encoder_hidden_states": r.normal(r.batch, 13, 32),
            "prior_token_id": r.integers(64, r.batch, r.tokens),
            "prior_token_drop": torch.zeros(r.batch, r.tokens, dtype=torch.bool),
            "timestep": r.timesteps(),
            "target_size": torch.tensor([[float(r.height), float(r.width)]] * r.batch),
            "crop_coords": torch.zeros(r.batch, 2),
        },
    ),
    # complex RoPE; GQA by repeat_kv; bool mask of ones on self-attention
    "LuminaNextDiT2DModel": Recipe(
        {
            "sample_size": 16,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 2,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "ffn_dim_multiplier": None,
            "norm_eps": 1e-5,
            "learn_sigma": False,
            "qk_norm": True,
            "cross_attention_dim": 32,
            "scaling_factor": 1.0,
        },
        lambda r: {
            "hidden_states": r.normal(r.batch, 4, r.height, r.width),
            "encoder_hidden_states": r.normal(r.batch, 7, 32),
            "timestep": r.uniform(r.batch),
            "encoder_mask": r.valid(7, 5, torch.int64),
            "image_rotary_emb": lumina_rope(8),
            "cross_attention_kwargs": {},
        },
    ),
    # image starts at a different offset per sample; GQA; refiners text-only and image-only
    "Lumina2Transformer2DModel": Recipe(
        {
            "sample_size": 16,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 2,
            "ffn_dim_multiplier": None,
            "norm_eps": 1e-5,
            "scaling_factor": 1.0,
            "axes_dim_rope": (4, 2, 2),
            "axes_lens": (128, 128, 128),
            "cap_feat_dim": 32,
        },
        lambda r: {
            "hidden_states": r.normal(r.batch, 4, r.height, r.width),
            "encoder_hidden_states": r.normal(r.batch, 13, 32),
            "timestep": r.uniform(r.batch),
            "encoder_attention_mask": r.valid(13, 9, torch.bool),
        },
    ),
    # self-attention is ReLU linear attention (no softmax)
    "SanaTransformer2DModel": Recipe(
        {
            "patch_size": 1,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": 8,
            "sample_size": 24,
        },
        lambda r: {
            "hidden_states": r.normal(r.batch, 4, r.rows, r.columns),
            "encoder_hidden_states": r.normal(r.batch, 7, 8),
            "timestep": r.timesteps(),
            "encoder_attention_mask": r.valid(7, 5, torch.int64),
        },
    ),
}
