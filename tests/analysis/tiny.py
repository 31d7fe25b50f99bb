"""Tiny transformers of the real classes, and inputs: two samples, grids that are no squares."""

import torch
from diffusers import (
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
)

from tests import models

BATCH, ROWS, COLUMNS, TOKENS = 2, 6, 10, 7


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def sd3():
    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=24,
        pooled_projection_dim=12,
        out_channels=4,
        pos_embed_max_size=16,
    )
    return model, {
        "hidden_states": noise(BATCH, 4, ROWS, COLUMNS),
        "encoder_hidden_states": noise(BATCH, TOKENS, 24),
        "pooled_projections": noise(BATCH, 12),
        "timestep": torch.tensor([500, 400]),
    }


def flux():
    model = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=12,
        axes_dims_rope=(4, 4, 8),
    )
    place = torch.arange(ROWS * COLUMNS)
    return model, {
        "hidden_states": noise(BATCH, ROWS * COLUMNS, 4),
        "encoder_hidden_states": noise(BATCH, TOKENS, 24),
        "pooled_projections": noise(BATCH, 12),
        "timestep": torch.tensor([0.5, 0.4]),
        "img_ids": torch.stack([torch.zeros_like(place), place // COLUMNS, place % COLUMNS], dim=1).float(),
        "txt_ids": torch.zeros(TOKENS, 3),
    }


def wan():
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return model, {
        "hidden_states": noise(BATCH, 4, 3, ROWS, COLUMNS),
        "encoder_hidden_states": noise(BATCH, TOKENS, 24),
        "timestep": torch.tensor([500, 400]),
    }


def pixart():
    model = PixArtTransformer2DModel(
        sample_size=16,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        caption_channels=24,
        use_additional_conditions=False,
    )
    return model, {
        "hidden_states": noise(BATCH, 4, ROWS, COLUMNS),
        "encoder_hidden_states": noise(BATCH, TOKENS, 24),
        "encoder_attention_mask": torch.tensor([[1] * 5 + [0] * 2, [1] * TOKENS]),
        "timestep": torch.tensor([500, 400]),
        "added_cond_kwargs": {"aspect_ratio": None, "resolution": None},
    }


def unet(name):
    model = models.shared(name)
    return model, models.inputs(model, BATCH, 13, 21)


TINY = {
    "sd15": lambda: unet("sd15"),
    "sdxl": lambda: unet("sdxl"),
    "sd3": sd3,
    "flux": flux,
    "wan": wan,
    "pixart": pixart,
}


def tiny(name):
    """(model, keyword arguments), the same at every call."""
    torch.manual_seed(0)
    model, inputs = TINY[name]()
    return model.eval(), inputs
