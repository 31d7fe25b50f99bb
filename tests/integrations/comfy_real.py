"""ComfyUI's own models at toy size, its patcher and samplers, and guidance by perturbed attention once more, by hand.

COMFYUI_PATH is a checkout of it.
"""

from __future__ import annotations

import itertools
import math
import os
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from tests.perturbed_by_hand import attend

PATH = os.environ.get("COMFYUI_PATH")
ONLY_THERE = [
    pytest.mark.skipif(not PATH, reason="COMFYUI_PATH is not set"),
    pytest.mark.filterwarnings("ignore"),  # ComfyUI's own
]
TEXT, POOLED = 24, 20
FLOAT = {"dtype": torch.float32}
JOINT = {"context_in_dim": TEXT, "vec_in_dim": POOLED, "hidden_size": 48, "mlp_ratio": 2.0, "num_heads": 2}
UNET = {
    **FLOAT,
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": (1, 2),
    "num_heads": 4,
    "use_spatial_transformer": True,
    "transformer_depth": [1, 1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1] * 4,
    "context_dim": TEXT,
    "legacy": False,
}
CONTEXT = {"target": "torch.nn.Linear", "params": {"in_features": TEXT, "out_features": 128}}
MODELS = {  # class of the config, config, shape of the latent, sites, sites on which a reduction acts
    "unet": ("SD15", UNET, (2, 4, 26, 18), 14, 6),
    "mmdit": (
        "SD3",
        {
            **FLOAT,
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
            "depth": 2,
            "input_size": None,
            "pos_embed_scaling_factor": None,
            "pos_embed_max_size": 32,
            "num_patches": 32 * 32,
            "adm_in_channels": POOLED,
            "context_embedder_config": CONTEXT,
        },
        (2, 16, 26, 18),
        2,
        2,
    ),
    "flux": (
        "Flux",
        {
            **FLOAT,
            **JOINT,
            "image_model": "flux",
            "guidance_embed": True,
            "in_channels": 16,
            "out_channels": 16,
            "depth": 2,
            "depth_single_blocks": 2,
            "axes_dim": [4, 10, 10],
            "theta": 10000,
            "patch_size": 2,
            "qkv_bias": True,
        },
        (2, 16, 26, 18),
        4,
        4,
    ),
    "wan": (
        "WAN21_T2V",
        {
            **FLOAT,
            "image_model": "wan2.1",
            "model_type": "t2v",
            "dim": 48,
            "ffn_dim": 64,
            "num_heads": 2,
            "num_layers": 2,
            "in_dim": 16,
            "out_dim": 16,
            "text_dim": TEXT,
            "freq_dim": 32,
        },
        (1, 16, 3, 26, 18),
        4,
        2,
    ),
    "qwen, located at its first call": (
        "QwenImage",
        {
            **FLOAT,
            "image_model": "qwen_image",
            "patch_size": 2,
            "in_channels": 64,
            "out_channels": 16,
            "num_layers": 2,
            "attention_head_dim": 24,
            "num_attention_heads": 2,
            "joint_attention_dim": TEXT,
            "pooled_projection_dim": POOLED,
            "guidance_embeds": False,
            "axes_dims_rope": (4, 10, 10),
        },
        (1, 16, 1, 26, 18),
        2,
        2,
    ),
}


def made(comfy, name, **changes):
    """(patcher, shape of the latent) of one of MODELS, with weights that do something everywhere."""
    kind, config, shape, *_ = MODELS[name]
    chosen = getattr(comfy.supported_models, kind)({**config, **changes})
    chosen.unet_config = {**config, **changes}
    chosen.manual_cast_dtype = None
    model = chosen.get_model({}, device="cpu")
    fill(model.diffusion_model)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, cpu, cpu), shape


def fill(model, seed=0):
    """Weights that do something everywhere; some buffers hold whatever was in memory before."""
    random = torch.Generator().manual_seed(seed)
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(parameter, torch.nn.Parameter) or name == "pos_embed":
            fan_in = parameter[0].numel() if parameter.ndim > 1 and name != "pos_embed" else 25
            parameter.data = torch.randn(parameter.shape, generator=random) * (1.5 * fan_in**-0.5)


def conditioning(seed, tokens=7, **more):
    random = torch.Generator().manual_seed(seed)
    pooled = torch.randn(1, POOLED, generator=random)
    return [[torch.randn(1, tokens, TEXT, generator=random), {"pooled_output": pooled, **more}]]


