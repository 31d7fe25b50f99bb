"""Denoisers of full size on the meta device, with the arguments of one call, and how to count what a call does.

A model on the meta device computes nothing, but what it would compute is known from its shapes: products of matrices,
convolutions and attention, two operations for each multiplication (torch.utils.flop_counter).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import torch
from common import CONFIGS
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

TEXT = "encoder_hidden_states"


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, device="meta")


def sd15() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.UNet2DConditionModel(**CONFIGS["sd15"])
    return model, {"sample": zeros(1, 4, 64, 64), TEXT: zeros(1, 77, 768)}


def sdxl() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.UNet2DConditionModel(**CONFIGS["sdxl"])
    added = {"text_embeds": zeros(1, 1280), "time_ids": zeros(1, 6)}
    return model, {"sample": zeros(1, 4, 128, 128), TEXT: zeros(1, 77, 2048), "added_cond_kwargs": added}


def pixart_sigma() -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.PixArtTransformer2DModel(caption_channels=4096, use_additional_conditions=False)
    none = {"resolution": None, "aspect_ratio": None}
    return model, {"hidden_states": zeros(1, 4, 128, 128), TEXT: zeros(1, 300, 4096), "added_cond_kwargs": none}


def wan() -> tuple[nn.Module, dict[str, Any]]:
    """Wan 2.1 with 1.3 B parameters: 81 frames of 832 x 480."""
    model = diffusers.WanTransformer3DModel(num_attention_heads=12, num_layers=30, ffn_dim=8960)
    return model, {"hidden_states": zeros(1, 16, 21, 60, 104), TEXT: zeros(1, 512, 4096)}


def sd3_medium() -> tuple[nn.Module, dict[str, Any]]:
    return _sd3(num_layers=24, num_attention_heads=24, caption_projection_dim=1536)


def sd35_large() -> tuple[nn.Module, dict[str, Any]]:
    return _sd3(num_layers=38, num_attention_heads=38, caption_projection_dim=2432, qk_norm="rms_norm")


def _sd3(**config: Any) -> tuple[nn.Module, dict[str, Any]]:
    model = diffusers.SD3Transformer2DModel(
        joint_attention_dim=4096, pooled_projection_dim=2048, pos_embed_max_size=192, **config
    )
    call = {"hidden_states": zeros(1, 16, 128, 128), TEXT: zeros(1, 333, 4096), "pooled_projections": zeros(1, 2048)}
    return model, call


def flux() -> tuple[nn.Module, dict[str, Any]]:
    # where tokens lie has to be known: these have values
    places = torch.tensor([[0.0, row, column] for row in range(64) for column in range(64)], device="cpu")
    call = {
        "hidden_states": zeros(1, 4096, 64),
        TEXT: zeros(1, 512, 4096),
        "pooled_projections": zeros(1, 768),
        "img_ids": places,
        "txt_ids": torch.zeros(512, 3, device="cpu"),
        "guidance": zeros(1),
    }
    return diffusers.FluxTransformer2DModel(guidance_embeds=True), call


MODELS: Mapping[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "sd15": sd15,
    "sdxl": sdxl,
    "pixart-sigma": pixart_sigma,
    "wan2.1-1.3b": wan,
    "sd3-medium": sd3_medium,
    "sd3.5-large": sd35_large,
    "flux": flux,
}


def built(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model of ``MODELS``, and the arguments of a call with one row."""
    with torch.device("meta"):
        model, call = MODELS[name]()
    return model.eval(), {**call, "timestep": zeros(1)}


def counted(model: Any, call: Mapping[str, Any]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**call)
    return int(counter.get_total_flops())


def twice(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.cat([value, value]) if value.shape[:1] == (1,) else value
    return {name: twice(each) for name, each in value.items()} if isinstance(value, Mapping) else value
