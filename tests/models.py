"""Tiny models of the real classes, with weights that make attention far from uniform: there, pooling is visible."""

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

TEXT = 24  # channels of the text
SCORES = 3.0  # standard deviation of attention scores; with fresh weights attention is nearly uniform


def sd15(**changes: Any) -> UNet2DConditionModel:
    """Four levels, attention from the first to the third and in the middle, as in Stable Diffusion 1.5."""
    return _randomised(
        UNet2DConditionModel(
            **{
                "sample_size": 16,
                "layers_per_block": 1,
                "block_out_channels": (16, 32, 32, 32),
                "norm_num_groups": 8,
                "cross_attention_dim": TEXT,
                "attention_head_dim": 2,  # the number of heads, whatever the name says
                "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
                "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
                **changes,
            }
        )
    )


def sdxl(**changes: Any) -> UNet2DConditionModel:
    """Three levels, no attention at the first, several transformer layers, text_time embedding, as in SDXL."""
    return _randomised(
        UNet2DConditionModel(
            **{
                "sample_size": 16,
                "layers_per_block": 1,
                "block_out_channels": (16, 32, 32),
                "norm_num_groups": 8,
                "cross_attention_dim": TEXT,
                "attention_head_dim": (2, 2, 4),
                "use_linear_projection": True,
                "transformer_layers_per_block": (1, 1, 2),
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 4,
                "projection_class_embeddings_input_dim": 6 * 4 + 8,
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                **changes,
            }
        )
    )


def ssd1b() -> UNet2DConditionModel:
    """SDXL with a middle block that has no attention, and numbers of transformer layers that differ within a block."""
    return sdxl(
        mid_block_type="UNetMidBlock2D",
        transformer_layers_per_block=(0, (1,), (2,)),
        reverse_transformer_layers_per_block=((1, 2), (2, 1), 1),
    )


def unconditional(**changes: Any) -> UNet2DModel:
    """A UNet without text; its attention takes feature maps, and normalises them itself."""
    return _randomised(
        UNet2DModel(
            **{
                "sample_size": 16,
                "in_channels": 4,
                "out_channels": 4,
                "layers_per_block": 1,
                "block_out_channels": (16, 32, 32),
                "norm_num_groups": 8,
                "attention_head_dim": 16,
                "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
                "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
                **changes,
            }
        )
    )


def two_levels(**changes: Any) -> UNet2DConditionModel:
    """Attention at the first level and in the middle: the least with both. TorchDynamo takes seconds to trace each."""
    return sd15(
        **{
            "block_out_channels": (16, 32),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            **changes,
        }
    )


def one_level(**changes: Any) -> UNet2DConditionModel:
    """Attention at the first level alone, where a mask for self-attention has one length."""
    return two_levels(mid_block_type="UNetMidBlock2D", **changes)


MODELS = {
    "sd15": sd15,
    "sdxl": sdxl,
    "ssd1b": ssd1b,
    "unconditional": unconditional,
    "two_levels": two_levels,
    "one_level": one_level,
}


@functools.cache
def shared(name: str) -> nn.Module:
    """One model of each kind for all tests that leave it as it is; a test that changes a model makes its own."""
    return MODELS[name]()


def inputs(
    model: nn.Module, batch: int = 2, height: int = 13, width: int = 21, *, timestep: Any = 500
) -> dict[str, Any]:
    """Arguments for a call of ``model``; every image and text of the batch differs."""
    config: Any = model.config
    random = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    found = {"sample": noise(batch, config.in_channels, height, width), "timestep": timestep}
    if isinstance(model, UNet2DConditionModel):
        found["encoder_hidden_states"] = noise(batch, 7, config.cross_attention_dim)
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            found["added_cond_kwargs"] = {"text_embeds": noise(batch, pooled), "time_ids": noise(batch, 6)}
    return found


def run(model: nn.Module, values: dict[str, Any]) -> torch.Tensor:
    """The prediction, without gradients."""
    with torch.no_grad():
        return model(**values).sample


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating point tensors of nested dicts in another dtype."""
    if isinstance(value, dict):
        return {key: cast(item, dtype) for key, item in value.items()}
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def state_of(model: nn.Module) -> list[Any]:
    """Everything about a model that a transform could leave traces in."""
    return [
        *((path, type(module), list(vars(module)), list(module._modules)) for path, module in model.named_modules()),
        *((len(module._forward_pre_hooks), vars(module).get("forward")) for module in model.modules()),
        *((name, id(each), each.dtype, each.device, each._version) for name, each in tensors_of(model)),
    ]


def tensors_of(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


class _Untraceable:
    """A processor that hides its projections in functions for ``torch.vmap``."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        query, key, value = (
            torch.vmap(lambda row, project=project: project(row))(hidden_states)
            .unflatten(2, (attn.heads, -1))
            .transpose(1, 2)
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        return attn.to_out[0](F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


BLIND = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"


def blind(model: nn.Module) -> None:
    """Make one site of an SDXL-like model such that it cannot be captured."""
    model.get_submodule(BLIND).set_processor(_Untraceable())


def _randomised(model: Any) -> Any:
    """The same weights at every call, whatever ran before."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            noise = torch.randn(parameter.shape, generator=random)
            if parameter.ndim > 1:
                gain = SCORES**0.5 if name.endswith(("to_q.weight", "to_k.weight")) else 1.0
                parameter.copy_(noise * gain * fan_in**-0.5)
            else:
                parameter.copy_(0.2 * noise + (1.0 if name.endswith("weight") else 0.0))
    return model.eval()
