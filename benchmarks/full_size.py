"""Denoisers of full size, with the arguments of one call, and how to count what a call does.

They lie on the meta device, or elsewhere with random weights and, if need be, fewer layers. A model on the meta device
computes nothing, but what it would compute is known from its shapes: products of matrices,
convolutions and attention, two operations for each multiplication (torch.utils.flop_counter).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import diffusers
import torch
from common import CONFIGS
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

TEXT = "encoder_hidden_states"
Built: TypeAlias = tuple[nn.Module, dict[str, Any]]


def noise(*shape: int) -> Tensor:
    return torch.randn(shape)


def sd15(layers: int = 0) -> Built:
    model = diffusers.UNet2DConditionModel(**CONFIGS["sd15"])
    return model, {"sample": noise(1, 4, 64, 64), TEXT: noise(1, 77, 768)}


def sdxl(layers: int = 0) -> Built:
    model = diffusers.UNet2DConditionModel(**CONFIGS["sdxl"])
    added = {"text_embeds": noise(1, 1280), "time_ids": noise(1, 6)}
    return model, {"sample": noise(1, 4, 128, 128), TEXT: noise(1, 77, 2048), "added_cond_kwargs": added}


def pixart_sigma(layers: int = 28) -> Built:
    model = diffusers.PixArtTransformer2DModel(
        num_layers=layers, caption_channels=4096, use_additional_conditions=False
    )
    none = {"resolution": None, "aspect_ratio": None}
    return model, {"hidden_states": noise(1, 4, 128, 128), TEXT: noise(1, 300, 4096), "added_cond_kwargs": none}


def wan(layers: int = 30) -> Built:
    """Wan 2.1 with 1.3 B parameters: 81 frames of 832 x 480."""
    model = diffusers.WanTransformer3DModel(num_attention_heads=12, num_layers=layers, ffn_dim=8960)
    return model, {"hidden_states": noise(1, 16, 21, 60, 104), TEXT: noise(1, 512, 4096)}


def sd3_medium(layers: int = 24) -> Built:
    return _sd3(num_layers=layers, num_attention_heads=24, caption_projection_dim=1536)


def sd35_large(layers: int = 38) -> Built:
    return _sd3(num_layers=layers, num_attention_heads=38, caption_projection_dim=2432, qk_norm="rms_norm")


def _sd3(**config: Any) -> Built:
    model = diffusers.SD3Transformer2DModel(
        joint_attention_dim=4096, pooled_projection_dim=2048, pos_embed_max_size=192, **config
    )
    call = {"hidden_states": noise(1, 16, 128, 128), TEXT: noise(1, 333, 4096), "pooled_projections": noise(1, 2048)}
    return model, call


def flux(layers: int = 19) -> Built:
    """Flux.1, with two blocks of one stream for each of two streams."""
    # where tokens lie has to be known: these have values
    places = torch.tensor([[0.0, row, column] for row in range(64) for column in range(64)], device="cpu")
    call = {
        "hidden_states": noise(1, 4096, 64),
        TEXT: noise(1, 512, 4096),
        "pooled_projections": noise(1, 768),
        "img_ids": places,
        "txt_ids": torch.zeros(512, 3, device="cpu"),
        "guidance": noise(1),
    }
    model = diffusers.FluxTransformer2DModel(num_layers=layers, num_single_layers=2 * layers, guidance_embeds=True)
    return model, call


MODELS: Mapping[str, Callable[..., Built]] = {
    "sd15": sd15,
    "sdxl": sdxl,
    "pixart-sigma": pixart_sigma,
    "wan2.1-1.3b": wan,
    "sd3-medium": sd3_medium,
    "sd3.5-large": sd35_large,
    "flux": flux,
}


def built(name: str, device: torch.device | str = "meta", layers: int = 0) -> Built:
    """A model of ``MODELS``, which has so many ``layers`` if it is a transformer (0: all), and the arguments of a call
    with one row."""
    with torch.device(device):
        model, call = MODELS[name](layers) if layers else MODELS[name]()
        call |= {"timestep": torch.full((1,), 600.0)}
    if torch.device(device).type != "meta":
        call = tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, call)
    return model.eval(), call


def counted(model: Any, call: Mapping[str, Any]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**call)
    return int(counter.get_total_flops())


def twice(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.cat([value, value]) if value.shape[:1] == (1,) else value
    return {name: twice(each) for name, each in value.items()} if isinstance(value, Mapping) else value
