"""Stock pipelines around tiny random models. Prompts are given as embeddings, so that no tokenizer is needed."""

from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import nn

from tests import models

numpy_warning = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # the schedulers' own
HEIGHT, WIDTH = 13 * 8, 21 * 8
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DDIM = {**BETAS, "clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False}


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomised(model: nn.Module) -> Any:
    """Weights that depend on nothing that ran before, and do something everywhere."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
            parameter.copy_(torch.randn(parameter.shape, generator=random) * (1.5 * fan_in**-0.5))
    return model.eval()


def vae(channels: int = 4) -> AutoencoderKL:
    return randomised(
        AutoencoderKL(
            latent_channels=channels,
            block_out_channels=(8,) * 4,
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            shift_factor=0.1,
            scaling_factor=0.5,
        )
    )


def _sd(kind: Any, unet: nn.Module | None = None, **parts: Any) -> Any:
    return quiet(
        kind(
            vae=vae(),
            text_encoder=None,
            tokenizer=None,
            unet=unet if unet is not None else models.one_level(),
            scheduler=DDIMScheduler(**DDIM),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **parts,
        )
    )


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def text(batch: int = 2, channels: int = models.TEXT) -> dict[str, Any]:
    return {
        "prompt_embeds": noise(batch, 7, channels),
        "negative_prompt_embeds": noise(batch, 7, channels, seed=2),
    }


def sd() -> tuple[Any, dict[str, Any]]:
    return _sd(StableDiffusionPipeline), {**text(), "height": HEIGHT, "width": WIDTH, "guidance_scale": 3.0}


def image_to_image() -> tuple[Any, dict[str, Any]]:
    image = noise(2, 3, HEIGHT, WIDTH, seed=4).clamp(0, 1)
    return _sd(StableDiffusionImg2ImgPipeline), {**text(), "image": image, "strength": 0.5, "guidance_scale": 3.0}


def inpainting() -> tuple[Any, dict[str, Any]]:
    mask = torch.zeros(2, 1, HEIGHT, WIDTH)
    mask[..., 40:90, 30:100] = 1.0
    image = noise(2, 3, HEIGHT, WIDTH, seed=4).clamp(0, 1)
    given = {**text(), "image": image, "mask_image": mask, "height": HEIGHT, "width": WIDTH, "strength": 0.7}
    return _sd(StableDiffusionInpaintPipeline, models.one_level(in_channels=9)), given


def control() -> tuple[Any, dict[str, Any]]:
    unet = models.one_level()
    controlnet = randomised(
        ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 8, 8), load_weights_from_unet=False)
    )
    given = {**text(), "image": noise(2, 3, HEIGHT, WIDTH).clamp(0, 1), "height": HEIGHT, "width": WIDTH}
    return _sd(StableDiffusionControlNetPipeline, unet, controlnet=controlnet), given


def sdxl() -> tuple[Any, dict[str, Any]]:
    pipe = quiet(
        StableDiffusionXLPipeline(
            vae=vae(),
            text_encoder=None,
            text_encoder_2=None,
            tokenizer=None,
            tokenizer_2=None,
            unet=models.sdxl(projection_class_embeddings_input_dim=6 * 4 + 8),
            scheduler=EulerDiscreteScheduler(**BETAS),
            add_watermarker=False,
        )
    )
    pooled = {"pooled_prompt_embeds": noise(2, 8), "negative_pooled_prompt_embeds": noise(2, 8, seed=3)}
    return pipe, {**text(), **pooled, "height": HEIGHT, "width": WIDTH, "guidance_scale": 3.0}


def sd3() -> tuple[Any, dict[str, Any]]:
    transformer = randomised(
        SD3Transformer2DModel(
            sample_size=32,
            patch_size=1,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=24,
            caption_projection_dim=16,
            pooled_projection_dim=12,
            out_channels=4,
            pos_embed_max_size=32,
        )
    )
    encoders = {f"text_encoder{n}": None for n in ("", "_2", "_3")} | {f"tokenizer{n}": None for n in ("", "_2", "_3")}
    pipe = StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae(), **encoders
    )
    pooled = {"pooled_prompt_embeds": noise(2, 12), "negative_pooled_prompt_embeds": noise(2, 12, seed=3)}
    return quiet(pipe), {**text(), **pooled, "height": HEIGHT, "width": WIDTH, "guidance_scale": 3.0}


def pixart() -> tuple[Any, dict[str, Any]]:
    transformer = randomised(
        PixArtTransformer2DModel(
            sample_size=16,
            num_layers=2,
            patch_size=1,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_channels=24,
            cross_attention_dim=16,
            in_channels=4,
            out_channels=8,
            use_additional_conditions=False,
        )
    )
    pipe = PixArtSigmaPipeline(
        tokenizer=None, text_encoder=None, vae=vae(), transformer=transformer, scheduler=DDIMScheduler(**DDIM)
    )
    masks = {"prompt_attention_mask": torch.ones(2, 7), "negative_prompt_attention_mask": torch.ones(2, 7)}
    size = {"height": HEIGHT, "width": WIDTH, "use_resolution_binning": False}
    return quiet(pipe), {**text(), **masks, **size, "negative_prompt": None, "guidance_scale": 3.0}


def flux() -> tuple[Any, dict[str, Any]]:
    transformer = randomised(
        FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=12,
            axes_dims_rope=(4, 4, 8),
        )
    )
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    embeds = {"prompt_embeds": noise(2, 7, 24), "pooled_prompt_embeds": noise(2, 12)}
    return quiet(pipe), {**embeds, "height": 9 * 16, "width": 15 * 16, "max_sequence_length": 7}


PIPELINES = {
    "sd": sd,
    "image to image": image_to_image,
    "inpainting": inpainting,
    "control": control,
    "sdxl": sdxl,
    "sd3": sd3,
    "pixart": pixart,
    "flux": flux,
}


def run(pipe: Any, given: dict[str, Any], *, steps: int = 4, **changes: Any) -> torch.Tensor:
    """The final latents of a batch of two images."""
    generator = torch.Generator().manual_seed(7)
    options = {"num_inference_steps": steps, "generator": generator, "output_type": "latent", **given, **changes}
    return pipe(**options).images


def instructions() -> tuple[Any, dict[str, Any]]:
    """An image is edited by a text; both guide."""
    parts = {"image_encoder": None}
    pipe = _sd(StableDiffusionInstructPix2PixPipeline, models.one_level(in_channels=8), **parts)
    return pipe, {**text(), "image": noise(2, 3, HEIGHT, WIDTH, seed=4).clamp(0, 1), "guidance_scale": 3.0}


def wan() -> tuple[Any, dict[str, Any]]:
    """A film in latents, by two transformers that take turns."""
    transformers = [
        randomised(
            WanTransformer3DModel(
                patch_size=(1, 2, 2),
                num_attention_heads=2,
                attention_head_dim=12,
                in_channels=4,
                out_channels=4,
                text_dim=24,
                freq_dim=16,
                ffn_dim=16,
                num_layers=1,
                rope_max_seq_len=64,
            )
        )
        for _ in range(2)
    ]
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        transformer=transformers[0],
        transformer_2=transformers[1],
        vae=None,
        scheduler=scheduler,
        boundary_ratio=0.8,
    )
    given = {**text(), "height": 80, "width": 144, "num_frames": 5, "num_inference_steps": 4, "guidance_scale": 3.0}
    return quiet(pipe), {**given, "output_type": "latent", "generator": torch.Generator().manual_seed(7)}
