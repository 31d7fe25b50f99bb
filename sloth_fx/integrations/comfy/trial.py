"""Arguments for a trial run of a diffusion model of ComfyUI, read off its weights.

ComfyUI builds the models of all families itself and gives them the same arguments: the latent with its rows and
columns, the timestep, ``context`` for the text and ``transformer_options``. Models that are not here are located at
their first call, with the arguments of that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sloth_fx.capture.objects import HandedOn

Inputs = dict[str, Any]
_BATCH, _TEXT = 2, 13


def trial_inputs(model: Any) -> Inputs | None:
    """Keyword arguments for a trial run of ``model``; ``None`` where its family is not known here, or is another than
    its name says."""
    make = _MAKERS.get(type(model).__name__)
    if make is None:
        return None
    try:
        inputs: Inputs = {**make(model), "transformer_options": HandedOn()}
        return inputs
    except (AttributeError, TypeError, IndexError, KeyError):
        return None


def _unet(model: Any) -> Inputs:
    """Stable Diffusion 1, 2 and XL."""
    texts = [module.to_k.in_features for path, module in model.named_modules() if path.endswith("attn2")]
    levels = len(model.channel_mult)
    inputs = {
        "x": _meta(model, _BATCH, model.in_channels, 8 << levels, 12 << levels),
        "timesteps": _times(model),
        "context": _meta(model, _BATCH, _TEXT, texts[0]),
    }
    return inputs | ({"y": _meta(model, _BATCH, model.label_emb[0][0].in_features)} if model.num_classes else {})


def _mmdit(model: Any) -> Inputs:
    """Stable Diffusion 3."""
    return {
        "x": _meta(model, _BATCH, model.x_embedder.proj.in_channels, 16, 24),
        "timesteps": _times(model),
        "context": _meta(model, _BATCH, _TEXT, model.context_embedder.in_features),
        "y": _meta(model, _BATCH, model.y_embedder.mlp[0].in_features),
    }


def _flux(model: Any) -> Inputs:
    channels = model.img_in.in_features // model.patch_size**2
    inputs = {
        "x": _meta(model, _BATCH, channels, 16, 24),
        "timestep": _times(model),
        "context": _meta(model, _BATCH, _TEXT, model.txt_in.in_features),
    }
    if hasattr(model, "vector_in"):
        inputs["y"] = _meta(model, _BATCH, model.vector_in.in_layer.in_features)
    return inputs | {"guidance": torch.ones(_BATCH)}


def _wan(model: Any) -> Inputs:
    return {
        "x": _meta(model, _BATCH, model.patch_embedding.in_channels, 3, 16, 24),
        "timestep": _times(model),
        "context": _meta(model, _BATCH, _TEXT, model.text_embedding[0].in_features),
    }


_MAKERS: Mapping[str, Callable[[Any], Inputs]] = {
    "UNetModel": _unet,
    "OpenAISignatureMMDITWrapper": _mmdit,
    "Flux": _flux,
    "Chroma": _flux,
    "WanModel": _wan,
}


def _meta(model: nn.Module, *shape: int) -> Tensor:
    """A tensor without data, of the type that the model computes in."""
    dtype = next((each.dtype for each in model.parameters() if each.dtype.is_floating_point), torch.float32)
    return torch.empty(shape, dtype=dtype if dtype.itemsize > 1 else torch.float32, device="meta")


def _times(model: nn.Module) -> Tensor:
    return _meta(model, _BATCH)
