"""Attached pipelines in use: adapters, offloading, compilation."""

from typing import Any

import accelerate
import diffusers
import pytest
import torch
import torch._dynamo.utils as dynamo
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import nn

import sloth_fx
from sloth_fx import NearSightedAttention, SlothError
from tests import models
from tests.integrations import pipelines
from tests.integrations.test_attach import OFF, SPEC, state


def check(pipe: Any, given: dict[str, Any], spec: Any = SPEC) -> torch.Tensor:
    """Neutral operators give the same bits, others do not, and afterwards all is as it was. The changed images."""
    plain = pipelines.run(pipe, given)
    before = state(pipe)
    with sloth_fx.attach(pipe, OFF):
        assert torch.equal(pipelines.run(pipe, given), plain)
    with sloth_fx.attach(pipe, spec):
        changed = pipelines.run(pipe, given)
    assert not torch.allclose(changed, plain, atol=0.01)
    assert state(pipe) == before
    assert torch.equal(pipelines.run(pipe, given), plain)
    return changed


# Adapters


def lora_weights(unet: diffusers.UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """For such a UNet, as ``load_lora_weights`` takes them, far from zero."""
    unet.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k", "to_v"]))
    random = torch.Generator().manual_seed(5)
    return {
        f"unet.{name}": 0.15 * torch.randn(weight.shape, generator=random)
        for name, weight in get_peft_model_state_dict(unet).items()
    }


def test_lora():
    pipe, given = pipelines.sd()
    without = pipelines.run(pipe, given)
    pipe.load_lora_weights(lora_weights(models.one_level()), adapter_name="style")
    assert not torch.allclose(pipelines.run(pipe, given), without, atol=0.01)
    changed = check(pipe, given)
    with sloth_fx.attach(pipe, SPEC):
        pipe.set_adapters("style", 0.0)
        off = pipelines.run(pipe, given)
        pipe.set_adapters("style", 1.0)
        assert torch.equal(pipelines.run(pipe, given), changed)
    pipe.unload_lora_weights()
    with sloth_fx.attach(pipe, SPEC):
        torch.testing.assert_close(pipelines.run(pipe, given), off)


def test_lora_that_is_loaded_while_attached_goes_with_it():
    pipe, given = pipelines.sd()
    plain = pipelines.run(pipe, given)
    with sloth_fx.attach(pipe, SPEC):
        without = pipelines.run(pipe, given)
        pipe.load_lora_weights(lora_weights(models.one_level()), adapter_name="style")
        within = pipelines.run(pipe, given)
    assert not torch.allclose(within, without, atol=0.01)
    assert torch.equal(pipelines.run(pipe, given), plain)
    pipe.load_lora_weights(lora_weights(models.one_level()), adapter_name="style")
    with sloth_fx.attach(pipe, SPEC):
        torch.testing.assert_close(pipelines.run(pipe, given), within)


def image_prompts(unet: Any) -> dict[str, dict[str, torch.Tensor]]:
    """The weights of an IP-Adapter for embeddings of 20 channels."""
    random = torch.Generator().manual_seed(3)
    layers: dict[str, torch.Tensor] = {}
    sites = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for index, name in enumerate(sites):
        channels = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for part in ("to_k_ip", "to_v_ip"):
            layers[f"{2 * index + 1}.{part}.weight"] = torch.randn(channels, models.TEXT, generator=random) / 3
    projection = {
        "proj.weight": torch.randn(4 * models.TEXT, 20, generator=random) / 4,
        "proj.bias": torch.zeros(4 * models.TEXT),
        "norm.weight": torch.ones(models.TEXT),
        "norm.bias": torch.zeros(models.TEXT),
    }
    return {"image_proj": projection, "ip_adapter": layers}


def test_image_prompts():
    pipe, given = pipelines.sd()
    without = pipelines.run(pipe, given)
    weights = image_prompts(pipe.unet)
    embeds = {"ip_adapter_image_embeds": [pipelines.noise(4, 1, 20, seed=6)]}
    with sloth_fx.attach(pipe, SPEC):  # an adapter that is loaded now goes with the patched model
        pipe.unet._load_ip_adapter_weights([weights])
        within = pipelines.run(pipe, {**given, **embeds})
    assert torch.equal(pipelines.run(pipe, given), without)
    pipe.unet._load_ip_adapter_weights([weights])
    assert not torch.allclose(pipelines.run(pipe, {**given, **embeds}), without, atol=0.01)
    assert torch.equal(check(pipe, {**given, **embeds}), within)


@pipelines.numpy_warning
@pytest.mark.parametrize("kind", [diffusers.LCMScheduler, diffusers.DPMSolverMultistepScheduler])
def test_few_steps(kind):
    pipe, given = pipelines.sd()
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    check(pipe, {**given, "guidance_scale": 1.0})


# Offloading. There is no accelerator here: the hooks run, from the CPU to the CPU.


def hooks(pipe: Any) -> list[Any]:
    return [(type(part), hasattr(part, "_hf_hook")) for part in pipe.components.values()]


def test_model_offload():
    pipe, given = pipelines.image_to_image()
    plain = pipelines.run(pipe, given, output_type="pt")
    pipe.enable_model_cpu_offload(device="cpu")
    before, unet = hooks(pipe), pipe.unet
    assert torch.equal(pipelines.run(pipe, given, output_type="pt"), plain)
    for spec, same in ((OFF, True), (SPEC, False)):
        with sloth_fx.attach(pipe, spec) as handle:
            for _ in range(2):
                offloaded = [hook.model for hook in pipe._all_hooks]
                assert any(model is handle.model for model in offloaded)
                assert not any(model is unet for model in offloaded)
                assert torch.equal(pipelines.run(pipe, given, output_type="pt"), plain) == same
        assert pipe.unet is unet
        assert hooks(pipe) == before
        assert any(hook.model is unet for hook in pipe._all_hooks)
    assert torch.equal(pipelines.run(pipe, given, output_type="pt"), plain)
    pipe.remove_all_hooks()
    assert not hasattr(unet, "_hf_hook")
    assert torch.equal(pipelines.run(pipe, given, output_type="pt"), plain)


def test_a_refusal_leaves_model_offload_on():
    pipe, given = pipelines.sd()
    pipe.enable_model_cpu_offload(device="cpu")
    before, plain = hooks(pipe), pipelines.run(pipe, given)
    with pytest.raises(SlothError):
        sloth_fx.attach(pipe, sloth_fx.HyperTile(tile_size=8, where=lambda site: False))
    assert hooks(pipe) == before
    assert torch.equal(pipelines.run(pipe, given), plain)


def test_weights_that_are_offloaded_one_by_one():
    pipe, given = pipelines.sd()
    plain = pipelines.run(pipe, given)
    with sloth_fx.attach(pipe, SPEC):
        changed = pipelines.run(pipe, given)
    for part in (pipe.unet, pipe.vae):  # as enable_sequential_cpu_offload does
        accelerate.cpu_offload(part, execution_device=torch.device("cpu"))
    assert torch.equal(check(pipe, given), changed)
    assert torch.equal(pipelines.run(pipe, given), plain)
    assert all(parameter.device.type == "meta" for parameter in pipe.unet.parameters())


SWITCHES = {
    "casting": lambda model: model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32),
    "groups": lambda model: model.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level"),
    "cache": lambda model: model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.05)),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_what_is_switched_on_while_attached(name):
    pipe, given = pipelines.flux()
    plain = pipelines.run(pipe, given)
    with sloth_fx.attach(pipe, OFF) as handle:
        SWITCHES[name](handle.model)
        neutral = pipelines.run(pipe, given)
    with sloth_fx.attach(pipe, SPEC) as handle:
        SWITCHES[name](handle.model)
        assert not torch.equal(pipelines.run(pipe, given), neutral)
    assert torch.equal(pipelines.run(pipe, given), plain)
    SWITCHES[name](pipe.transformer)
    assert torch.equal(pipelines.run(pipe, given), neutral)


