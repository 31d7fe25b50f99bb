"""Transformers on packed tokens (B, N, C), which are told by ids or shapes how the tokens lie."""

from __future__ import annotations

from typing import Any

import torch

from sloth_fx.model_adapters.parameters import family, grid_shape
from sloth_fx.model_adapters.trial import Trial


def flux(**rest: Any) -> Any:
    """Flux and its kin: coordinates (image, row, column) in ``img_ids``, timesteps from 1 to 0."""
    return family("bnc", **{"ids": "img_ids", "timesteps": 1, **rest})


def for_batch(ids: torch.Tensor, trial: Trial) -> torch.Tensor:
    return ids.expand(trial.size("batch"), *ids.shape)


def text_and_grid(trial: Trial, *, offset: int = 0) -> torch.Tensor:
    """(text + tokens, 3) coordinates of text, then image; the image's begin at ``offset``."""
    text = torch.zeros(trial.size("text"), 3)
    if offset:
        text += torch.arange(len(text))[:, None]
    return torch.cat([text, trial.grid_ids() + offset])


SEQUENCE = {"sequence": lambda trial: trial.size("text") + trial.size("tokens")}


def ideogram_roles(trial: Trial) -> torch.Tensor:
    """(B, text + tokens) roles: 3 for text, 2 for the image."""
    return for_batch(torch.tensor([3] * trial.size("text") + [2] * trial.size("tokens")), trial)


def qwen21_mask(trial: Trial) -> torch.Tensor:
    """(B, text + tokens / 4): which entries of the language model's sequence are image."""
    return for_batch(torch.tensor([False] * trial.size("text") + [True] * (trial.size("tokens") // 4)), trial)


ADAPTERS = {
    "BriaFiboTransformer2DModel": flux(
        timesteps=1000,
        values={
            "text_encoder_layers": lambda trial: [
                trial.tensor("batch text text_encoder_dim")
                for _ in range(trial.size("num_layers") + trial.size("num_single_layers"))
            ]
        },
    ),
    "BriaTransformer2DModel": flux(timesteps=1000),
    "ChromaTransformer2DModel": flux(trial=SEQUENCE, values={"attention_mask": "bool batch sequence"}),
    "Flux2Transformer2DModel": flux(
        values={
            "img_ids": lambda trial: for_batch(trial.grid_ids(columns=4), trial),
            "txt_ids": "batch text 4",
        },
    ),
    "Flux3Transformer2DModel": flux(),
    "FluxTransformer2DModel": flux(),
    "Ideogram4Transformer2DModel": family(
        "bnc",
        ids="position_ids",
        timesteps=0,
        final_timestep=1,
        trial=SEQUENCE,
        values={
            "hidden_states": "batch sequence in_channels",
            "encoder_hidden_states": "batch sequence llm_features_dim",
            "position_ids": lambda trial: for_batch(text_and_grid(trial, offset=65536).long(), trial),
            "segment_ids": "long batch sequence",
            "indicator": ideogram_roles,
        },
    ),
    "Krea2Transformer2DModel": family(
        "bnc",
        ids="position_ids",
        timesteps=1,
        values={
            "encoder_hidden_states": "batch text num_text_layers text_hidden_dim",
            "position_ids": text_and_grid,
        },
    ),
    "LongCatImageTransformer2DModel": flux(),
    "NucleusMoEImageTransformer2DModel": family(
        "bnc",
        shapes="img_shapes",
        timesteps=1,
        values={"img_shapes": lambda trial: [grid_shape(trial)] * trial.size("batch")},
    ),
    "OvisImageTransformer2DModel": flux(),
    "QwenImage21Transformer2DModel": family(
        "bnc", shapes="img_shapes", target=-1, timesteps=1, values={"img_mask": qwen21_mask}
    ),
    "QwenImageTransformer2DModel": family(
        "bnc",
        shapes="img_shapes",
        timesteps=1,
        values={"additional_t_cond": "long batch if use_additional_t_cond"},
    ),
}
