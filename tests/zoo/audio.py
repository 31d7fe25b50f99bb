"""Sound, and what else is a sequence."""

import torch

from tests.zoo.recipe import Inputs, Random, Recipe


def stable_audio_rope(r: Random) -> torch.Tensor:
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    return get_1d_rotary_pos_embed(4, r.tokens, use_real=True, repeat_interleave_real=False)


STABLE_AUDIO3 = {
    "io_channels": 8,
    "patch_size": 1,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 4,
    "cond_token_dim": 16,
    "global_cond_dim": 12,
    "local_add_cond_dim": 5,
    "timestep_features_dim": 16,
    "ff_mult": 2,
    "num_memory_tokens": 3,
    "use_differential_attention": False,
}


def stable_audio3_inputs(r: Random) -> Inputs:
    return {
        "hidden_states": r.normal(r.batch, 8, r.tokens),
        "timestep": r.uniform(r.batch),
        "encoder_hidden_states": r.normal(r.batch, 7, 16),
        "global_hidden_states": r.normal(r.batch, 12),
    }


RECIPES = {
    # matmul+softmax+matmul inside SelfAttention1d, no processor
    "UNet1DModel": Recipe(
        {
            "sample_size": 128,
            "in_channels": 2,
            "out_channels": 2,
            "extra_in_channels": 64,
            "time_embedding_type": "fourier",
            "flip_sin_to_cos": True,
            "use_timestep_embedding": False,
            "down_block_types": ("DownBlock1DNoSkip", "AttnDownBlock1D"),
            "up_block_types": ("AttnUpBlock1D", "UpBlock1DNoSkip"),
            "mid_block_type": "UNetMidBlock1D",
            "block_out_channels": (32, 64),
            "norm_num_groups": 8,
        },
        lambda r: {"sample": r.normal(r.batch, 2, 2 * r.tokens), "timestep": r.uniform(r.batch)},
        even=True,
    ),
    # scale_qk=False -> AttnProcessor (baddbmm+softmax), alpha=1
    "T5FilmDecoder": Recipe(
        {
            "input_dims": 16,
            "targets_length": 96,
            "d_model": 32,
            "num_layers": 2,
            "num_heads": 2,
            "d_kv": 16,
            "d_ff": 64,
            "dropout_rate": 0.0,
        },
        lambda r: {
            "encodings_and_masks": [
                (r.normal(r.batch, 13, 32), torch.ones(r.batch, 13)),
                (r.normal(r.batch, 9, 32), torch.ones(r.batch, 9)),
            ],
            "decoder_input_tokens": r.normal(r.batch, 96, 16),
            "decoder_noise_time": r.uniform(r.batch),
        },
    ),
    # causal LM, not a denoiser
    "MiniMaxMusic3RVQDepthDecoder": Recipe(
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "audio_vocab_size": 32,
            "num_codebooks": 4,
            "max_position_embeddings": 16,
        },
        lambda r: {"inputs_embeds": r.normal(r.batch, 16, 32)},
    ),
    # 1-D; GQA; alternating sliding-window (additive mask) and full attention
    "AceStepTransformer1DModel": Recipe(
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "in_channels": 24,
            "audio_acoustic_hidden_dim": 8,
            "patch_size": 2,
            "rope_theta": 10000.0,
            "rms_norm_eps": 1e-6,
            "sliding_window": 16,
        },
        lambda r: {
            "hidden_states": r.normal(r.batch, 2 * r.tokens, 8),
            "timestep": r.uniform(r.batch),
            "timestep_r": r.uniform(r.batch),
            "encoder_hidden_states": r.normal(r.batch, 11, 32),
            "context_latents": r.normal(r.batch, 2 * r.tokens, 16),
        },
    ),
    # 1-D; GQA by repeat_interleave in cross-attention; partial RoPE
    "StableAudioDiTModel": Recipe(
        {
            "sample_size": 96,
            "in_channels": 3,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "num_key_value_attention_heads": 2,
            "out_channels": 3,
            "cross_attention_dim": 16,
            "time_proj_dim": 8,
            "global_states_input_dim": 8,
            "cross_attention_input_dim": 8,
        },
        lambda r: {
            "hidden_states": r.normal(r.batch, 3, r.tokens - 1),
            "timestep": r.uniform(r.batch),
            "encoder_hidden_states": r.normal(r.batch, 7, 8),
            "global_hidden_states": r.normal(r.batch, 1, 8),
            "rotary_embedding": stable_audio_rope(r),
        },
    ),
    "StableAudio3DiTModel": Recipe(
        STABLE_AUDIO3,
        stable_audio3_inputs,
    ),
    # differential attention: two sdpa calls subtracted
    "StableAudio3DiTModel/diff": Recipe(
        {**STABLE_AUDIO3, "use_differential_attention": True},
        stable_audio3_inputs,
    ),
    # masks on both; masked rows zeroed after attention
    "LongCatAudioDiTTransformer": Recipe(
        {"dit_dim": 64, "dit_depth": 2, "dit_heads": 4, "dit_text_dim": 32, "latent_dim": 8, "text_conv": False},
        lambda r: {
            "hidden_states": r.normal(r.batch, r.tokens, 8),
            "encoder_hidden_states": r.normal(r.batch, 7, 32),
            "encoder_attention_mask": r.valid(7, 5, torch.bool),
            "attention_mask": r.valid(r.tokens, r.tokens - 16, torch.bool),
            "timestep": r.uniform(r.batch),
        },
    ),
    # 1-D; condition concatenated on channels
    "MiniMaxMusic3Transformer1DModel": Recipe(
        {
            "in_channels": 8,
            "condition_dim": 16,
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "ff_inner_dim": 32,
            "rotary_dim": 4,
            "fourier_embedding_dim": 8,
        },
        lambda r: {
            "hidden_states": r.normal(r.batch, 8, r.tokens),
            "encoder_hidden_states": r.normal(r.batch, r.tokens, 16),
            "timestep": r.uniform(r.batch),
        },
    ),
    # protein tokens, no grid; per-pair additive bias (B,H,L,L)
    "RFD4ProteinaTransformer": Recipe(
        {
            "nlayers": 2,
            "token_dim": 32,
            "nheads": 2,
            "dim_cond": 16,
            "pair_repr_dim": 12,
            "latent_dim": 4,
            "token_type_emb_dim": 4,
            "cath_emb_dim": 4,
            "t_emb_dim": 8,
            "seq_sep_dim": 8,
            "xt_pair_dist_dim": 6,
            "feats_seq": ("xt_bb_ca", "xt_local_latents"),
            "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"),
            "feats_pair_repr": ("xt_bb_ca_pair_dists",),
            "tri_mult_c": 8,
            "num_sequence_classes": 9,
        },
        lambda r: {
            "bb_ca": r.normal(r.batch, 40, 3),
            "local_latents": r.normal(r.batch, 40, 4),
            "bb_ca_time": r.uniform(r.batch),
            "local_latents_time": r.uniform(r.batch),
            "padding_mask": r.valid(40, 33, torch.bool),
            "conditioning": {
                "is_in_context_conditioning": torch.zeros(r.batch, 40, dtype=torch.bool),
                "supports_local_latent": torch.ones(r.batch, 40, dtype=torch.bool),
            },
        },
    ),
}