# Compilation


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    dynamo.counters.clear()
    with torch._dynamo.config.patch(recompile_limit=64):
        yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    ("name", "way"), [("pixart", "torch.compile"), pytest.param("sd", "compile", marks=pytest.mark.slow)]
)
def test_a_denoiser_compiled_while_attached_is_whole_graphs(name, way):
    pipe, given = pipelines.PIPELINES[name]()
    part = "unet" if name == "sd" else "transformer"
    original = getattr(pipe, part)
    spec = NearSightedAttention(base_tile_size=5, peak_tile_size=9)
    with sloth_fx.attach(pipe, spec, phases=2) as handle:
        eager = pipelines.run(pipe, given)
        if way == "compile":
            handle.model.compile(fullgraph=True, backend="eager")
        else:
            setattr(pipe, part, torch.compile(handle.model, fullgraph=True, backend="eager"))
        for _ in range(2):
            torch.testing.assert_close(pipelines.run(pipe, given), eager)
            assert handle.context.driven
            assert not dynamo.counters["graph_break"]
            assert dynamo.counters["stats"]["unique_graphs"] == 2
    assert getattr(pipe, part) is original
    assert original._compiled_call_impl is None


@pytest.mark.usefixtures("fresh_dynamo")
def test_inlined_into_a_larger_function_it_says_so():
    """A graph cannot ask a scheduler, so this is a break, and not a moment that stands still."""
    pipe, given = pipelines.pixart()
    values = {"hidden_states": pipelines.noise(2, 4, 13, 21), "encoder_hidden_states": given["prompt_embeds"]}
    values["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    pipe.scheduler.set_timesteps(4)
    with sloth_fx.attach(pipe, SPEC) as handle, torch.no_grad():

        def larger(t: torch.Tensor) -> torch.Tensor:
            return handle.model(timestep=t.expand(2), **values).sample * 2

        broken = torch.compile(larger, backend="eager")
        for t in pipe.scheduler.timesteps[1:3]:
            torch.testing.assert_close(broken(t), larger(t))
            assert handle.context.progress == pytest.approx(1 - float(t) / 1000)
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported):
            torch.compile(larger, backend="eager", fullgraph=True)(pipe.scheduler.timesteps[3])


def test_nothing_is_left_on_modules():
    pipe, given = pipelines.flux()
    pipelines.run(pipe, given)
    with sloth_fx.attach(pipe, SPEC):
        pipelines.run(pipe, given)
    for part in pipe.components.values():
        for module in part.modules() if isinstance(part, nn.Module) else ():
            assert not any("sloth" in name for name in (*vars(module), *module._modules))
