"""Patched models in the hands of diffusers, peft and accelerate."""

import copy
from typing import Any

import accelerate
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler
from peft import LoraConfig
from torch import nn

import sloth_fx
from sloth_fx import NearSightedAttention, NearSightedTile, Reduction, SlothfulAttention, StepDecay
from tests import models, reference

SLOTHFUL = SlothfulAttention(in_=Reduction(rate=6.0, k_blend=0.5), out=Reduction(rate=4.0, v_blend=1.0))
NEAR = NearSightedAttention(base_tile_size=6, peak_tile_size=8)
SIGMA = SlothfulAttention.from_node(release="2023-12-11")
OFF = SlothfulAttention(in_=Reduction(rate=1.0), out=Reduction(rate=1.0))
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def close(out: torch.Tensor, expected: torch.Tensor, bound: float = 1e-5) -> bool:
    return bool((out - expected).abs().max() <= bound * expected.abs().max())


# Sampling


class Loop:
    """A sampling loop as pipelines write it: latents, prompts, classifier-free guidance."""

    def __init__(self, model: nn.Module, scheduler: Any, *, steps: int, guidance: float | None) -> None:
        self.scheduler = scheduler
        self.steps = steps
        self.guidance = guidance
        self.inputs = models.inputs(model, 2, 13, 21)
        self.prompts = self.inputs.pop("encoder_hidden_states")
        self.calls: list[tuple[dict[str, Any], torch.Tensor]] = []

    def run(self, model: nn.Module, before_step: Any = lambda i: None) -> torch.Tensor:
        """The last latents; ``calls`` then holds what the model was given and what it gave, step by step."""
        self.calls = []
        self.scheduler.set_timesteps(self.steps)
        latents = self.inputs["sample"] * self.scheduler.init_noise_sigma
        for i, timestep in enumerate(self.scheduler.timesteps):
            before_step(i)
            sample = latents if self.guidance is None else torch.cat([latents, latents])
            prompts = self.prompts if self.guidance is None else torch.cat([0.3 * self.prompts, self.prompts])
            others = {key: torch.cat([item] * (len(sample) // 2)) for key, item in self._added().items()}
            call = {
                "sample": self.scheduler.scale_model_input(sample, timestep),
                "timestep": timestep,
                "encoder_hidden_states": prompts,
                **({"added_cond_kwargs": others} if others else {}),
            }
            noise = models.run(model, call)
            self.calls.append((call, noise))
            if self.guidance is not None:
                without, given = noise.chunk(2)
                noise = without + self.guidance * (given - without)
            latents = self.scheduler.step(noise, timestep, latents).prev_sample
        return latents

    def _added(self) -> dict[str, torch.Tensor]:
        return self.inputs.get("added_cond_kwargs", {})


@pytest.mark.parametrize("guidance", [None, 5.0], ids=["plain", "guided"])
def test_a_ddim_loop_follows_the_timesteps_by_itself(guidance):
    model = models.shared("sdxl")
    loop = Loop(model, DDIMScheduler(**STABLE_DIFFUSION), steps=3, guidance=guidance)
    plain = loop.run(model)
    final = loop.run(sloth_fx.transform(model, SLOTHFUL))
    assert not torch.allclose(final, plain, atol=0.01)
    for call, noise in loop.calls:
        progress = 1 - float(call["timestep"]) / 1000
        assert close(noise, reference.predict(model, [SLOTHFUL], call, progress=progress))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # the scheduler's own
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_an_euler_loop_driven_by_step_and_sigma(name):
    model = models.shared(name)
    scheduler = EulerDiscreteScheduler(**STABLE_DIFFUSION)
    loop = Loop(model, scheduler, steps=4, guidance=4.0)
    patched = sloth_fx.transform(model, SIGMA)
    context = sloth_fx.context(patched)
    loop.run(patched, lambda i: context.at(i / 4, sigma=float(scheduler.sigmas[i])))
    driven = loop.calls
    for i, (call, noise) in enumerate(driven):
        expected = reference.predict(model, [SIGMA], call, progress=i / 4, sigma=float(scheduler.sigmas[i]))
        assert close(noise, expected)
    context.auto()
    seen = []
    loop.run(patched, lambda i: seen.append(context.sigma))
    seen = [*seen[1:], context.sigma]  # what each call made of its timestep
    assert seen == pytest.approx(scheduler.sigmas[:4].tolist(), rel=1e-4)
    assert all(torch.equal(mine, other) for (_, mine), (_, other) in zip(loop.calls, driven, strict=True))


def test_a_guided_batch_keeps_its_halves_apart():
    """Images of one half see each other, and nothing of the other half."""
    model = models.shared("ssd1b")
    spec = NearSightedTile(tile_size=5, concat_local=True, concat_global=True)
    patched = sloth_fx.transform(model, spec)
    context = sloth_fx.context(patched)
    values = models.inputs(model, 4)
    changed = copy.deepcopy(values)
    changed["sample"][3] += 1.0
    context.halves = 2
    first, second = models.run(patched, values), models.run(patched, changed)
    assert torch.equal(first[:2], second[:2])
    assert not torch.allclose(first[2], second[2], atol=0.01)
    context.halves = 1
    assert not torch.allclose(models.run(patched, changed)[0], first[0], atol=0.01)


def test_a_ddpm_loop_of_an_unconditional_model():
    model = models.shared("unconditional")
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(3)
    spec = SlothfulAttention(schedule=StepDecay(time_decay=0.5), in_=Reduction(rate=9.0, depth_decay=1.0))
    patched = sloth_fx.transform(model, spec)
    latents = models.inputs(model, 2, 16, 28)["sample"]
    for timestep in scheduler.timesteps:
        call = {"sample": latents, "timestep": timestep}
        noise = models.run(patched, call)
        t = int(timestep)
        sigma = float(((1 - scheduler.alphas_cumprod[t]) / scheduler.alphas_cumprod[t]) ** 0.5)
        assert close(noise, reference.predict(model, [spec], call, progress=1 - t / 1000, sigma=sigma))
        latents = scheduler.step(noise, timestep, latents).prev_sample


# peft


def add_lora(model: nn.Module, seed: int = 5) -> nn.Module:
    """Adapters at all attention projections, far from zero, and the same each time."""
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    model.add_adapter(config)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.15 * torch.randn(parameter.shape, generator=random))
    return model


USES = {"slothful": ("sdxl", SLOTHFUL), "near-sighted": ("ssd1b", NEAR), "neutral": ("one_level", OFF)}


@pytest.mark.parametrize("use", USES)
def test_lora_before_and_after_the_transform(use):
    name, specs = USES[use]
    model = models.MODELS[name]()
    values = models.inputs(model)
    adapted = add_lora(models.MODELS[name]())
    before = sloth_fx.transform(adapted, specs)
    after = add_lora(sloth_fx.transform(model, specs))
    for patched in (before, after):
        sloth_fx.context(patched).at(0.4)
    out = models.run(before, values)
    assert torch.equal(models.run(after, values), out)
    assert close(out, reference.predict(adapted, [specs], values, progress=0.4))
    assert not torch.allclose(models.run(adapted, values), models.run(model, values), atol=0.01)
    if specs is OFF:
        assert torch.equal(out, models.run(adapted, values))
    assert not any("lora" in name for name, _ in model.named_modules())
    assert torch.equal(models.run(model, values), models.run(models.shared(name), values))


def test_lora_switches_and_is_removed_on_a_patched_model():
    model = models.shared("one_level")
    values = models.inputs(model)
    patched = sloth_fx.transform(model, SLOTHFUL)
    sloth_fx.context(patched).at(0.4)
    without = models.run(patched, values)
    add_lora(patched)
    adapted = models.run(patched, values)
    patched.disable_adapters()
    assert torch.equal(models.run(patched, values), without)
    patched.enable_adapters()
    assert torch.equal(models.run(patched, values), adapted)
    patched.delete_adapters("default")
    assert torch.equal(models.run(patched, values), without)


def test_lora_trains_through_a_patched_model():
    patched = sloth_fx.transform(models.shared("one_level"), NEAR).requires_grad_(False)
    add_lora(patched).train()
    sloth_fx.context(patched).at(0.4)
    patched(**models.inputs(patched)).sample.square().mean().backward()
    for name, parameter in patched.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name


# accelerate


@pytest.mark.parametrize("use", USES)
def test_cpu_offload_before_and_after_the_transform(use):
    name, specs = USES[use]
    model = models.MODELS[name]()
    values = models.inputs(model)
    plain = models.run(model, values)
    expected = sloth_fx.transform(model, specs)
    sloth_fx.context(expected).at(0.4)
    expected = models.run(expected, values)

    after = sloth_fx.transform(model, specs)
    accelerate.cpu_offload(after, execution_device=torch.device("cpu"))
    assert all(parameter.device.type == "meta" for parameter in after.parameters())
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())

    offloaded = accelerate.cpu_offload(models.MODELS[name](), execution_device=torch.device("cpu"))
    before = sloth_fx.transform(offloaded, specs)
    for patched in (after, before):
        sloth_fx.context(patched).at(0.4)
        for _ in range(2):
            assert torch.equal(models.run(patched, values), expected)
    assert torch.equal(models.run(offloaded, values), plain)
    assert torch.equal(models.run(model, values), plain)
    assert all(parameter.device.type == "meta" for parameter in offloaded.parameters())


def test_hooks_of_a_whole_model_are_kept_and_can_be_removed():
    model = models.one_level()
    values = models.inputs(model)
    _, hook = accelerate.cpu_offload_with_hook(model, execution_device=torch.device("cpu"))
    patched = sloth_fx.transform(model, SLOTHFUL)
    sloth_fx.context(patched).at(0.4)
    out = models.run(patched, values)
    assert close(out, reference.predict(models.shared("one_level"), [SLOTHFUL], values, progress=0.4))
    accelerate.hooks.remove_hook_from_module(patched, recurse=True)
    assert torch.equal(models.run(patched, values), out)
    hook.remove()
    assert torch.equal(models.run(model, values), models.run(models.shared("one_level"), values))


class Doubled(accelerate.hooks.ModelHook):
    """A hook that changes what a module gives."""

    def post_forward(self, module, output):
        return 2 * output


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_on_the_attention_itself_are_kept_and_can_be_removed(when):
    model = models.ssd1b()
    values = models.inputs(model)
    patched = sloth_fx.transform(model, SLOTHFUL)
    sloth_fx.context(patched).at(0.4)
    plain = models.run(patched, values)
    for block in patched.down_blocks[1].attentions[0].transformer_blocks:
        block.attn1.register_forward_hook(lambda module, args, output: 2 * output)
    expected = models.run(patched, values)
    assert not torch.allclose(expected, plain, atol=0.01)

    hooked = model if when == "before" else sloth_fx.transform(model, SLOTHFUL)
    for block in hooked.down_blocks[1].attentions[0].transformer_blocks:
        accelerate.hooks.add_hook_to_module(block.attn1, Doubled())
    if when == "before":
        hooked = sloth_fx.transform(hooked, SLOTHFUL)
    sloth_fx.context(hooked).at(0.4)
    assert torch.equal(models.run(hooked, values), expected)
    accelerate.hooks.remove_hook_from_module(hooked, recurse=True)
    assert torch.equal(models.run(hooked, values), plain)


# diffusers


def test_fused_projections():
    """Queries, keys and values of one projection: averages are pooled behind it, which comes to the same."""
    model = models.ssd1b()
    model.fuse_qkv_projections()
    values = models.inputs(model)
    for specs in ([SLOTHFUL], [NEAR]):
        patched = sloth_fx.transform(model, specs)
        sloth_fx.context(patched).at(0.4)
        assert close(
            models.run(patched, values), reference.predict(models.shared("ssd1b"), specs, values, progress=0.4)
        )
    neutral = sloth_fx.transform(model, OFF)
    assert torch.equal(models.run(neutral, values), models.run(model, values))


def test_a_saved_patched_model_is_a_plain_one(tmp_path):
    model = models.shared("ssd1b")
    patched = sloth_fx.transform(model, [SLOTHFUL, NearSightedTile(tile_size=5)])
    patched.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    values = models.inputs(model)
    assert torch.equal(models.run(loaded, values), models.run(model, values))


def test_gradient_checkpointing():
    model = models.one_level().train()
    values = models.inputs(model)
    gradients = []
    for checkpointing in (False, True):
        patched = sloth_fx.transform(model, NEAR)
        sloth_fx.context(patched).at(0.4)
        if checkpointing:
            patched.enable_gradient_checkpointing()
        patched(**values).sample.square().mean().backward()
        gradients.append(patched.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_k.weight.grad)
    torch.testing.assert_close(*gradients)
