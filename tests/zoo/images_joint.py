"""Transformers for images in which text, references and registers share one sequence with the image."""

import torch

from tests.zoo.recipe import Inputs, Random, Recipe

FIBO2 = {
    "in_channels": 4,
    "patch_size": 2,
    "dim": 32,
    "n_layers": 3,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "cap_feat_dim": 24,
    "injection_layer_ids": (1,),
    "perceiver_num_layers": 1,
    "min_num_gist_tokens": 4,
    "max_num_gist_tokens": 8,
    "gist_step": 2,
    "gist_min_text_len": 4,
    "gist_max_text_len": 32,
    "axes_dims": (8, 4, 4),
    "axes_lens": (64, 32, 32),
}


def z_image_inputs(r: Random) -> Inputs:
    return {
        "x": [r.normal(16, 1, r.height, r.width) for _ in range(r.batch)],
        "cap_feats": [r.normal(n, 16) for n in r.lengths(13, 9)],
        "t": r.uniform(r.batch),
    }


def omnigen_inputs(r: Random) -> Inputs:
    """24 text tokens, of which 4 to 19 are a reference image, the timestep, and the image."""
    total = 24 + 1 + r.tokens
    mask = torch.tril(torch.ones(total, total))
    mask[24:, :] = 1
    mask[4:20, 4:20] = 1
    return {
        "hidden_states": r.normal(r.batch, 4, r.height, r.width),
        "timestep": r.uniform(r.batch),
        "input_ids": r.integers(100, r.batch, 24),
        "input_img_latents": [r.normal(1, 4, 8, 8)],
        "input_image_sizes": {0: [[4, 20]]},
        "attention_mask": mask[None].repeat(r.batch, 1, 1),
        "position_ids": torch.arange(total)[None].repeat(r.batch, 1),
    }


JOY = {
    "patch_size": [1, 2, 2],
    "in_channels": 16,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "text_dim": 16,
    "num_layers": 2,
    "rope_dim_list": [4, 6, 6],
    "theta": 256,
}

