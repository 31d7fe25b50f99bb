"""Flux and its relatives: packed latents (B, N, C), and the place of every token as ids."""

import torch
import torch.nn.functional as F

from tests.zoo.recipe import Inputs, Random, Recipe, grid_ids

FLUX = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 4, 8),
}


def flux_inputs(
    r: Random, *, channels: int = 4, dim: int = 32, pooled: int = 32, reference: bool = False, guidance: bool = False
) -> Inputs:
    """13 text tokens, the image, and with ``reference`` another image of 6 x 10 tokens."""
    ids, latent = grid_ids(*r.grid), r.normal(r.batch, r.tokens, channels)
    if reference:
        ids = torch.cat([ids, grid_ids(6, 10, frame=1)])
        latent = torch.cat([latent, r.normal(r.batch, 60, channels)], 1)
    inputs = {
        "hidden_states": latent,
        "encoder_hidden_states": r.normal(r.batch, 13, dim),
        "img_ids": ids,
        "txt_ids": torch.zeros(13, 3),
        "timestep": r.uniform(r.batch),
    }
    if pooled:
        inputs["pooled_projections"] = r.normal(r.batch, pooled)
    if guidance:
        inputs["guidance"] = torch.full((r.batch,), 3.5)
    return inputs


def fibo_inputs(r: Random) -> Inputs:
    inputs = flux_inputs(r, channels=48, dim=64, pooled=0)
    text = inputs["encoder_hidden_states"]
    return {**inputs, "text_encoder_layers": [text[:, :, :32], text[:, :, 32:]]}


def text_ids() -> torch.Tensor:
    """13 text tokens, one after another on the last axis."""
    return F.pad(torch.arange(13.0)[:, None], (3, 0))


def flux2_inputs(r: Random, *, reference: bool = False) -> Inputs:
    ids, latent = grid_ids(*r.grid, axes=4), r.normal(r.batch, r.tokens, 4)
    if reference:
        ids = torch.cat([ids, grid_ids(6, 10, frame=10, axes=4)])
        latent = torch.cat([latent, r.normal(r.batch, 60, 4)], 1)
    return {
        "hidden_states": latent,
        "encoder_hidden_states": r.normal(r.batch, 13, 32),
        "img_ids": ids[None].expand(r.batch, -1, -1),
        "txt_ids": text_ids()[None].expand(r.batch, -1, -1),
        "timestep": r.uniform(r.batch),
        "guidance": torch.ones(r.batch),
    }


FLUX2 = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "timestep_guidance_channels": 256,
    "axes_dims_rope": [4, 4, 4, 4],
}


def flux3_inputs(r: Random) -> Inputs:
    return {
        "hidden_states": r.normal(r.batch, r.tokens, 4),
        "encoder_hidden_states": r.normal(r.batch, 13, 32),
        "timestep": r.uniform(r.batch),
        "img_ids": grid_ids(*r.grid, axes=4),
        "txt_ids": text_ids(),
        "image_cond_hidden_states": r.normal(r.batch, 60, 4),
        "image_cond_ids": grid_ids(6, 10, frame=10, axes=4),
    }


RECIPES = {
    # packed (B,N,C) input, ids
    "FluxTransformer2DModel": Recipe(
        {**FLUX, "pooled_projection_dim": 32, "guidance_embeds": True},
        lambda r: flux_inputs(r, guidance=True),
    ),
    # 60 tokens of a reference image after those of the image
    "FluxTransformer2DModel/kontext": Recipe(
        {**FLUX, "pooled_projection_dim": 32},
        lambda r: flux_inputs(r, reference=True),
    ),
    # mask over the joint sequence
    "ChromaTransformer2DModel": Recipe(
        {**FLUX, "approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1},
        lambda r: {
            **flux_inputs(r, pooled=0),
            "attention_mask": F.pad(r.valid(13, 9, torch.float32), (0, r.tokens), value=1.0),
        },
    ),
    "BriaTransformer2DModel": Recipe(
        {
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": None,
            "axes_dims_rope": [0, 4, 4],
        },
        lambda r: flux_inputs(r, pooled=0),
    ),
    "BriaFiboTransformer2DModel": Recipe(
        {
            "patch_size": 1,
            "in_channels": 48,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 64,
            "text_encoder_dim": 32,
            "pooled_projection_dim": None,
            "axes_dims_rope": [0, 4, 4],
        },
        fibo_inputs,
    ),
    "LongCatImageTransformer2DModel": Recipe(
        {**FLUX, "pooled_projection_dim": 32},
        lambda r: flux_inputs(r, pooled=0, guidance=True),
    ),
    "OvisImageTransformer2DModel": Recipe(
        {**FLUX, "out_channels": 4},
        lambda r: flux_inputs(r, pooled=0),
    ),
    # single blocks: fused qkv+mlp projection
    "Flux2Transformer2DModel": Recipe(
        FLUX2,
        flux2_inputs,
    ),
    "Flux2Transformer2DModel/ref": Recipe(
        FLUX2,
        lambda r: flux2_inputs(r, reference=True),
    ),
    # early blocks: text-only, image-only, ref-only self-attention; then joint
    "Flux3Transformer2DModel": Recipe(
        {
            "in_channels": 4,
            "cond_in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "timestep_channels": 32,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        flux3_inputs,
    ),
}
