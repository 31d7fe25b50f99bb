"""Transformers on image latents (B, C, H, W) that they cut into patches themselves."""

from __future__ import annotations

import torch

from sloth_fx.model_adapters.parameters import TEXT_CHANNELS, family, per_image, rotary_pair, shapes_of_images, video
from sloth_fx.model_adapters.trial import Size, Trial
from sloth_fx.model_adapters.unet import DDPM


def within(limit: str) -> dict[str, Size]:
    """A grid that fits into ``limit`` x ``limit`` position embeddings."""
    return {
        "rows": lambda trial: min(8, trial.size(f"{limit}|8")),
        "columns": lambda trial: min(12, trial.size(f"{limit}|12")),
    }


SQUARE: dict[str, Size] = {"height": "sample_size", "width": "sample_size"}
MASK = "bool batch text"


def lumina_rotary(trial: Trial) -> torch.Tensor:
    """Lumina-Next's table of rotations: (positions, positions, head_dim / 2) complex numbers."""
    head_dim = trial.size("hidden_size") // trial.size("num_attention_heads")
    return torch.zeros(384, 384, head_dim // 2, dtype=torch.complex64, device="meta")


def llama_text(trial: Trial) -> torch.Tensor:
    """HiDream reads some layers of a language model: (layers, B, text, channels)."""
    layers, channels = 1 + max(trial.field("llama_layers", (0,))), trial.field("caption_channels")[1]
    return trial.zeros(layers, trial.size("batch"), 9, channels)


def omnigen_sequence(trial: Trial) -> int:
    """Text, one token for the time, image."""
    return trial.size("text") + 1 + trial.size("tokens")


HUNYUAN_DIT = {
    "encoder_hidden_states": "batch text cross_attention_dim",
    "text_embedding_mask": MASK,
    "encoder_hidden_states_t5": "batch text_len_t5 cross_attention_dim_t5",
    "text_embedding_mask_t5": "bool batch text_len_t5",
    "image_meta_size": "batch 6",
    "style": "long batch",
    "image_rotary_emb": rotary_pair("attention_head_dim|head_dim"),
}
HUNYUAN_DIT_SIZES: dict[str, Size] = {
    "text": "text_len",
    "head_dim": lambda trial: trial.size("hidden_size") // trial.size("num_attention_heads"),
}
Z_IMAGE_SIZES: dict[str, Size] = {
    "height": lambda trial: trial.size("rows") * trial.size("all_patch_size"),
    "width": lambda trial: trial.size("columns") * trial.size("all_patch_size"),
    "time": "all_f_patch_size",
}

ADAPTERS = {
    "AuraFlowTransformer2DModel": family(
        "bchw", timesteps=1, trial={"rows": lambda trial: min(8, int(trial.size("pos_embed_max_size") ** 0.5))}
    ),
    "BriaFibo2Transformer2DModel": family(
        "bchw",
        timesteps=1,
        trial={"text": 64, "bundles": lambda trial: 1 + len(trial.field("injection_layer_ids", ()))},
        values={"encoder_hidden_states": "batch bundles text cap_feat_dim", "encoder_attention_mask": None},
    ),
    "CogView3PlusTransformer2DModel": family("bchw", trial=within("pos_embed_max_size")),
    "CogView4Transformer2DModel": family("bchw"),
    "DiTTransformer2DModel": family(
        "bchw", trial=SQUARE, values={"timestep": "long batch", "class_labels": "long batch"}, noise=DDPM
    ),
    "DreamLiteTransformer2DModel": family("bchw"),
    "DualTransformer2DModel": family("bchw", trial={"text": 77 + 257}, values={"timestep": None}),
    "ErnieImageTransformer2DModel": family(
        "bchw",
        values={
            "text_bth": "batch text text_in_dim",
            "text_lens": lambda trial: torch.full((trial.size("batch"),), trial.size("text")),
        },
    ),
    "GlmImageTransformer2DModel": family(
        "bchw", values={"prior_token_id": "long batch tokens", "prior_token_drop": "bool batch tokens"}
    ),
    "HiDreamImageTransformer2DModel": family(
        "bchw",
        timestep="timesteps",
        values={
            "encoder_hidden_states_t5": "batch text caption_channels",
            "encoder_hidden_states_llama3": llama_text,
            "pooled_embeds": "batch text_emb_dim",
            "img_ids": None,
        },
    ),
    "HunyuanDiT2DModel": family("bchw", trial=HUNYUAN_DIT_SIZES, values=HUNYUAN_DIT),
    # The second text is left out: with it, the model sorts tokens by what its masks say.
    "HunyuanImageTransformer2DModel": family("bchw", values={"timestep_r": "batch if use_meanflow"}),
    "JoyImageEditTransformer3DModel": video(trial={"frames": 2}),
    "JoyImageEditPlusTransformer3DModel": family(
        "bnc___",
        shapes="shape_list",
        values={
            "hidden_states": lambda trial: trial.zeros(
                trial.size("batch"), trial.size("tokens"), trial.size("in_channels"), *trial.patch
            ),
            "shape_list": shapes_of_images,
        },
    ),
    "Lumina2Transformer2DModel": family("bchw", timesteps=0, final_timestep=1),
    "LuminaNextDiT2DModel": family(
        "bchw",
        timesteps=0,
        final_timestep=1,
        values={
            "encoder_hidden_states": "batch text cross_attention_dim",
            "encoder_mask": MASK,
            "image_rotary_emb": lumina_rotary,
            "cross_attention_kwargs": lambda trial: {},
        },
    ),
    "OmniGenTransformer2DModel": family(
        "bchw",
        timesteps=0,
        final_timestep=1,
        text=("input_ids",),
        trial={"text": 24, "sequence": omnigen_sequence},
        values={
            "input_ids": "long batch text",
            "input_img_latents": lambda trial: [],
            "input_image_sizes": lambda trial: {},
            "attention_mask": lambda trial: torch.ones(
                trial.size("batch"), trial.size("sequence"), trial.size("sequence"), dtype=torch.int64
            ),
            "position_ids": lambda trial: torch.arange(trial.size("sequence")).expand(trial.size("batch"), -1),
        },
    ),
    "PRXTransformer2DModel": family("bchw", timesteps=1, values={"attention_mask": MASK}),
    "PixArtTransformer2DModel": family(
        "bchw", noise=DDPM, values={"added_cond_kwargs": {"resolution": "batch 2", "aspect_ratio": "batch 1"}}
    ),
    "SD3Transformer2DModel": family("bchw", trial=within("pos_embed_max_size")),
    "SanaTransformer2DModel": family("bchw"),
    "Transformer2DModel": family(
        "bchw",
        values={
            "hidden_states": lambda trial: trial.tensor(
                "long batch latent_tokens" if trial.field("num_vector_embeds") else "batch in_channels height width"
            ),
            "timestep": lambda trial: trial.tensor(
                "long" if trial.field("num_vector_embeds") else "long batch if num_embeds_ada_norm"
            ),
            "encoder_attention_mask": None,
        },
        trial={"latent_tokens": lambda trial: trial.size("sample_size") ** 2},
    ),
    "ZImageTransformer2DModel": family(
        "cthw",
        latent="x",
        timestep="t",
        timesteps=0,
        final_timestep=1,
        text=("cap_feats",),
        trial=Z_IMAGE_SIZES,
        values={
            "x": per_image("in_channels time height width"),
            "cap_feats": per_image(f"text {TEXT_CHANNELS}"),
            "patch_size": lambda trial: trial.size("all_patch_size"),
            "f_patch_size": lambda trial: trial.size("all_f_patch_size"),
        },
    ),
}
