"""Transformers for packed video, some with sound, and some that mix softmax attention with linear attention."""

import torch

from tests.zoo.recipe import FRAMES, Inputs, Random, Recipe

LTX = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "num_layers": 2,
    "qk_norm": "rms_norm_across_heads",
    "caption_channels": 16,
}


REFINER = {
    **LTX,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 4,
    "audio_cross_attention_dim": 8,
    "rope_double_precision": False,
}


def ltx2_inputs(r: Random) -> Inputs:
    return {
        "hidden_states": r.normal(r.batch, FRAMES * r.tokens, 4),
        "audio_hidden_states": r.normal(r.batch, 9, 4),
        "encoder_hidden_states": r.normal(r.batch, 7, 16),
        "audio_encoder_hidden_states": r.normal(r.batch, 7, 16),
        "timestep": r.uniform(r.batch) * 1000,
        "encoder_attention_mask": r.valid(7, 5, torch.float32),
        "num_frames": FRAMES,
        "height": r.rows,
        "width": r.columns,
        "audio_num_frames": 9,
        "fps": 25.0,
    }


def refiner_inputs(r: Random) -> Inputs:
    from diffusers.models import SanaWMLTX2RefinerTransformer3DModel

    model = SanaWMLTX2RefinerTransformer3DModel(**REFINER)  # for its positions, which have no weights
    return {
        "hidden_states": r.normal(r.batch, 2 * r.tokens, 4),
        "encoder_hidden_states": r.normal(r.batch, 7, 16),
        "timestep": r.uniform(r.batch, 2 * r.tokens) * 1000,
        "video_rotary_emb": model.build_rotary_emb_for_absolute_positions(
            r.batch, [3, 4], r.rows, r.columns, torch.device("cpu"), 25.0
        ),
        "encoder_attention_mask": r.valid(7, 5, torch.float32),
    }


def cameras(r: Random) -> torch.Tensor:
    """A pose (4 x 4) and four intrinsics for each frame."""
    poses = torch.eye(4).repeat(r.batch, FRAMES, 1, 1)
    poses[..., :3, 3] = 0.1 * r.normal(r.batch, FRAMES, 3)
    intrinsics = torch.tensor([10.0, 10.0, 6.0, 4.0]).expand(r.batch, FRAMES, 4)
    return torch.cat([poses.flatten(2), intrinsics], -1)


def h3_inputs(r: Random) -> Inputs:
    """13 text tokens, 6 of sound and two frames, packed by index tensors."""
    text, audio, video = torch.arange(13), torch.arange(13, 19), torch.arange(19, 19 + 2 * r.tokens)
    total = 19 + len(video)
    tags = torch.zeros(total, dtype=torch.int64)
    tags[text], tags[audio] = 1, 2
    positions = torch.zeros(total, 3)
    positions[:, 0] = torch.arange(total)
    positions[video] = torch.cartesian_prod(*(torch.arange(float(n)) for n in (2, *r.grid)))
    return {
        "hidden_states": r.normal(r.batch, len(video), 16),
        "audio_hidden_states": r.normal(r.batch, 6, 6),
        "encoder_hidden_states": r.normal(r.batch, 13, 8),
        "timestep": torch.tensor([0.7, 0.3]),
        "timestep_indices": (tags == 2).to(torch.int64),
        "token_tags": tags,
        "position_ids": positions,
        "video_indices": video,
        "audio_indices": audio,
        "text_indices": text,
    }


RECIPES = {
    # packed input (B,THW,C)
    "LTXVideoTransformer3DModel": Recipe(
        LTX,
        lambda r: {
            "hidden_states": r.normal(r.batch, FRAMES * r.tokens, 4),
            "encoder_hidden_states": r.normal(r.batch, 7, 16),
            "timestep": r.timesteps(),
            "encoder_attention_mask": r.valid(7, 5, torch.bool),
            "num_frames": FRAMES,
            "height": r.rows,
            "width": r.columns,
        },
    ),
    # video/audio self, text cross, a2v and v2a cross attention
    "LTX2VideoTransformer3DModel": Recipe(
        {**REFINER, "patch_size": 1, "patch_size_t": 1},
        ltx2_inputs,
    ),
    # optional KV cache of earlier frames prepended to K/V
    "SanaWMLTX2RefinerTransformer3DModel": Recipe(
        REFINER,
        refiner_inputs,
    ),
    # self-attention is ReLU linear attention with RoPE (no softmax)
    "SanaVideoTransformer3DModel": Recipe(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12,
            "cross_attention_dim": 24,
            "caption_channels": 16,
            "mlp_ratio": 2.5,
            "dropout": 0.0,
            "attention_bias": False,
            "sample_size": 8,
            "patch_size": (1, 2, 2),
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 32,
        },
        lambda r: {
            "hidden_states": r.normal(r.batch, 4, 2, r.height, r.width),
            "encoder_hidden_states": r.normal(r.batch, 7, 16),
            "timestep": r.timesteps(),
        },
    ),
    # gated delta net + every n-th block softmax; camera branch
    "SanaWMTransformer3DModel": Recipe(
        {
            "in_channels": 4,
            "num_layers": 2,
            "hidden_size": 48,
            "num_attention_heads": 2,
            "softmax_every_n": 2,
            "linear_head_dim": 24,
            "chunk_plucker_channels": 6,
            "chunk_plucker_post_attn_blocks": 2,
            "caption_channels": 16,
        },
        lambda r: {
            "hidden_states": r.normal(r.batch, 4, FRAMES, r.rows, r.columns),
            "timestep": torch.full((r.batch, 1, FRAMES), 500.0),
            "encoder_hidden_states": r.normal(r.batch, 1, 7, 16),
            "encoder_attention_mask": r.valid(7, 5, torch.int64),
            "camera_conditions": cameras(r),
            "chunk_plucker": r.normal(r.batch, 6, FRAMES, r.rows, r.columns),
        },
    ),
    # packed by index tensors (any order); no mask; partial RoPE on all rows; text refiner without RoPE
    "MiniMaxH3Transformer3DModel": Recipe(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "hidden_size": 24,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "ffn_dim": 32,
            "in_channels": 4,
            "audio_in_channels": 6,
            "patch_size": (1, 2, 2),
            "text_dim": 8,
            "freq_dim": 8,
            "time_embed_hidden_dim": 24,
            "time_embed_dim": 16,
            "rope_freq_dim": 2,
        },
        h3_inputs,
    ),
}
