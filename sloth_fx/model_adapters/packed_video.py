"""Transformers on packed video tokens (B, N, C), some with audio or text in the same sequence."""

from __future__ import annotations

import torch
from torch import nn

from sloth_fx.model_adapters.parameters import grid_shape, video
from sloth_fx.model_adapters.trial import Trial

SIZE_NAMES = ("num_frames", "height", "width")


def cosmos3_positions(trial: Trial) -> torch.Tensor:
    """(3, text + tokens): text counts on, then come frame, row and column."""
    text = trial.size("text")
    return torch.cat([torch.arange(text).expand(3, -1), trial.grid_ids().long().T + text], dim=1)


def vision(trial: Trial) -> torch.Tensor:
    """Places of the video's tokens in the packed sequence."""
    return torch.arange(trial.size("tokens")) + trial.size("text")


def minimax_positions(trial: Trial) -> torch.Tensor:
    """(text + audio + tokens, 3): text and audio count on along time, then comes the video's grid."""
    counted = torch.arange(trial.size("text") + trial.size("audio"), dtype=torch.float32)
    return torch.cat([nn.functional.pad(counted[:, None], (0, 2)), trial.grid_ids()])


def minimax_tags(trial: Trial) -> torch.Tensor:
    """Modality of each token: 1 text, 2 audio, 0 video."""
    counts = torch.tensor([trial.size(name) for name in ("text", "audio", "tokens")])
    return torch.tensor([1, 2, 0]).repeat_interleave(counts)


ADAPTERS = {
    "Cosmos3OmniTransformer": video(
        latent="vision_tokens",
        timestep="vision_timesteps",
        shapes="vision_token_shapes",
        text=("input_ids",),
        trial={"sequence": "text+tokens", "time": "frames", "height": "rows", "width": "columns"},
        values={
            "input_ids": "long text",
            "text_indexes": lambda trial: torch.arange(trial.size("text")),
            "position_ids": cosmos3_positions,
            "und_len": lambda trial: trial.size("text"),
            "sequence_length": lambda trial: trial.size("sequence"),
            "vision_tokens": ["1 latent_channel time height width"],
            "vision_token_shapes": lambda trial: [grid_shape(trial)],
            "vision_sequence_indexes": vision,
            "vision_mse_loss_indexes": vision,
            "vision_timesteps": "tokens",
            "vision_noisy_frame_indexes": lambda trial: [torch.arange(trial.size("frames"))],
        },
    ),
    "LTX2VideoTransformer3DModel": video(
        "bnc",
        sizes=SIZE_NAMES,
        text=("encoder_hidden_states", "audio_encoder_hidden_states"),
        values={
            "audio_hidden_states": "batch 9 audio_in_channels",
            "audio_encoder_hidden_states": "batch text caption_channels",
            "audio_num_frames": 9,
        },
    ),
    "LTXVideoTransformer3DModel": video("bnc", sizes=SIZE_NAMES),
    "MiniMaxH3Transformer3DModel": video(
        "bnc",
        ids="position_ids",
        id_axes="fhw",
        id_rows="video_indices",
        timesteps=0,
        final_timestep=1,
        trial={"audio": 6, "sequence": "text+audio+tokens"},
        values={
            "hidden_states": lambda trial: trial.zeros(
                trial.size("batch"), trial.size("tokens"), trial.size("in_channels") * torch.Size(trial.patch).numel()
            ),
            "audio_hidden_states": "batch audio audio_in_channels",
            "timestep": "2",
            "timestep_indices": "long sequence",
            "token_tags": minimax_tags,
            "position_ids": minimax_positions,
            "text_indices": lambda trial: torch.arange(trial.size("text")),
            "audio_indices": lambda trial: torch.arange(trial.size("audio")) + trial.size("text"),
            "video_indices": lambda trial: torch.arange(trial.size("tokens")) + trial.size("text+audio"),
        },
    ),
    "SanaWMLTX2RefinerTransformer3DModel": video(
        "bnc",
        values={
            "timestep": "batch tokens",
            "video_rotary_emb": lambda trial: trial.value(("batch tokens rotated", "batch tokens rotated")),
        },
        trial={"rotated": lambda trial: trial.size("num_attention_heads") * trial.size("attention_head_dim")},
    ),
}
