"""Tiny models of diffusers' classes of every family, among them those that no constructor makes by itself."""

import functools
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.pipelines.deprecated.unidiffuser.modeling_uvit import UniDiffuserModel
from torch import nn

UNET = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
UP = {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
CONTROL = {**UNET, "conditioning_embedding_out_channels": (4, 8, 8)}
TEXT_TIME = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 32,
}
UNION = {
    **CONTROL,
    **TEXT_TIME,
    "num_control_type": 2,
    "num_trans_channel": 8,
    "num_trans_head": 2,
    "num_proj_channel": 8,
}
FLUX = {
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 12,
    "axes_dims_rope": (4, 4, 8),
}
QWEN = {
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": (8, 4, 4),
}
SD3 = {
    "sample_size": 24,
    "in_channels": 4,
    "num_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "caption_projection_dim": 16,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 12,
    "pos_embed_max_size": 24,
}
HUNYUAN_DIT = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "cross_attention_dim": 24,
    "cross_attention_dim_t5": 32,
    "pooled_projection_dim": 12,
    "hidden_size": 16,
    "text_len": 5,
    "text_len_t5": 6,
}
Z_IMAGE = {"dim": 32, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}


def _z_image() -> nn.Module:
    return diffusers.ZImageTransformer2DModel(
        **Z_IMAGE, in_channels=4, n_layers=2, cap_feat_dim=24, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32]
    )


def _z_image_control() -> nn.Module:
    control = diffusers.ZImageControlNetModel(
        **Z_IMAGE, control_in_dim=5, control_layers_places=[0, 1], control_refiner_layers_places=[0]
    )
    return diffusers.ZImageControlNetModel.from_transformer(control, _z_image())


def _several(name: str, cls: str, config: dict[str, Any], count: int = 2) -> Callable[[], nn.Module]:
    return lambda: getattr(diffusers, name)([getattr(diffusers, cls)(**config) for _ in range(count)])


def _uni_diffuser() -> nn.Module:
    return UniDiffuserModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        norm_num_groups=4,
        text_dim=24,
        clip_img_dim=12,
        num_text_tokens=13,
    )


def _model(name: str, **config: Any) -> Callable[[], nn.Module]:
    return functools.partial(getattr(diffusers, name), **config)


TINY: dict[str, Callable[[], nn.Module]] = {
    "UNet2DConditionModel": _model("UNet2DConditionModel", **UNET, **UP, **TEXT_TIME, sample_size=(17, 21)),
    "UNet2DModel": _model(
        "UNet2DModel",
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        num_class_embeds=3,
    ),
    "ControlNetModel": _model("ControlNetModel", **CONTROL),
    "MultiControlNetModel": _several("MultiControlNetModel", "ControlNetModel", CONTROL),
    "ControlNetUnionModel": _model("ControlNetUnionModel", **UNION),
    "MultiControlNetUnionModel": lambda: diffusers.models.controlnets.multicontrolnet_union.MultiControlNetUnionModel(
        [diffusers.ControlNetUnionModel(**UNION) for _ in range(2)]
    ),
    "UniDiffuserModel": _uni_diffuser,
    "UVit2DModel": _model(
        "UVit2DModel",
        hidden_size=32,
        cond_embed_dim=16,
        micro_cond_encode_dim=8,
        micro_cond_embed_dim=40,
        encoder_hidden_size=24,
        vocab_size=64,
        codebook_size=48,
        in_channels=16,
        block_out_channels=16,
        num_res_blocks=1,
        block_num_heads=2,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
    ),
    "SD3Transformer2DModel": _model("SD3Transformer2DModel", **SD3),
    "SD3MultiControlNetModel": _several("SD3MultiControlNetModel", "SD3ControlNetModel", SD3),
    "HunyuanDiT2DModel": _model("HunyuanDiT2DModel", **HUNYUAN_DIT, num_layers=2),
    "HunyuanDiT2DMultiControlNetModel": _several(
        "HunyuanDiT2DMultiControlNetModel",
        "HunyuanDiT2DControlNetModel",
        {**HUNYUAN_DIT, "transformer_num_layers": 4},
    ),
    "FluxTransformer2DModel": _model("FluxTransformer2DModel", **FLUX, guidance_embeds=True),
    "FluxMultiControlNetModel": _several("FluxMultiControlNetModel", "FluxControlNetModel", FLUX),
    "QwenImageTransformer2DModel": _model("QwenImageTransformer2DModel", **QWEN),
    "QwenImageMultiControlNetModel": _several(
        "QwenImageMultiControlNetModel", "QwenImageControlNetModel", QWEN, count=1
    ),
    "ZImageTransformer2DModel": _z_image,
    "ZImageControlNetModel": _z_image_control,
    "WanTransformer3DModel": _model(
        "WanTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    ),
    "CogVideoXTransformer3DModel": _model(
        "CogVideoXTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=24,
        num_layers=1,
        sample_width=22,
        sample_height=14,
        sample_frames=9,
        max_text_seq_length=11,
        use_rotary_positional_embeddings=True,
        use_learned_positional_embeddings=True,
    ),
    "LTXVideoTransformer3DModel": _model(
        "LTXVideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=24,
    ),
    "StableAudioDiTModel": _model(
        "StableAudioDiTModel",
        in_channels=3,
        out_channels=3,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        cross_attention_dim=16,
        time_proj_dim=8,
        global_states_input_dim=8,
        cross_attention_input_dim=24,
    ),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return TINY[name]().eval()