def same_noise(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


@torch.inference_mode()
def sample(comfy, patcher, shape, *, cfg=3.0, sampler="euler", scheduler="normal", steps=3, texts=None):
    """What three steps make of the same noise."""
    positive, negative = texts or (conditioning(1), conditioning(2))
    start = torch.zeros(shape)
    given = patcher, same_noise(shape), steps, cfg, sampler, scheduler, positive, negative, start
    return comfy.sample.sample(*given, seed=3, disable_pbar=True)


@torch.no_grad()
def called(patcher, shape, text=None, **options):
    """What the model of a loaded patcher predicts, at the timestep 601 of Stable Diffusion."""
    x = same_noise(shape)
    sigma = patcher.model.model_sampling.sigmas[601].expand(len(x))
    options |= {**patcher.model_options["transformer_options"], "sigmas": sigma, "cond_or_uncond": [0]}
    text = conditioning(1)[0][0].expand(len(x), -1, -1) if text is None else text
    given = {"c_crossattn": text, "transformer_options": options}
    if type(patcher.model).__name__ in ("SD3", "Flux"):
        given["y"] = conditioning(1)[0][1]["pooled_output"].expand(len(x), -1)
    return patcher.model.apply_model(x, sigma, **given)


# Guidance by hand: an explicit second call of the model, after classifier-free guidance


UNET_MIDDLE = "middle_block.1.transformer_blocks.0.attn1"


def with_attention(options, site, attention):
    """``options`` of a model, in which its attention ``site`` is ``attention`` of query, key and value (B, H, N, D).

    ``site`` is its number and how many there are, or UNET_MIDDLE, which is replaced as ComfyUI's own PAG does it.
    """
    transformer = dict(options["transformer_options"])
    if site == UNET_MIDDLE:

        def replaced(q, k, v, extra):
            heads = extra["n_heads"]
            q, k, v = (each.unflatten(2, (heads, -1)).transpose(1, 2) for each in (q, k, v))
            return attention(q, k, v).transpose(1, 2).flatten(2)

        others = transformer.get("patches_replace", {})
        attn1 = {**others.get("attn1", {}), ("middle", 0): replaced}
        return {**options, "transformer_options": {**transformer, "patches_replace": {**others, "attn1": attn1}}}

    number, total = site
    calls = itertools.count()

    def override(function, q, k, v, heads, *args, skip_reshape=False, skip_output_reshape=False, **more):
        more |= {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
        if next(calls) % total != number:
            return function(q, k, v, heads, *args, **more)
        if not skip_reshape:
            q, k, v = (each.flatten(2).unflatten(2, (heads, -1)).transpose(1, 2) for each in (q, k, v))
        found = attention(q, k, v)
        return found if skip_output_reshape else found.transpose(1, 2).flatten(2)

    return {**options, "transformer_options": {**transformer, "optimized_attention_override": override}}


def by_hand(comfy, patcher, change):
    """A clone of ``patcher`` that adds to what classifier-free guidance denoises what ``change(args, call)`` gives;
    ``call(text, x, options)`` is one more call of the model, of "cond" or "uncond", or of another positive."""

    def after(args):
        def call(text, x, options=args["model_options"]):
            conds = [args[text], None] if text == "cond" else [None, args[text]] if text == "uncond" else [text, None]
            found = comfy.samplers.calc_cond_batch(args["model"], conds, x, args["sigma"], options)
            return found[text == "uncond"]

        return args["denoised"] + change(args, call)

    clone = patcher.clone()
    clone.set_model_sampler_post_cfg_function(after)
    return clone


def perturbed(scale, site, attention):
    """PAG and its like: s * (c - c')."""

    def change(args, call):
        options = with_attention(args["model_options"], site, attention)
        return scale * (args["cond_denoised"] - call("cond", args["input"], options))

    return change


def self_attention(scale, site, grid, *, flow=False):
    """SAG with a blur of 1 and a threshold of 1: s * (x0' - D(x')), of the negative if there is one.

    ``grid`` is (frames, rows, columns) of the tokens; those of the image are the last ones.
    """
    tokens = math.prod(grid)

    def change(args, call):
        text = "cond" if args["uncond"] is None else "uncond"
        clean, x = args[f"{text}_denoised"], args["input"]
        maps = []

        def noted(query, key, value):
            scores = query.double() @ key.double().mT * query.shape[-1] ** -0.5
            maps.append(scores.softmax(-1))
            return attend(query, key, value)

        call(text, x, with_attention(args["model_options"], site, noted))
        received = maps[0][..., -tokens:, -tokens:].mean(1).sum(1)
        mask = (received / received.mean(1, keepdim=True) > 1).double().unflatten(1, grid).unsqueeze(1)
        films = clean.double().reshape(*clean.shape[:2], -1, *clean.shape[-2:])
        mask = F.interpolate(mask, films.shape[2:])
        degraded = (mask * _blurred(films) + (1 - mask) * films).reshape(clean.shape).float()
        sigma = args["sigma"].view(-1, *[1] * (x.ndim - 1))
        signal = 1 - sigma if flow else 1.0
        return scale * (degraded - call(text, x + signal * (degraded - clean)))

    return change


def _blurred(films):
    """By a Gaussian of 1 that reaches 4 pixels."""
    weight = torch.exp(-0.5 * torch.arange(-4, 5).double() ** 2)
    weight = weight / weight.sum()
    pictures = films.movedim(2, 1).flatten(0, 2).unsqueeze(1)
    found = F.conv2d(F.pad(pictures, (4, 4, 4, 4), mode="reflect"), weight.outer(weight)[None, None])
    return found.reshape(films.movedim(2, 1).shape).movedim(1, 2)


@contextmanager
def one_text_at_a_time(patcher):
    """ComfyUI calls its model for each text, as where memory is short."""
    with mock.patch.object(patcher.model, "memory_required", return_value=math.inf):
        yield
