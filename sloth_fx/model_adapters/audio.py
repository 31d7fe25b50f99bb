"""Transformers on sequences: audio (B, N, C) or (B, C, N), embeddings, proteins."""

from __future__ import annotations

from typing import Any

import torch

from sloth_fx.model_adapters.parameters import family
from sloth_fx.model_adapters.trial import Size, Trial

LENGTH: dict[str, Size] = {"width": 96}


def protein_conditions(trial: Trial) -> dict[str, Any]:
    """Masks (B, residues): none is given in context, all have a latent."""
    shape = trial.size("batch"), trial.size("residues")
    return {
        "is_in_context_conditioning": torch.zeros(shape, dtype=torch.bool),
        "supports_local_latent": torch.ones(shape, dtype=torch.bool),
    }


ADAPTERS = {
    "AceStepTransformer1DModel": family(
        "bwc",
        timesteps=1,
        trial=LENGTH,
        channels="audio_acoustic_hidden_dim",
        values={
            "encoder_hidden_states": "batch text encoder_hidden_size|hidden_size",
            "context_latents": lambda trial: trial.zeros(
                trial.size("batch"),
                trial.size("width"),
                trial.size("in_channels") - trial.size("audio_acoustic_hidden_dim"),
            ),
        },
    ),
    "LongCatAudioDiTTransformer": family(
        "bwc", timesteps=1, trial=LENGTH, values={"attention_mask": "bool batch width"}
    ),
    "MiniMaxMusic3Transformer1DModel": family(
        "bcw",
        timesteps=0,
        final_timestep=1,
        trial=LENGTH,
        values={"encoder_hidden_states": "batch width condition_dim"},
    ),
    "MiniMaxMusic3RVQDepthDecoder": family(
        "bwc",
        latent="inputs_embeds",
        timestep=None,
        channels="hidden_size",
        trial={"width": lambda trial: min(16, trial.size("max_position_embeddings|16"))},
    ),
    "PriorTransformer": family(
        "bc",
        channels="clip_embed_dim|embedding_dim",
        trial={"text": "num_embeddings"},
        values={
            "proj_embedding": "batch embedding_proj_dim|embedding_dim",
            "encoder_hidden_states": "batch text embedding_dim if encoder_hid_proj_type",
            "attention_mask": "bool batch text",
        },
    ),
    "RFD4ProteinaTransformer": family(
        "bnc",
        latent="local_latents",
        text=(),
        timestep="local_latents_time",
        timesteps=0,
        final_timestep=1,
        trial={"residues": 40},
        values={
            "bb_ca": "batch residues 3",
            "local_latents": "batch residues latent_dim",
            "bb_ca_time": "batch",
            "local_latents_time": "batch",
            "padding_mask": "bool batch residues",
            "conditioning": protein_conditions,
        },
    ),
    "StableAudio3DiTModel": family(
        "bcw", timesteps=1, trial=LENGTH, values={"global_hidden_states": "batch global_cond_dim"}
    ),
    "StableAudioDiTModel": family(
        "bcw",
        timesteps=1,
        text=("encoder_hidden_states", "global_hidden_states"),
        trial={**LENGTH, "rotated": lambda trial: trial.size("attention_head_dim") // 2, "sequence": "width+1"},
        values={
            "global_hidden_states": "batch 1 global_states_input_dim",
            "rotary_embedding": ("sequence rotated", "sequence rotated"),
        },
    ),
    "T5FilmDecoder": family(
        "bwc",
        latent="decoder_input_tokens",
        timestep="decoder_noise_time",
        timesteps=1,
        trial={"width": "targets_length"},
        channels="input_dims",
        text=("encodings_and_masks",),
        values={
            "encodings_and_masks": [("batch text d_model", "batch text"), ("batch 9 d_model", "batch 9")],
            "decoder_noise_time": "batch",
        },
    ),
}
