"""How many conditionings a batch holds."""

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

import sloth_fx
from sloth_fx import NearSightedTile, Reduction, SlothfulAttention
from sloth_fx.integrations.guidance import GroupCounter
from tests import models
from tests.integrations import pipelines

SPEC = SlothfulAttention(in_=Reduction(rate=6.0), out=Reduction(rate=4.0))


def counts(pipe: Any, given: dict[str, Any], **options: Any) -> list[int]:
    seen = []
    with sloth_fx.attach(pipe, SPEC) as handle:
        for name, model in handle.models.items():
            context = sloth_fx.context(model)
            model.register_forward_pre_hook(lambda *_, context=context, name=name: seen.append((name, context.halves)))
        pipelines.run(pipe, given, **options)
    return [count for _, count in seen]


def test_with_and_without_guidance():
    pipe, given = pipelines.sd()
    assert counts(pipe, given, steps=2) == [2, 2]
    assert counts(pipe, given, steps=2, guidance_scale=1.0) == [1, 1]
    assert counts(pipe, {**given, **pipelines.text(1)}, steps=2) == [2, 2]


def test_a_pipeline_that_does_not_say_whether_it_guides():
    pipe, given = pipelines.pixart()
    assert not hasattr(pipe, "do_classifier_free_guidance")
    assert counts(pipe, given, steps=2) == [2, 2]
    assert counts(pipe, given, steps=2, guidance_scale=1.0) == [1, 1]


def test_guidance_that_ends_during_the_run():
    pipe, given = pipelines.sd()

    def stop(pipe, index, timestep, tensors):
        if index == 1:
            pipe._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    options = {"callback_on_step_end": stop, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    assert counts(pipe, given, steps=4, **options) == [2, 2, 1, 1]


def test_guidance_in_calls_of_their_own():
    """Wan calls its transformers once with the text and once without it; the second one denoises the end of the run."""
    pipe, given = pipelines.wan()
    with sloth_fx.attach(pipe, SPEC) as handle:
        seen = []
        for name, model in handle.models.items():
            context = sloth_fx.context(model)
            model.register_forward_pre_hook(
                lambda *_, context=context, name=name: seen.append((name, context.halves, context.progress))
            )
        pipe(**given)
        expected = [1 - t / 1000 for t in pipe.scheduler.timesteps.tolist() for _ in range(2)]
    assert [progress for *_, progress in seen] == pytest.approx(expected)
    assert [halves for _, halves, _ in seen] == [1] * len(seen)
    assert {name for name, *_ in seen} == {"transformer", "transformer_2"}


def test_an_image_and_a_text_that_guide():
    pipe, given = pipelines.instructions()
    assert counts(pipe, given, steps=2) == [3, 3]


def test_a_perturbed_part():
    """Its layers get processors of their own during the run, so the operators have to act on others."""
    unet = models.one_level()
    pipe, given = pipelines.sd()
    parts = {name: part for name, part in pipe.components.items() if name != "unet"}
    pipe = diffusers.StableDiffusionPAGPipeline(
        unet=unet, **parts, requires_safety_checker=False, pag_applied_layers="up_blocks"
    )
    spec = SlothfulAttention(in_=Reduction(rate=6.0), out=Reduction(rate=4.0), where=lambda site: site.stage == "in")
    pipelines.quiet(pipe)
    for scale, expected in ((3.0, 3), (1.0, 2)):
        with sloth_fx.attach(pipe, spec) as handle:
            pipelines.run(pipe, given, steps=2, guidance_scale=scale, pag_scale=2.0)
            assert handle.context.halves == expected


def test_conditionings_are_kept_apart():
    """Images that attend to each other do so within their own conditioning: else the text of one reaches the other."""
    pipe, given = pipelines.sd()
    spec = NearSightedTile(tile_size=5, concat_local=True, concat_global=True)
    with sloth_fx.attach(pipe, spec):
        apart = pipelines.run(pipe, given, steps=2)
    with sloth_fx.attach(pipe, spec) as handle:
        handle.context.halves = 1
        pipelines.run(pipe, given, steps=2)
        handle.context.halves = 4  # the caller's own, and kept
        pipelines.run(pipe, given, steps=2)
        assert handle.context.halves == 4
    pipe.unet = sloth_fx.transform(pipe.unet, spec)
    together = pipelines.run(pipe, given, steps=2)
    sloth_fx.context(pipe.unet).halves = 2
    assert torch.equal(pipelines.run(pipe, given, steps=2), apart)
    assert not torch.equal(together, apart)


@pytest.mark.parametrize("axes", [None, "bchw"])
def test_counting_by_hand(axes):
    pipe, guided = SimpleNamespace(), SimpleNamespace(do_classifier_free_guidance=True)
    latent = torch.randn(3, 4, 5, 7)
    counter = GroupCounter(axes)
    assert counter.count(pipe, torch.cat([latent] * 2), 1) == 2
    assert counter.count(guided, torch.cat([latent] * 3), 1) == 3
    assert counter.count(guided, torch.randn(6, 4, 5, 7), 1) == 2  # of this run and size it is known
    assert counter.count(guided, torch.randn(6, 4, 5, 7), 2) == 1
    assert counter.count(SimpleNamespace(do_classifier_free_guidance=False), torch.cat([latent] * 2), 3) == 1
    other = torch.cat([torch.cat([latent] * 2), torch.randn(6, 2, 5, 7)], dim=1)  # an image behind the latents
    assert counter.count(guided, other, 4) == 2
    assert counter.count(guided, [latent], 5) == 1
    tokens = torch.randn(1, 35, 4)
    assert GroupCounter(None).count(guided, torch.cat([tokens] * 2), 1) == 2
