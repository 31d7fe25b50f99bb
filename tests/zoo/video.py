"""Other transformers for video."""

import torch

from tests.zoo.recipe import FRAMES, Random, Recipe


def cog_rope(r: Random, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    return get_3d_rotary_pos_embed(16, ((0, 0), r.grid), r.grid, frames)


COGVIDEOX = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 2,
    "text_embed_dim": 8,
    "num_layers": 2,
    "sample_width": 24,
    "sample_height": 16,
    "sample_frames": 9,
    "patch_size": 2,
    "patch_size_t": None,
    "temporal_compression_ratio": 4,
    "max_text_seq_length": 13,
}


def allegro_rope(r: Random) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    *angles, frames, rows, columns = get_3d_rotary_pos_embed_allegro(24, ((0, 0), r.grid), r.grid, FRAMES)
    places = torch.cartesian_prod(frames.long(), rows.long(), columns.long()).T.reshape(3, 1, -1).contiguous()
    return tuple(angles), tuple(places)


RECIPES = {
    # sincos, no RoPE (2b)
    "CogVideoXTransformer3DModel": Recipe(
        COGVIDEOX,
        lambda r: {
            "hidden_states": r.normal(r.batch, FRAMES, 4, r.height, r.width),
            "encoder_hidden_states": r.normal(r.batch, 13, 8),
            "timestep": r.timesteps(),
        },
    ),
    # RoPE given by the caller, image part only
    "CogVideoXTransformer3DModel/1.5": Recipe(
        {**COGVIDEOX, "patch_size_t": 2, "use_rotary_positional_embeddings": True},
        lambda r: {
            "hidden_states": r.normal(r.batch, 4, 4, r.height, r.width),
            "encoder_hidden_states": r.normal(r.batch, 13, 8),
            "timestep": r.timesteps(),
            "image_rotary_emb": cog_rope(r, 2),
        },
    ),
    # plus perceiver face attention by matmul+softmax
    "ConsisIDTransformer3DModel": Recipe(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 2,
            "text_embed_dim": 8,
            "num_layers": 2,
            "sample_width": 24,
            "sample_height": 16,
            "sample_frames": 9,
            "patch_size": 2,
            "temporal_compression_ratio": 4,
            "max_text_seq_length": 13,
            "use_rotary_positional_embeddings": True,
            "cross_attn_interval": 1,
            "is_kps": False,
            "is_train_face": True,
            "cross_attn_dim_head": 4,
            "cross_attn_num_heads": 2,
            "LFE_id_dim": 2,
            "LFE_vit_dim": 4,
            "LFE_depth": 5,
            "LFE_dim_head": 8,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 1,
            "LFE_num_querie": 3,
            "LFE_output_dim": 21,
            "LFE_ff_mult": 1,
            "LFE_num_scale": 1,
        },
        lambda r: {
            "hidden_states": r.normal(r.batch, FRAMES, 4, r.height, r.width),
            "encoder_hidden_states": r.normal(r.batch, 13, 8),
            "timestep": r.timesteps(),
            "image_rotary_emb": cog_rope(r, FRAMES),
            "id_vit_hidden": [r.normal(r.batch, 5, 4)],
            "id_cond": r.normal(r.batch, 2),
        },
    ),
    "EasyAnimateTransformer3DModel": Recipe(
        {
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "in_channels": 4,
            "mmdit_layers": 1,
            "num_layers": 2,
            "out_channels": 4,
            "patch_size": 2,
            "sample_height": 60,
            "sample_width": 90,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
            "time_position_encoding_type": "3d_rope",
            "timestep_activation_fn": "silu",
        },
        lambda r: {
            "hidden_states": r.normal(r.batch, 4, FRAMES, r.height, r.width),
            "timestep": r.timesteps(),
            "encoder_hidden_states": r.normal(r.batch, 13, 16),
        },
    ),
    # mask over video tokens too
    "AllegroTransformer3DModel": Recipe(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 24,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "cross_attention_dim": 48,
            "sample_width": 24,
            "sample_height": 16,
            "sample_frames": FRAMES,
            "caption_channels": 8,
        },
        lambda r: {
            "hidden_states": r.normal(r.batch, 4, FRAMES, r.height, r.width),
            "encoder_hidden_states": r.normal(r.batch, 7, 8),
            "timestep": r.timesteps(),
            "attention_mask": torch.ones(r.batch, FRAMES, r.height, r.width),
            "encoder_attention_mask": r.valid(7, 5, torch.float32),
            "image_rotary_emb": allegro_rope(r),
        },
    ),
    # alternates spatial (B*T, HW) and temporal (B*HW, T) attention
    "LatteTransformer3DModel": Recipe(
        {
            "sample_size": 16,
            "num_layers": 2,
            "patch_size": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "caption_channels": 8,
            "in_channels": 4,
            "cross_attention_dim": 16,
            "out_channels": 8,
            "attention_bias": True,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "video_length": FRAMES,
        },
        lambda r: {
            "hidden_states": r.normal(r.batch, 4, FRAMES, r.height, r.width),
            "encoder_hidden_states": r.normal(r.batch, 7, 8),
            "timestep": r.timesteps(),
            "enable_temporal_attentions": True,
        },
    ),
    # one sdpa PER SAMPLE on gathered valid tokens
    "MochiTransformer3DModel": Recipe(
        {
            "patch_size": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "pooled_projection_dim": 16,
            "in_channels": 4,
            "out_channels": None,
            "qk_norm": "rms_norm",
            "text_embed_dim": 16,
            "time_embed_dim": 4,
            "activation_fn": "swiglu",
            "max_sequence_length": 13,
        },
        lambda r: {
            "hidden_states": r.normal(r.batch, 4, FRAMES, r.height, r.width),
            "encoder_hidden_states": r.normal(r.batch, 13, 16),
            "timestep": r.timesteps(),
            "encoder_attention_mask": r.valid(13, 9, torch.bool),
        },
    ),
}
