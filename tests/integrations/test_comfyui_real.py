"""The nodes on ComfyUI's own models, patcher and samplers, at toy size. Runs where COMFYUI_PATH is a checkout of it."""

import contextlib
import os
import sys

import pytest
import torch

import sloth_fx
from sloth_fx.errors import SlothError
from sloth_fx.integrations.comfy.patching import patch_model, report_of
from sloth_fx.patch import patch_of

PATH = os.environ.get("COMFYUI_PATH")
pytestmark = [
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


def reduction(rate):
    each = sloth_fx.Reduction(rate=rate)
    return sloth_fx.SlothfulAttention(in_=each, out=each, keep_middle=True)


@pytest.fixture(scope="module")
def comfy():
    """ComfyUI's modules, told to stay on the CPU."""
    sys.path.insert(0, PATH)
    arguments, sys.argv = sys.argv, ["pytest", "--cpu"]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args
        import comfy.model_management
        import comfy.model_patcher
        import comfy.sample
        import comfy.supported_models
        import comfy.utils

        yield comfy
    finally:
        sys.argv = arguments
        with contextlib.suppress(ValueError):
            sys.path.remove(PATH)


def made(comfy, name, **changes):
    """(patcher, shape of the latent) of one of MODELS, with weights that do something everywhere."""
    kind, config, shape, *_ = MODELS[name]
    chosen = getattr(comfy.supported_models, kind)({**config, **changes})
    chosen.unet_config = {**config, **changes}
    chosen.manual_cast_dtype = None
    model = chosen.get_model({}, device="cpu")
    random = torch.Generator().manual_seed(0)
    for parameter in model.diffusion_model.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
        parameter.data = torch.randn(parameter.shape, generator=random) * (1.5 * fan_in**-0.5)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, cpu, cpu), shape


def conditioning(seed, tokens=7):
    random = torch.Generator().manual_seed(seed)
    pooled = torch.randn(1, POOLED, generator=random)
    return [[torch.randn(1, tokens, TEXT, generator=random), {"pooled_output": pooled}]]


@torch.inference_mode()
def sample(comfy, patcher, shape):
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    texts = conditioning(1), conditioning(2)
    return comfy.sample.sample(
        patcher, noise, 3, 3.0, "euler", "normal", *texts, torch.zeros(shape), seed=3, disable_pbar=True
    )


@pytest.mark.parametrize("name", MODELS)
def test_families(comfy, name):
    patcher, shape = made(comfy, name)
    plain = sample(comfy, patcher, shape)
    assert torch.equal(sample(comfy, patch_model(patcher, [reduction(1.0)]), shape), plain)
    patched = patch_model(patcher, [reduction(6.0)])
    found = sample(comfy, patched, shape)
    assert torch.equal(sample(comfy, patched, shape), found)
    assert not torch.equal(found, plain)
    sites = list(report_of(patched))
    assert (len(sites), sum(bool(site.operators) for site in sites)) == MODELS[name][3:]
    assert torch.equal(sample(comfy, patcher, shape), plain)


@pytest.mark.parametrize("name", MODELS)
def test_negative(comfy, name):
    patcher, shape = made(comfy, name)
    spec = [sloth_fx.NAG(scale=5.0)]
    one = sample(comfy, patch_model(patcher, spec, negative=conditioning(5)), shape)
    other = sample(comfy, patch_model(patcher, spec, negative=conditioning(6)), shape)
    same = sample(comfy, patch_model(patcher, spec, negative=conditioning(1)), shape)
    assert not torch.equal(one, other)
    torch.testing.assert_close(same, sample(comfy, patcher, shape), rtol=1e-3, atol=1e-3)  # from itself, no way away


@torch.inference_mode()
def test_lora_and_lowvram(comfy):
    patcher, shape = made(comfy, "unet")
    path = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1"
    difference = torch.randn(32, 32, generator=torch.Generator().manual_seed(5))
    patches = {f"{path}.to_k.weight": ("diff", (difference,)), f"{path}.to_out.0.weight": ("diff", (difference,))}
    before, after = patcher.clone(), patch_model(patcher, [reduction(6.0)])
    before.add_patches(patches)
    after.add_patches(patches)
    found = sample(comfy, patch_model(before, [reduction(6.0)]), shape)
    assert torch.equal(sample(comfy, after, shape), found)
    assert not torch.equal(sample(comfy, patch_model(patcher, [reduction(6.0)]), shape), found)
    comfy.model_management.unload_all_models()
    results = []
    for memory in (20_000, 0):  # bytes; 0 is all
        after.patch_model(torch.device("cpu"), lowvram_model_memory=memory)
        cast = [getattr(each, "comfy_cast_weights", False) for each in after.model.modules()]
        assert any(cast) == (memory > 0)
        results.append(called(after, shape))
        after.unpatch_model(torch.device("cpu"))
    torch.testing.assert_close(*results)


def called(patcher, shape, timestep=601):
    """What the model of a loaded patcher predicts."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    sigma = patcher.model.model_sampling.sigmas[timestep].expand(len(x))
    options = {**patcher.model_options["transformer_options"], "sigmas": sigma, "cond_or_uncond": [0]}
    text = conditioning(1)[0][0].expand(len(x), -1, -1)
    return patcher.model.apply_model(x, sigma, c_crossattn=text, transformer_options=options)


@torch.no_grad()
def test_the_twin_of_diffusers(comfy):
    """The same weights in diffusers' UNet, with the same spec at the same moment: the same numbers."""
    diffusers = pytest.importorskip("diffusers")
    patcher, shape = made(comfy, "unet")
    twin = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        cross_attention_dim=TEXT,
        attention_head_dim=4,
    ).eval()
    names = comfy.utils.unet_to_diffusers({**UNET, "transformer_depth": [1, 1], "transformer_depth_output": [1] * 4})
    weights = patcher.model.diffusion_model.state_dict()
    twin.load_state_dict({name: weights[names[name]] for name in twin.state_dict()})
    spec = sloth_fx.NearSightedAttention(base_tile_size=8, peak_tile_size=10)
    patched = patch_model(patcher, [spec])
    patched.patch_model()
    found = called(patched, shape)
    moment = patch_of(patched.object_patches["diffusion_model"]).context.moment
    patched.unpatch_model()
    assert (found - called(patcher, shape)).abs().max() > 1e-2
    twin = sloth_fx.transform(twin, spec)
    sloth_fx.context(twin).at(moment.progress, moment.sigma)
    x, sigma = torch.randn(shape, generator=torch.Generator().manual_seed(3)), moment.sigma
    text = conditioning(1)[0][0].expand(len(x), -1, -1)
    noise = twin(x / (sigma**2 + 1) ** 0.5, 601, encoder_hidden_states=text).sample
    torch.testing.assert_close(found, x - sigma * noise, rtol=1e-4, atol=1e-4)
    assert moment.progress == pytest.approx(0.399)


def test_collisions(comfy):
    patcher, shape = made(comfy, "unet")
    patched = patch_model(patcher, [reduction(6.0)])
    patched.set_model_attn1_replace(lambda q, k, v, extra: v, "output", 1)
    with pytest.raises(SlothError, match="replaces attn1 at block"):
        sample(comfy, patched, shape)
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    compiled = patcher.clone()
    set_torch_compile_wrapper(compiled, "eager")
    with pytest.raises(SlothError, match="put TorchCompileModel after"):
        patch_model(compiled, [reduction(6.0)])
