"""ComfyUI's own models and those of diffusers with the same weights: the same spec gives the same numbers in both."""

import re

import pytest
import torch

import sloth_fx
from sloth_fx.integrations.comfy.patching import patch_model
from sloth_fx.patch import patch_of
from tests.integrations.comfy_real import MODELS, ONLY_THERE, POOLED, TEXT, called, conditioning, made, same_noise

pytestmark = ONLY_THERE
NEGATIVE = conditioning(5)  # as long as the positive, which is without masks or ids of its own
TILES = sloth_fx.NearSightedAttention(base_tile_size=8, peak_tile_size=10)
SPECS = {
    "tiles": [TILES],
    "reduced keys": [sloth_fx.SlothfulAttention(keep_middle=False)],
    "fewer keys": [sloth_fx.TokenDownsample()],
    "a negative prompt": [sloth_fx.NAG(scale=7.0, alpha=0.6)],
    "PAG": [sloth_fx.PAG()],
    "SAG": [sloth_fx.SAG()],
    "three": [TILES, sloth_fx.NAG(scale=7.0), sloth_fx.PAG()],
}
WAN = {  # what diffusers calls the parts of Wan otherwise
    r"^condition_embedder\.(text_embedder|time_embedder)\.linear_1": r"\1.0",
    r"^condition_embedder\.(text_embedder|time_embedder)\.linear_2": r"\1.2",
    r"^(text|time)_embedder": r"\1_embedding",
    r"^condition_embedder\.time_proj": "time_projection.1",
    r"\.to_out\.0\.": ".o.",
    r"\.to_(q|k|v)\.": r".\1.",
    r"\.attn1\.": ".self_attn.",
    r"\.attn2\.": ".cross_attn.",
    r"\.norm2\.": ".norm3.",
    r"\.ffn\.net\.0\.proj\.": ".ffn.0.",
    r"\.ffn\.net\.2\.": ".ffn.2.",
    r"^(blocks\.\d+)\.scale_shift_table": r"\1.modulation",
    r"^scale_shift_table": "head.modulation",
    r"^proj_out": "head.head",
}


def unet(comfy, diffusers):
    twin = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        cross_attention_dim=TEXT,
        attention_head_dim=4,
    )
    return made(comfy, "unet"), twin, comfy.utils.unet_to_diffusers(MODELS["unet"][1])


def mmdit(comfy, diffusers):
    edge = 33
    twin = diffusers.SD3Transformer2DModel(
        sample_size=edge,
        pos_embed_max_size=edge,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        caption_projection_dim=128,
        pooled_projection_dim=POOLED,
    )
    changes = {"pos_embed_max_size": edge, "num_patches": edge * edge}
    return made(comfy, "mmdit", **changes), twin, comfy.utils.mmdit_to_diffusers({"depth": 2})


def flux(comfy, diffusers):
    twin = diffusers.FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=24,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        pooled_projection_dim=POOLED,
        axes_dims_rope=(4, 10, 10),
    )
    names = comfy.utils.flux_to_diffusers({"depth": 2, "depth_single_blocks": 2, "hidden_size": 48})
    return made(comfy, "flux", guidance_embed=False, mlp_ratio=4.0), twin, names


def wan(comfy, diffusers):
    twin = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        text_dim=TEXT,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
    )
    names = {}
    for name in twin.state_dict():
        names[name] = name
        for theirs, ours in WAN.items():
            names[name] = re.sub(theirs, ours, names[name])
    return made(comfy, "wan"), twin, names


def load(twin, weights, names):
    """ComfyUI's maps have a key, the part of it (axis, first, size), and what else is done to it."""
    found = {}
    for name, shown in twin.state_dict().items():
        key, part, change = (*((names[name],) if isinstance(names[name], str) else names[name]), None, None)[:3]
        tensor = weights[key] if part is None else weights[key].narrow(*part)
        found[name] = (tensor if change is None else change(tensor)).reshape(shown.shape)
    twin.load_state_dict(found)
    return twin.eval()


def arguments(family, x, sigma, timestep, text):
    """Of the twin's call for a latent with so much noise."""
    pooled = conditioning(1)[0][1]["pooled_output"].expand(len(x), -1)
    both = {"encoder_hidden_states": text}
    if family == "unet":
        return {"sample": x / (sigma**2 + 1) ** 0.5, "timestep": timestep, **both}
    times = timestep.expand(len(x))
    if family == "wan":
        return {"hidden_states": x, "timestep": times, **both}
    if family == "mmdit":
        return {"hidden_states": x, "timestep": times, "pooled_projections": pooled, **both}
    rows, columns = x.shape[2] // 2, x.shape[3] // 2
    places = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns)).float()
    ids = {"img_ids": places, "txt_ids": torch.zeros(text.shape[1], 3)}
    packed = x.unflatten(3, (columns, 2)).unflatten(2, (rows, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return {"hidden_states": packed, "timestep": times, "pooled_projections": pooled, **ids, **both}


def unpacked(noise, shape):
    if noise.shape == shape:
        return noise
    rows, columns = shape[2] // 2, shape[3] // 2
    parts = noise.view(shape[0], rows, columns, shape[1], 2, 2)
    return parts.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param(family, name, id=f"{family.__name__}-{name}")
        for family in (unet, mmdit, flux, wan)
        for name in SPECS
        if (family, name) != (flux, "SAG")  # which blurs the latent as the model has it, packed in diffusers
    ],
)
@torch.no_grad()
def test_the_twin_of_diffusers(comfy, family, name):
    diffusers = pytest.importorskip("diffusers")
    specs, kind = SPECS[name], family.__name__
    (patcher, shape), twin, names = family(comfy, diffusers)
    load(twin, patcher.model.diffusion_model.state_dict(), names)
    guided = any(isinstance(each, sloth_fx.NAG) for each in specs)
    patched = patch_model(patcher, specs, negative=NEGATIVE if guided else None)
    patched.patch_model()
    found = called(patched, shape)
    moment = patch_of(patched.object_patches["diffusion_model"]).context.moment
    patched.unpatch_model()

    sampling = patcher.model.model_sampling
    x, sigma = same_noise(shape), sampling.sigmas[601]
    text = conditioning(1)[0][0].expand(len(x), -1, -1)
    given = arguments(kind, x, sigma, sampling.timestep(sigma[None])[0].float(), text)
    for transformed in (False, True):
        if transformed:
            twin = sloth_fx.transform(twin, specs, example_inputs=given)
            context = sloth_fx.context(twin)
            context.at(moment.progress, moment.sigma)
            context.prediction = "epsilon" if kind == "unet" else "flow"
            if guided:
                context.set_negative(encoder_hidden_states=NEGATIVE[0][0])
        expected = x - sigma * unpacked(twin(**given).sample, shape)
        mine = found if transformed else called(patcher, shape)
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert (found - called(patcher, shape)).abs().max() > 1e-2
    assert moment.progress == pytest.approx(0.399 if kind == "unet" else 1 - float(sigma), abs=1e-6)
