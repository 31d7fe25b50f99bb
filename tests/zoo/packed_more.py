"""Other transformers of packed latents, told the shape of the image instead, or one sequence of everything."""

import torch
import torch.nn.functional as F

from tests.zoo.recipe import Inputs, Random, Recipe, grid_ids


def qwen_inputs(r: Random, *, reference: bool = False) -> Inputs:
    """13 text tokens, some of them padding, and the image; or no padding, and a reference image after the image."""
    images = [(1, *r.grid), (1, 6, 10)] if reference else [(1, *r.grid)]
    return {
        "hidden_states": r.normal(r.batch, r.tokens + (60 if reference else 0), 16),
        "encoder_hidden_states": r.normal(r.batch, 13, 16),
        "encoder_hidden_states_mask": r.valid(13, 13 if reference else 9, torch.int64),
        "timestep": r.uniform(r.batch),
        "img_shapes": [images] * r.batch,
    }


QWEN = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 16,
    "guidance_embeds": False,
    "axes_dims_rope": (8, 4, 4),
}


def qwen21_inputs(r: Random, *, reference: bool = False) -> Inputs:
    """13 text tokens; with ``reference`` an image of 6 x 10 tokens, four to a slot, after the first four of them.

    The model appends the slots of the image itself.
    """
    slots = torch.zeros(13, dtype=torch.bool)
    if reference:
        slots = torch.cat([slots[:4], torch.ones(15, dtype=torch.bool), slots[4:]])
    images = [(1, 6, 10), (1, *r.grid)] if reference else [(1, *r.grid)]
    return {
        "hidden_states": r.normal(r.batch, r.tokens + (60 if reference else 0), 16),
        "encoder_hidden_states": r.normal(r.batch, len(slots), 24),
        "timestep": r.uniform(r.batch),
        "img_shapes": [images] * r.batch,
        "img_mask": F.pad(slots, (0, r.tokens // 4), value=True).expand(r.batch, -1),
        "encoder_hidden_states_mask": r.valid(len(slots), len(slots) - 3, torch.bool),
    }


QWEN21 = {
    "patch_size": 1,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "context_in_dim": 24,
    "axes_dims_rope": (4, 6, 6),
}


def ideogram_inputs(r: Random) -> Inputs:
    """One sequence of 13 text tokens, the shorter prompt padded in front, and the image."""
    from diffusers.models.transformers import transformer_ideogram4 as ideogram

    positions = torch.cat(
        [torch.arange(13)[:, None].expand(-1, 3), grid_ids(*r.grid).long() + ideogram.IMAGE_POSITION_OFFSET]
    )
    kinds = torch.tensor([ideogram.LLM_TOKEN_INDICATOR] * 13 + [ideogram.OUTPUT_IMAGE_INDICATOR] * r.tokens)
    segments = torch.ones(r.batch, 13 + r.tokens, dtype=torch.int64)
    segments[0, :3] = 0
    return {
        "hidden_states": F.pad(r.normal(r.batch, r.tokens, 16), (0, 0, 13, 0)),
        "encoder_hidden_states": F.pad(r.normal(r.batch, 13, 24), (0, 0, 0, r.tokens)),
        "timestep": r.uniform(r.batch),
        "position_ids": positions.expand(r.batch, -1, -1),
        "segment_ids": segments,
        "indicator": kinds.expand(r.batch, -1),
    }


def krea_inputs(r: Random) -> Inputs:
    return {
        "hidden_states": r.normal(r.batch, r.tokens, 16),
        "encoder_hidden_states": r.normal(r.batch, 13, 3, 16),
        "timestep": r.uniform(r.batch),
        "position_ids": F.pad(grid_ids(*r.grid), (0, 0, 13, 0)),
        "encoder_attention_mask": r.valid(13, 9, torch.bool),
    }


RECIPES = {
    # joint key-padding mask; complex RoPE on both parts
    "QwenImageTransformer2DModel": Recipe(
        QWEN,
        qwen_inputs,
    ),
    "QwenImageTransformer2DModel/edit": Recipe(
        QWEN,
        lambda r: qwen_inputs(r, reference=True),
    ),
    # block-causal, one sdpa per segment (text causal; image sees all)
    "QwenImage21Transformer2DModel": Recipe(
        QWEN21,
        qwen21_inputs,
        even=True,
    ),
    # block-causal, interleaved
    "QwenImage21Transformer2DModel/edit": Recipe(
        QWEN21,
        lambda r: qwen21_inputs(r, reference=True),
        even=True,
    ),
    # GQA
    "NucleusMoEImageTransformer2DModel": Recipe(
        {
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": (8, 4, 4),
            "moe_enabled": False,
            "capacity_factors": [8.0, 8.0],
        },
        lambda r: {
            "hidden_states": r.normal(r.batch, r.tokens, 16),
            "encoder_hidden_states": r.normal(r.batch, 13, 16),
            "encoder_hidden_states_mask": r.valid(13, 9, torch.int64),
            "timestep": r.uniform(r.batch),
            "img_shapes": [(1, *r.grid)] * r.batch,
        },
    ),
    # one packed sequence, segment mask
    "Ideogram4Transformer2DModel": Recipe(
        {
            "in_channels": 16,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "intermediate_size": 32,
            "adaln_dim": 16,
            "llm_features_dim": 24,
            "rope_theta": 10000,
            "mrope_section": (2, 1, 1),
            "norm_eps": 1e-5,
        },
        ideogram_inputs,
    ),
    # GQA; layer-wise text attention (batch*text, 3 tokens)
    "Krea2Transformer2DModel": Recipe(
        {
            "in_channels": 16,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 32,
            "timestep_embed_dim": 8,
            "text_hidden_dim": 16,
            "num_text_layers": 3,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 1,
            "text_intermediate_size": 16,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 2, 2),
            "rope_theta": 1000.0,
            "norm_eps": 1e-5,
        },
        krea_inputs,
    ),
}
