"""Transformers on video latents (B, C, T, H, W)."""

from __future__ import annotations

import sys
from typing import Any

import torch

from sloth_fx.model_adapters.parameters import family, grid_shape, per_image, rotary_pair, video
from sloth_fx.model_adapters.trial import Size, Trial
from sloth_fx.model_adapters.unet import DDPM

SAMPLE: dict[str, Size] = {
    "rows": lambda trial: trial.size("sample_height") // trial.patch[1],
    "columns": lambda trial: trial.size("sample_width") // trial.patch[2],
}
"""The latent has the size that the config says."""


def cog_frames(trial: Trial) -> int:
    """Frames of tokens, of as many pictures as the config says."""
    latent = (trial.size("sample_frames") - 1) // trial.size("temporal_compression_ratio") + 1
    return -(-latent // trial.patch[0])


COG_SIZES: dict[str, Size] = {
    **SAMPLE,
    "text": "max_text_seq_length",
    "frames": cog_frames,
}
COG_VALUES = {
    "image_rotary_emb": lambda trial: (
        trial.value(rotary_pair("attention_head_dim")) if trial.field("use_rotary_positional_embeddings") else None
    ),
    "ofs": "batch if ofs_embed_dim",
}


def allegro_rotary(trial: Trial) -> Any:
    """Cosines and sines of frames, rows and columns, and the three coordinates of each token."""
    channels = trial.size("attention_head_dim") // 3
    waves = tuple((trial.zeros(size, channels), trial.zeros(size, channels)) for size in grid_shape(trial))
    grid = trial.grid_ids().long().T
    return waves, tuple(axis[None] for axis in grid)


def cameras(trial: Trial) -> torch.Tensor:
    """(B, T, 20): a 4 x 4 pose and four intrinsics for each frame."""
    pose = torch.cat([torch.eye(4).flatten(), torch.tensor([10.0, 10.0, 6.0, 4.0])])
    return pose.expand(trial.size("batch"), trial.size("time"), 20).to(trial.dtype)


def cosmos_text(trial: Trial) -> Any:
    """Text, and the context of an image where the config has one."""
    text = trial.tensor(
        "batch text crossattn_proj_in_channels"
        if trial.field("use_crossattn_projection")
        else "batch text text_embed_dim"
    )
    if not trial.field("img_context_dim_in"):
        return text
    return text, trial.tensor("batch img_context_num_tokens|256 img_context_dim_in")


COSMOS = {
    "encoder_hidden_states": cosmos_text,
    "encoder_attention_mask": None,
    "padding_mask": "1 1 height width",
    "fps": 24,
}


WAN = {"encoder_hidden_states": "batch text text_dim"}
WAN_SIZES: dict[str, Size] = {
    # Where text and image share a sequence, Wan splits it at the length of its text encoder.
    "text": lambda trial: 512 if trial.field("image_dim") else 13,
}


def faces(trial: Trial) -> torch.Tensor:
    """(B, 3, T, H, W): faces at four times the latent's frame rate, but for the reference frame."""
    side = trial.size("motion_encoder_size")
    return trial.zeros(trial.size("batch"), 3, 4 * (trial.size("time") - 2) + 1, side, side)


def kv_cache(trial: Trial) -> Any:
    """An empty cache of the class that the model's own module defines."""
    return sys.modules[type(trial.model).__module__].WanAnimate2KVCache(trial.size("num_layers"))


def kandinsky_channels(trial: Trial) -> int:
    """The noisy latent, and where the model is conditioned on one, another and its mask."""
    own = trial.size("in_visual_dim")
    return 2 * own + 1 if trial.field("visual_cond", True) else own


ADAPTERS = {
    "AllegroTransformer3DModel": video(
        trial=SAMPLE,
        values={"attention_mask": "bool batch time height width", "image_rotary_emb": allegro_rotary},
    ),
    "AnyFlowFARTransformer3DModel": video(
        "btchw",
        trial={"frames": 4},
        values={"timestep": "batch time", "r_timestep": "batch time", "chunk_partition": lambda trial: [2, 2]},
    ),
    "AnyFlowTransformer3DModel": video("btchw", values={"timestep": "batch time", "r_timestep": "batch time"}),
    "ChronoEditTransformer3DModel": video(trial={**WAN_SIZES, "frames": 2}, values=WAN),
    "CogVideoXTransformer3DModel": video("btchw", trial=COG_SIZES, values=COG_VALUES),
    "ConsisIDTransformer3DModel": video(
        "btchw",
        trial=COG_SIZES,
        values={
            **COG_VALUES,
            "id_cond": "batch LFE_id_dim if is_train_face",
            "id_vit_hidden": lambda trial: [trial.tensor("batch 577 LFE_vit_dim")] * trial.size("LFE_num_scale"),
        },
    ),
    "CosmosTransformer3DModel": video(text=("encoder_hidden_states",), values=COSMOS),
    "EasyAnimateTransformer3DModel": video(),
    "HeliosTransformer3DModel": video(
        trial={"frames": 2},
        values={
            "indices_hidden_states": "batch time",
            **{
                f"{kind}latents_history_{span}": f"batch {shape} if has_multi_term_memory_patch"
                for span, time in {"short": 1, "mid": 2, "long": 4}.items()
                for kind, shape in {"indices_": f"{time}", "": f"in_channels {time} height width"}.items()
            },
        },
    ),
    "HunyuanVideo15Transformer3DModel": video(
        values={
            "timestep_r": "batch if use_meanflow",
            "encoder_hidden_states_2": "batch 7 text_embed_2_dim",
            "encoder_attention_mask_2": "bool batch 7",
            "image_embeds": "batch 5 image_embed_dim",
        }
    ),
    "HunyuanVideoFramepackTransformer3DModel": video(
        trial={"frames": 2},
        values={
            "image_embeds": "batch 5 image_proj_dim|1152",
            "indices_latents": "long time",
            **{
                f"{kind}latents_{name}": f"{shape} if has_clean_x_embedder"
                for name, time in {"clean": 2, "history_2x": 2, "history_4x": 4}.items()
                for kind, shape in {"indices_": f"long {time}", "": f"batch in_channels {time} height width"}.items()
            },
        },
    ),
    "HunyuanVideoTransformer3DModel": video(),
    "Kandinsky5Transformer3DModel": video(
        "bthwc",
        trial={"channels": kandinsky_channels},
        channels="channels",
        values={
            "visual_rope_pos": lambda trial: tuple(map(torch.arange, grid_shape(trial))),
            "text_rope_pos": lambda trial: torch.arange(trial.size("text")),
        },
    ),
    "Kandinsky6SRTransformer3DModel": video(
        "bthwc", trial={"channels": kandinsky_channels, "rows": 16, "columns": 24}, channels="channels"
    ),
    "Kandinsky6Transformer3DModel": video(
        "bthwc",
        trial={"channels": kandinsky_channels},
        channels="channels",
        values={"audio_hidden_states": "batch 9 in_audio_dim"},
    ),
    "LatteTransformer3DModel": video(
        trial={"height": "sample_size", "width": "sample_size", "frames": "video_length"},
        values={"encoder_attention_mask": None},
        noise=DDPM,
    ),
    "MochiTransformer3DModel": video(timesteps=0, final_timestep=1000),
    "MotifVideoTransformer3DModel": video(),
    "SanaVideoTransformer3DModel": video(),
    "SanaWMTransformer3DModel": video(
        values={
            "timestep": "batch 1 time",
            "encoder_hidden_states": "batch 1 text caption_channels",
            "camera_conditions": cameras,
            "chunk_plucker": "batch chunk_plucker_channels time height width if use_chunk_plucker_post_attn",
        }
    ),
    "SkyReelsV2Transformer3DModel": video(trial=WAN_SIZES, values={**WAN, "fps": "long batch if inject_sample_info"}),
    "TransformerTemporalModel": family(
        "bchw",
        timestep=None,
        trial={"images": lambda trial: 3 * trial.size("batch")},
        values={"hidden_states": "images in_channels height width", "encoder_hidden_states": None, "num_frames": 3},
    ),
    "WanAnimate2Transformer3DModel": family(
        "cthw",
        text=("encoder_hidden_states",),
        trial={"frames": 2},
        values={
            "hidden_states": per_image("out_dim time height width"),
            "condition_latents": per_image("in_dim-out_dim time height width"),
            "encoder_hidden_states": per_image("text text_dim"),
            "encoder_hidden_states_image": "batch 257 1280 if use_img_emb",
            "kv_cache": kv_cache,
            "kv_cache_mode": lambda trial: "extract",
            "seq_len": lambda trial: trial.size("tokens"),
            "offset_grid_sizes": lambda trial: torch.tensor([grid_shape(trial)]),
        },
    ),
    "WanAnimateTransformer3DModel": video(
        trial={**WAN_SIZES, "channels": lambda trial: 2 * trial.size("latent_channels") + 4},
        channels="in_channels|channels",
        values={
            **WAN,
            "pose_hidden_states": "batch latent_channels time-1 height width",
            "face_pixel_values": faces,
        },
    ),
    "WanTransformer3DModel": video(trial=WAN_SIZES, values=WAN),
    "WanVACETransformer3DModel": video(
        trial=WAN_SIZES, values={**WAN, "control_hidden_states": "batch vace_in_channels time height width"}
    ),
}
