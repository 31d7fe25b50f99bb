"""Guidance by perturbed attention with a LoRA, a ControlNet or an IP-Adapter in the pipeline, against two calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from torch import Tensor, nn

import sloth_fx
from sloth_fx import NAG, PAG, SAG, SEG, SLG, SlothError
from tests import models
from tests.integrations import pipelines
from tests.integrations.pipelines import HEIGHT, WIDTH
from tests.integrations.test_attach import state
from tests.integrations.test_perturbation import GIVEN, like, sd
from tests.integrations.test_uses import image_prompts, lora_weights

SCALE, STEPS = 2.0, 2
SITE = "mid_block.attentions.0.transformer_blocks.0.attn1"
BLOCK = "up_blocks.1.attentions.1.transformer_blocks.0"
SPECS = {
    "PAG": PAG(scale=SCALE),
    "SEG": SEG(scale=SCALE),
    "SLG": SLG(layers=(BLOCK,), scale=SCALE, start=0.0, stop=1.0),
    "SAG": SAG(scale=SCALE),
}
_ATTEND = F.scaled_dot_product_attention

pytestmark = [pipelines.numpy_warning, pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")]


def with_lora() -> tuple[Any, dict[str, Any]]:
    pipe = sd()
    pipe.load_lora_weights(lora_weights(models.two_levels()), adapter_name="style")
    return pipe, {}


def with_controlnet() -> tuple[Any, dict[str, Any]]:
    pipe = sd()
    small = {"conditioning_embedding_out_channels": (8, 8, 8, 8), "load_weights_from_unet": False}
    controlnet = pipelines.randomised(ControlNetModel.from_unet(pipe.unet, **small))
    image = pipelines.noise(2, 3, HEIGHT, WIDTH).clamp(0, 1)
    return like(StableDiffusionControlNetPipeline, pipe, controlnet=controlnet), {"image": image}


def with_image_prompts() -> tuple[Any, dict[str, Any]]:
    pipe = sd()
    pipe.unet._load_ip_adapter_weights([image_prompts(pipe.unet)])
    return pipe, {"ip_adapter_image_embeds": [pipelines.noise(4, 1, 20, seed=6)]}


ADAPTERS = {"LoRA": with_lora, "ControlNet": with_controlnet, "IP-Adapter": with_image_prompts}


@contextmanager
def exchanged(module: nn.Module, attention: Any) -> Iterator[None]:
    """Torch's attention is another within ``module``."""
    forward = module.forward

    def within(*args: Any, **kwargs: Any) -> Any:
        with mock.patch.object(F, "scaled_dot_product_attention", attention):
            return forward(*args, **kwargs)

    with mock.patch.object(module, "forward", within):
        yield


def itself(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    return value


def mean_queries(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    return _ATTEND(query.mean(2, keepdim=True).expand(query.shape), key, value)


@contextmanager
def by_hand(pipe: Any, name: str) -> Iterator[None]:
    """The pipeline's own UNet is asked twice in each step, for noise; the first half of its rows is unconditional."""
    unet, forward, maps = pipe.unet, pipe.unet.forward, []
    site, block = unet.get_submodule(SITE), unet.get_submodule(BLOCK)

    def seen(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        maps.append((query @ key.mT * query.shape[-1] ** -0.5).softmax(-1))
        return maps[-1] @ value

    def twice(sample: Tensor, timestep: Any, **given: Any) -> tuple[Tensor]:
        if name == "SAG":
            with exchanged(site, seen):
                (noise,) = forward(sample, timestep, **given)
            half = len(sample) // 2
            worse = degraded(sample[:half], noise[:half], maps.pop()[:half], pipe.scheduler.alphas_cumprod[timestep])
            (other,) = forward(torch.cat([worse, sample[half:]]), timestep, **given)
            change = SCALE * (noise - other)[:half]
        else:
            (noise,) = forward(sample, timestep, **given)
            spoilt = {
                "PAG": exchanged(site, itself),
                "SEG": exchanged(site, mean_queries),
                "SLG": mock.patch.object(block, "forward", lambda hidden_states, *args, **kwargs: hidden_states),
            }
            with spoilt[name]:
                (other,) = forward(sample, timestep, **given)
            change = SCALE * (noise - other)[len(sample) // 2 :]
        return (noise + change.repeat(2, 1, 1, 1),)

    with mock.patch.object(unet, "forward", twice):
        yield


def degraded(x: Tensor, noise: Tensor, attention: Tensor, a: Tensor) -> Tensor:
    """Equations 9 to 11 of self-attention guidance, with the whole map."""
    grid = -(-x.shape[-2] // 2), -(-x.shape[-1] // 2)
    mask = (attention.mean(1).sum(1) > 1).float().view(-1, 1, *grid)
    mask = F.interpolate(mask, x.shape[-2:])
    clean = (x - (1 - a).sqrt() * noise) / a.sqrt()
    kernel = torch.exp(-0.5 * torch.arange(-4, 5) ** 2.0)
    kernel = torch.outer(kernel, kernel) / kernel.sum() ** 2
    padded = F.pad(clean, (4,) * 4, mode="reflect")
    blurred = F.conv2d(padded, kernel.expand(4, 1, 9, 9), groups=4)
    return a.sqrt() * (mask * blurred + (1 - mask) * clean) + (1 - a).sqrt() * noise


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters(adapter: str) -> None:
    pipe, more = ADAPTERS[adapter]()
    given = {**pipelines.text(), **GIVEN, "guidance_scale": 3.0, **more}
    plain, before = pipelines.run(pipe, given, steps=STEPS), state(pipe)
    for name, spec in SPECS.items():
        with by_hand(pipe, name):
            expected = pipelines.run(pipe, given, steps=STEPS)
        with sloth_fx.attach(pipe, spec) as handle:
            found = pipelines.run(pipe, given, steps=STEPS)
            assert handle.context.rows == ("uncond", "cond")
            notes = [site.note for site in sloth_fx.report(handle.model) if site.operators]
            assert all(("computed once" in note) == (name != "SAG") for note in notes)
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max(), name
        assert (found - plain).abs().max() > 0.01 * plain.abs().max(), name
        assert state(pipe) == before
    assert torch.equal(pipelines.run(pipe, given, steps=STEPS), plain)


def test_a_negative_text_that_the_context_was_told() -> None:
    """The prompts that the pipeline encodes tell which rows are conditional, and nothing of another text."""
    pipe, given = pipelines.sd3()
    embeds = {
        "encoder_hidden_states": pipelines.noise(1, 7, 24, seed=9),
        "pooled_projections": pipelines.noise(1, 12, seed=8),
    }
    found = {}
    for scale in (None, 0.0, 2.0):
        specs = [NAG(scale=4.0), *([PAG(scale=scale, where="transformer_blocks.0.*")] if scale is not None else [])]
        with sloth_fx.attach(pipe, specs) as handle:
            handle.context.set_negative(**embeds)
            if scale is None:
                handle.context.rows = ("uncond", "cond")
            found[scale] = pipelines.run(pipe, given, steps=STEPS)
            assert handle.context.rows == ("uncond", "cond")
    assert torch.equal(found[0.0], found[None])
    assert not torch.allclose(found[2.0], found[0.0], atol=0.01)
    with sloth_fx.attach(pipe, specs), pytest.raises(SlothError, match="set_negative"):
        pipelines.run(pipe, given, steps=STEPS)
