"""The nodes on ComfyUI's own models, patcher and samplers, at toy size. Runs where COMFYUI_PATH is a checkout of it."""

import pytest
import torch

import sloth_fx
from sloth_fx.bind import Variants
from sloth_fx.errors import SlothError
from sloth_fx.integrations.comfy import patching
from sloth_fx.integrations.comfy.patching import patch_model, report_of
from tests.integrations.comfy_real import MODELS, ONLY_THERE, called, conditioning, made, sample
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
