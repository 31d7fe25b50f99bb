"""Cosmos: video, text by cross-attention, or packed into one sequence without a batch."""

import sys
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.recipe import Inputs, Random, Recipe

COSMOS = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "mlp_ratio": 2,
    "text_embed_dim": 16,
    "adaln_lora_dim": 4,
    "max_size": (4, 32, 32),
    "patch_size": (1, 2, 2),
    "rope_scale": (2.0, 1.0, 1.0),
    "concat_padding_mask": True,
    "extra_pos_embed_type": "learnable",
}


def resize_without_torchvision(model: nn.Module) -> None:
    """Cosmos resizes its padding mask with torchvision; where that is not installed, torch does as well."""
    host = sys.modules[type(model).__module__]
    if not hasattr(host, "transforms"):
        functional = SimpleNamespace(resize=lambda mask, size, interpolation: F.interpolate(mask, size))
        modes = SimpleNamespace(NEAREST="nearest")
        host.transforms = SimpleNamespace(functional=functional, InterpolationMode=modes)  # type: ignore[attr-defined]


def cosmos_inputs(r: Random, channels: int = 4) -> Inputs:
    return {
        "hidden_states": r.normal(r.batch, channels, 2, r.height, r.width),
        "timestep": r.uniform(r.batch),
        "encoder_hidden_states": r.normal(r.batch, 7, 16),
        "attention_mask": r.valid(7, 5, torch.float32),
        "fps": 24,
        "padding_mask": torch.zeros(1, 1, r.height, r.width),
    }


def cosmos3_inputs(r: Random) -> Inputs:
    """One packed sequence without a batch: 7 text tokens, and two frames."""
    video = torch.arange(7, 7 + 2 * r.tokens)
    places = torch.cartesian_prod(torch.arange(2), torch.arange(r.rows), torch.arange(r.columns)) + 7
    return {
        "input_ids": r.integers(32, 7),
        "text_indexes": torch.arange(7),
        "position_ids": torch.cat([torch.arange(7)[:, None].expand(-1, 3), places]).T,
        "und_len": 7,
        "sequence_length": 7 + len(video),
        "vision_tokens": [r.normal(1, 2, 2, *r.grid)],
        "vision_token_shapes": [(2, *r.grid)],
        "vision_sequence_indexes": video,
        "vision_mse_loss_indexes": video,
        "vision_timesteps": torch.full((len(video),), 0.5),
        "vision_noisy_frame_indexes": [torch.arange(2)],
    }


RECIPES = {
    # enable_gqa branch: K/V repeat_interleave'd
    "CosmosTransformer3DModel": Recipe(
        COSMOS,
        cosmos_inputs,
        prepare=resize_without_torchvision,
    ),
    "CosmosTransformer3DModel/v2w": Recipe(
        {**COSMOS, "in_channels": 5},
        lambda r: {**cosmos_inputs(r), "condition_mask": torch.ones(r.batch, 1, 2, r.height, r.width)},
        prepare=resize_without_torchvision,
    ),
    # two cross-attentions (text, image context)
    "CosmosTransformer3DModel/transfer2.5": Recipe(
        {
            **COSMOS,
            "extra_pos_embed_type": None,
            "use_crossattn_projection": True,
            "crossattn_proj_in_channels": 20,
            "encoder_hidden_states_channels": 16,
            "img_context_dim_in": 10,
            "img_context_dim_out": 24,
            "img_context_num_tokens": 5,
        },
        lambda r: {
            **cosmos_inputs(r),
            "encoder_hidden_states": (r.normal(r.batch, 7, 20), r.normal(r.batch, 5, 10)),
            "attention_mask": None,
        },
        prepare=resize_without_torchvision,
    ),
    # packed, batch 1; enable_gqa=True in sdpa; is_causal for text
    "Cosmos3OmniTransformer": Recipe(
        {
            "head_dim": 12,
            "hidden_act": "relu2",
            "hidden_size": 24,
            "intermediate_size": 24,
            "latent_channel": 2,
            "latent_patch_size": 1,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "num_key_value_heads": 1,
            "patch_latent_dim": 2,
            "qk_norm_for_text": False,
            "rms_norm_eps": 1e-5,
            "rope_axes_dim": [2, 2, 2],
            "rope_theta": 1e8,
            "vocab_size": 32,
        },
        cosmos3_inputs,
    ),
}
