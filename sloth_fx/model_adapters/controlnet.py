"""ControlNets: the denoiser that they steer, and the image or map that they read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sloth_fx.model_adapters import image, packed, unet, video
from sloth_fx.model_adapters.adapter import Inputs, ModelAdapter
from sloth_fx.model_adapters.parameters import per_image
from sloth_fx.model_adapters.trial import Size, Trial, TrialInputs


def steering(base: ModelAdapter, sizes: Mapping[str, Size] | None = None, **values: Any) -> ModelAdapter:
    """The adapter of a ControlNet for models with the adapter ``base``; ``sizes`` and ``values`` are for its trial."""
    assert isinstance(base.inputs, TrialInputs)
    sizes, values = {**base.inputs.sizes, **(sizes or {})}, {**base.inputs.values, **values}
    return replace(base, inputs=replace(base.inputs, sizes=sizes, values=values))


def pixels(trial: Trial) -> Any:
    """The image that a ControlNet reads, which its convolutions halve until it is as large as the latent."""
    prefix = "ctrl_" if trial.field("ctrl_conditioning_channels") else ""
    halvings = len(trial.field(f"{prefix}conditioning_embedding_out_channels", (0,))) - 1
    channels = trial.size(f"{prefix}conditioning_channels|3")
    height, width = (trial.size(side) * 2**halvings for side in ("height", "width"))
    return trial.zeros(trial.size("batch"), channels, height, width)


def several(net: ModelAdapter, *own: str, **values: Any) -> ModelAdapter:
    """The adapter of several ControlNets in one: the inputs of the first, with a list of what each has of its own."""
    single = steering(net, conditioning_scale=lambda trial: 1.0, **values).inputs
    assert single is not None
    listed = {"controlnet_cond", "conditioning_scale", *own}

    def inputs(model: Any) -> Inputs:
        nets = list(model.nets)
        return {name: [value] * len(nets) if name in listed else value for name, value in single(nets[0]).items()}

    return replace(net, inputs=inputs)


def z_image_channels(trial: Trial) -> int:
    """The embedders were taken from the transformer that is steered; the config does not know how wide they are."""
    time, height, width = (trial.size(axis) for axis in ("all_f_patch_size", "all_patch_size", "all_patch_size"))
    embedder = next(iter(trial.model.get_submodule("all_x_embedder").children()))
    return int(embedder.get_parameter("weight").shape[1]) // (time * height * width)


def z_image_text_channels(trial: Trial) -> int:
    weights = trial.model.get_submodule("cap_embedder").parameters()
    return next(weight.shape[1] for weight in weights if weight.ndim == 2)


UNET = unet.ADAPTERS["UNet2DConditionModel"]
MOTION = unet.ADAPTERS["UNetMotionModel"]
HUNYUAN_DIT = steering(image.ADAPTERS["HunyuanDiT2DModel"])
Z_IMAGE = image.ADAPTERS["ZImageTransformer2DModel"]
CONTROLNET = steering(UNET, controlnet_cond=pixels)
UNION = steering(
    UNET,
    controlnet_cond=lambda trial: [pixels(trial)],
    control_type="batch num_control_type",
    control_type_idx=lambda trial: [0],
)
FLUX = steering(
    packed.ADAPTERS["FluxTransformer2DModel"],
    controlnet_cond="batch tokens in_channels",
    controlnet_mode="long batch 1 if num_mode",
)
QWEN_IMAGE = steering(
    packed.ADAPTERS["QwenImageTransformer2DModel"],
    controlnet_cond="batch tokens in_channels+extra_condition_channels",
)
SD3 = steering(
    image.ADAPTERS["SD3Transformer2DModel"],
    controlnet_cond="batch in_channels+extra_conditioning_channels height width",
)

ADAPTERS = {
    "ControlNetModel": CONTROLNET,
    "ControlNetUnionModel": UNION,
    "MultiControlNetUnionModel": several(UNION, "control_type", "control_type_idx"),
    "CosmosControlNetModel": steering(
        replace(video.ADAPTERS["CosmosTransformer3DModel"], latent="latents"),
        controls_latents="batch latent_channels-2 time height width",
        latents="batch latent_channels-2 time height width",
        condition_mask="batch 1 time height width",
    ),
    "FluxControlNetModel": FLUX,
    "FluxMultiControlNetModel": several(FLUX, "controlnet_mode", controlnet_mode="long batch"),
    "HunyuanDiT2DControlNetModel": HUNYUAN_DIT,
    "HunyuanDiT2DMultiControlNetModel": several(HUNYUAN_DIT),
    "MultiControlNetModel": several(CONTROLNET),
    "QwenImageControlNetModel": QWEN_IMAGE,
    "QwenImageMultiControlNetModel": several(QWEN_IMAGE),
    "SD3ControlNetModel": SD3,
    "SD3MultiControlNetModel": several(SD3),
    "SanaControlNetModel": steering(image.ADAPTERS["SanaTransformer2DModel"]),
    "SparseControlNetModel": steering(
        MOTION,
        controlnet_cond="batch conditioning_channels time height width",
        conditioning_mask="batch 1 time height width if concat_conditioning_mask",
    ),
    "UNetControlNetXSModel": steering(UNET, sample="batch 4 height width", controlnet_cond=pixels),
    "ZImageControlNetModel": steering(
        Z_IMAGE,
        {"channels": z_image_channels, "text_channels": z_image_text_channels},
        x=per_image("channels time height width"),
        cap_feats=per_image("text text_channels"),
        control_context=per_image("control_in_dim time height width"),
    ),
}