RECIPES = {
    # perceiver squeezes text to 'gist' tokens put before the image
    "BriaFibo2Transformer2DModel": Recipe(
        FIBO2,
        lambda r: {
            "hidden_states": r.normal(r.batch, 4, r.height, r.width),
            "timestep": r.uniform(r.batch),
            "encoder_hidden_states": r.normal(r.batch, 2, 13, 24),
        },
    ),
    # padded batch: gist tokens move to the end
    "BriaFibo2Transformer2DModel/edit": Recipe(
        FIBO2,
        lambda r: {
            "hidden_states": r.normal(r.batch, 4, r.height, r.width),
            "timestep": r.uniform(r.batch),
            "encoder_hidden_states": r.normal(r.batch, 2, 30, 24),
            "encoder_attention_mask": r.valid(30, 5, torch.bool),
            "context_latents": [r.normal(r.batch, 4, 12, 20)],
        },
    ),
    # non-square latents are padded to max_seq tokens; keys multiplied by mask
    "HiDreamImageTransformer2DModel": Recipe(
        {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "caption_channels": [8, 4],
            "text_emb_dim": 8,
            "num_routed_experts": 2,
            "num_activated_experts": 2,
            "axes_dims_rope": (4, 2, 2),
            "max_resolution": (16, 32),
            "llama_layers": (0, 1),
            "force_inference_output": True,
        },
        lambda r: {
            "hidden_states": r.normal(r.batch, 4, r.height, r.width),
            "encoder_hidden_states_t5": r.normal(r.batch, 7, 8),
            "encoder_hidden_states_llama3": r.normal(2, r.batch, 9, 4),
            "pooled_embeds": r.normal(r.batch, 8),
            "timesteps": r.timesteps(),
        },
    ),
    # list inputs; both parts padded to multiples of 32; unified sequence
    "ZImageTransformer2DModel": Recipe(
        {
            "all_patch_size": (2,),
            "all_f_patch_size": (1,),
            "in_channels": 16,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "qk_norm": True,
            "cap_feat_dim": 16,
            "rope_theta": 256.0,
            "t_scale": 1000.0,
            "axes_dims": [8, 4, 4],
            "axes_lens": [256, 32, 32],
        },
        z_image_inputs,
    ),
    # (S,B,H) inside
    "ErnieImageTransformer2DModel": Recipe(
        {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_layers": 2,
            "ffn_hidden_size": 32,
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 1,
            "text_in_dim": 16,
            "rope_theta": 256,
            "rope_axes_dim": (8, 4, 4),
            "eps": 1e-6,
            "qk_layernorm": True,
        },
        lambda r: {
            "hidden_states": r.normal(r.batch, 16, r.rows, r.columns),
            "timestep": r.uniform(r.batch),
            "text_bth": r.normal(r.batch, 13, 16),
            "text_lens": torch.tensor(r.lengths(13, 9)),
        },
    ),
    # text keys/values from its own projection, not RoPE'd
    "PRXTransformer2DModel": Recipe(
        {
            "in_channels": 16,
            "patch_size": 2,
            "context_in_dim": 24,
            "hidden_size": 32,
            "mlp_ratio": 3.5,
            "num_heads": 2,
            "depth": 2,
            "axes_dim": [8, 8],
            "theta": 10000,
        },
        lambda r: {
            "hidden_states": r.normal(r.batch, 16, r.height, r.width),
            "encoder_hidden_states": r.normal(r.batch, 13, 24),
            "timestep": r.uniform(r.batch),
            "attention_mask": r.valid(13, 9, torch.bool),
        },
    ),
    # text streams merged, valid tokens first
    "HunyuanImageTransformer2DModel": Recipe(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "patch_size": (1, 1),
            "guidance_embeds": False,
            "text_embed_dim": 32,
            "text_embed_2_dim": 32,
            "rope_axes_dim": (4, 4),
        },
        lambda r: {
            "hidden_states": r.normal(r.batch, 4, r.rows, r.columns),
            "timestep": r.timesteps().float(),
            "encoder_hidden_states": r.normal(r.batch, 13, 32),
            "encoder_attention_mask": r.valid(13, 9, torch.int64),
            "encoder_hidden_states_2": r.normal(r.batch, 7, 32),
            "encoder_attention_mask_2": r.valid(7, 5, torch.int64),
        },
    ),
    # one sequence, (B,L,L) additive mask: causal text, full image
    "OmniGenTransformer2DModel": Recipe(
        {
            "hidden_size": 16,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 32,
            "num_layers": 2,
            "pad_token_id": 0,
            "vocab_size": 100,
            "in_channels": 4,
            "time_step_dim": 4,
            "rope_scaling": {"long_factor": [1, 2], "short_factor": [1, 2]},
        },
        omnigen_inputs,
    ),
    # reference image = frame 0 of a 2-frame latent
    "JoyImageEditTransformer3DModel": Recipe(
        JOY,
        lambda r: {
            "hidden_states": r.normal(r.batch, 16, 2, r.height, r.width),
            "encoder_hidden_states": r.normal(r.batch, 13, 16),
            "timestep": r.uniform(r.batch),
        },
    ),
    # ragged batch with key mask
    "JoyImageEditPlusTransformer3DModel": Recipe(
        JOY,
        lambda r: {
            "hidden_states": r.normal(r.batch, r.tokens + 60, 16, 1, 2, 2),
            "encoder_hidden_states": r.normal(r.batch, 13, 16),
            "timestep": r.uniform(r.batch),
            "shape_list": [[(1, *r.grid), (1, 6, 10)], *[[(1, *r.grid)]] * (r.batch - 1)],
            "encoder_hidden_states_mask": r.valid(13, 9, torch.float32),
        },
    ),
}
