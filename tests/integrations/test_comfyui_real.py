"""The nodes on ComfyUI's own models, patcher and samplers, at toy size. Runs where COMFYUI_PATH is a checkout of it."""

import pytest
import torch

import sloth_fx
from sloth_fx.bind import Variants
from sloth_fx.errors import SlothError
from sloth_fx.integrations.comfy import patching
from sloth_fx.integrations.comfy.patching import patch_model, report_of
from sloth_fx.patch import patch_of
from tests.integrations.comfy_real import MODELS, ONLY_THERE, TEXT, UNET, conditioning, made, same_noise, sample
from tests.two_branches import in_order, in_step, joint

pytestmark = ONLY_THERE


def reduction(rate):
    each = sloth_fx.Reduction(rate=rate)
    return sloth_fx.SlothfulAttention(in_=each, out=each, keep_middle=True)


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


@pytest.mark.parametrize(("name", "sites"), [("mmdit", 2), ("flux", 4), ("qwen, located at its first call", 2)])
def test_a_negative_of_another_length(comfy, name, sites):
    """Equal to a call by brute force for each text, in step."""
    from comfy.ldm.modules.attention import attention_pytorch

    patcher, shape = made(comfy, name)
    spec, negative = sloth_fx.NAG(scale=7.0, alpha=0.6), conditioning(5, tokens=9)
    patched = patch_model(patcher, [spec], negative=negative)
    torchs = {"optimized_attention_override": lambda attend, *args, **options: attention_pytorch(*args, **options)}

    def run(model, text):
        return called(model, shape, text, **torchs)

    texts = tuple(each[0][0].expand(shape[0], -1, -1) for each in (conditioning(1), negative))
    read = tuple(in_order([joint(text.shape[1], 117)] * sites) for text in texts)
    expected = in_step(patcher, texts, spec, read, run=run)
    patched.patch_model()
    found = called(patched, shape)
    patched.unpatch_model()
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (found - called(patcher, shape)).abs().max() > 1e-2 * expected.abs().max()


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


TWINS = {
    "tiles": sloth_fx.NearSightedAttention(base_tile_size=8, peak_tile_size=10),
    "PAG": sloth_fx.PAG(),
    "SAG": sloth_fx.SAG(),
}


@pytest.mark.parametrize("kind", TWINS)
@torch.no_grad()
def test_the_twin_of_diffusers(comfy, kind):
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
    patched = patch_model(patcher, [TWINS[kind]])
    patched.patch_model()
    found = called(patched, shape)
    moment = patch_of(patched.object_patches["diffusion_model"]).context.moment
    patched.unpatch_model()
    assert (found - called(patcher, shape)).abs().max() > 1e-2
    twin = sloth_fx.transform(twin, TWINS[kind])
    context = sloth_fx.context(twin)
    context.at(moment.progress, moment.sigma)
    context.prediction = "epsilon"
    x, sigma = same_noise(shape), moment.sigma
    text = conditioning(1)[0][0].expand(len(x), -1, -1)
    noise = twin(x / (sigma**2 + 1) ** 0.5, 601, encoder_hidden_states=text).sample
    torch.testing.assert_close(found, x - sigma * noise, rtol=1e-4, atol=1e-4)
    assert moment.progress == pytest.approx(0.399)


def test_the_queue_again(comfy, monkeypatch):
    """Another seed, size or cfg neither transforms nor captures anything again."""
    patcher, shape = made(comfy, "unet")
    specs = [sloth_fx.SlothfulAttention(), sloth_fx.PAG()]
    first = sample(comfy, patch_model(patcher, specs), shape)

    def never(*args, **kwargs):
        raise AssertionError("this was done before")

    monkeypatch.setattr(patching, "transform", never)
    monkeypatch.setattr(Variants, "add", never)
    again = patch_model(patcher, specs)
    assert torch.equal(sample(comfy, again, shape), first)
    sample(comfy, again, (3, 4, 31, 21), cfg=1.0, steps=2)


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
