"""Attached guidance by perturbed attention, against diffusers' own pipelines for it, and where these are at fault."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusion3PAGPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionSAGPipeline,
    StableDiffusionXLPAGPipeline,
)
from torch import Tensor, nn

import sloth_fx
from sloth_fx import PAG, SAG, SlothError
from sloth_fx.integrations.follow import Follower
from sloth_fx.integrations.guidance import guidance_scale_of
from tests import models
from tests.integrations import pipelines
from tests.integrations.pipelines import BETAS, DDIM, HEIGHT, WIDTH, quiet, run, text, vae
from tests.perturbed_by_hand import exchanged, itself

BOUND = 1e-4
STEPS = 10

pytestmark = [pipelines.numpy_warning, pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")]


def sd(kind: Any = StableDiffusionPipeline, scheduler: Any = None, **parts: Any) -> Any:
    return quiet(
        kind(
            vae=vae(),
            text_encoder=None,
            tokenizer=None,
            unet=models.two_levels(),
            scheduler=scheduler if scheduler is not None else DDIMScheduler(**DDIM),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **parts,
        )
    )


def like(kind: Any, pipe: Any, **parts: Any) -> Any:
    """A pipeline of another kind with the same models."""
    taken = inspect.signature(kind.__init__).parameters
    return quiet(kind(**{name: part for name, part in pipe.components.items() if name in taken}, **parts))


GIVEN = {"height": HEIGHT, "width": WIDTH}


def close(found: Tensor, expected: Tensor, bound: float = BOUND) -> None:
    assert (found - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.parametrize("weight", [3.0, 0.0], ids=["guided", "alone"])
@pytest.mark.parametrize("adaptive", [0.0, 0.004])
def test_perturbed_attention_as_in_stable_diffusion(weight: float, adaptive: float) -> None:
    given = {**text(), **GIVEN, "guidance_scale": weight}
    if weight == 0:
        del given["negative_prompt_embeds"]
    theirs = sd(StableDiffusionPAGPipeline, pag_applied_layers="mid")
    expected = run(theirs, given, steps=STEPS, pag_scale=2.0, pag_adaptive_scale=adaptive)
    pipe = sd()
    plain = run(pipe, given, steps=STEPS)
    with sloth_fx.attach(pipe, PAG(scale=2.0, adaptive=adaptive)):
        found = run(pipe, given, steps=STEPS)
    assert (plain - expected).abs().max() > 100 * BOUND * expected.abs().max()
    close(found, expected)


def test_perturbed_attention_as_in_sdxl() -> None:
    pipe, given = pipelines.sdxl()
    theirs = like(StableDiffusionXLPAGPipeline, pipe, add_watermarker=False, pag_applied_layers="mid")
    expected = run(theirs, given, steps=STEPS, pag_scale=2.0)
    with sloth_fx.attach(pipe, PAG(scale=2.0)):
        close(run(pipe, given, steps=STEPS), expected)


def test_perturbed_attention_as_in_stable_diffusion_3() -> None:
    pipe, given = pipelines.sd3()
    theirs = like(StableDiffusion3PAGPipeline, pipe, pag_applied_layers="transformer_blocks.0.attn")
    expected = run(theirs, given, steps=STEPS, pag_scale=2.0)
    theirs.transformer.set_attn_processor(type(pipe.transformer.transformer_blocks[1].attn.processor)())
    with sloth_fx.attach(pipe, PAG(scale=2.0, where="transformer_blocks.0.*")):
        close(run(pipe, given, steps=STEPS), expected)


@pytest.mark.parametrize("weight", [3.0, 0.0], ids=["guided", "alone"])
def test_self_attention_as_in_stable_diffusion(weight: float) -> None:
    given = {**text(), **GIVEN, "guidance_scale": weight}
    if weight == 0:
        del given["negative_prompt_embeds"]
    expected = run(sd(StableDiffusionSAGPipeline), given, steps=STEPS, sag_scale=0.75)
    pipe = sd()
    plain = run(pipe, given, steps=STEPS)
    with sloth_fx.attach(pipe, SAG()):
        found = run(pipe, given, steps=STEPS)
    assert (plain - expected).abs().max() > 10 * BOUND * expected.abs().max()
    close(found, expected)


class Steps:
    """The predictions that a pipeline hands its scheduler, and what it had then."""

    def __init__(self, pipe: Any, monkeypatch: Any) -> None:
        self.taken: list[tuple[Tensor, Tensor]] = []
        step = pipe.scheduler.step

        def noted(prediction: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.taken.append((prediction.clone(), sample.clone()))
            return step(prediction, timestep, sample, *args, **kwargs)

        monkeypatch.setattr(pipe.scheduler, "step", noted)


class OfNoise(nn.Module):
    """A model that predicts v, as one that predicts noise: at the levels of variance preserving schedulers."""

    def __init__(self, unet: Any, abar: Tensor) -> None:
        super().__init__()
        self.unet, self.abar = unet, abar

    def forward(self, sample: Tensor, timestep: Any, **kwargs: Any) -> Any:
        a = self.abar[int(timestep)]
        v = self.unet(sample, timestep, **kwargs).sample
        return (1 - a).sqrt() * sample + a.sqrt() * v


def test_self_attention_with_a_model_that_predicts_v(monkeypatch: Any) -> None:
    """Their formula subtracts v's of different inputs. Ours is that of noise, whatever the model predicts: the guided
    v is, as noise, that of the model as one of noise."""
    scheduler = DDIMScheduler(**DDIM, prediction_type="v_prediction")
    given = {**text(), **GIVEN, "guidance_scale": 3.0}
    theirs, ours = sd(StableDiffusionSAGPipeline, scheduler), sd(scheduler=scheduler)
    first = Steps(theirs, monkeypatch)
    run(theirs, given, steps=2, sag_scale=0.75)
    with sloth_fx.attach(ours, SAG()):
        second = Steps(ours, monkeypatch)
        run(ours, given, steps=2)
    (their_v, x), (our_v, same) = first.taken[0], second.taken[0]
    torch.testing.assert_close(x, same, rtol=0, atol=0)
    assert (their_v - our_v).abs().max() > 0.01 * our_v.abs().max()

    scheduler.set_timesteps(2)
    t = scheduler.timesteps[0]
    a = scheduler.alphas_cumprod[t]
    noises = OfNoise(ours.unet, scheduler.alphas_cumprod)
    expected = guided_noise(ours.unet, noises, x, t, a, given)
    noise = (1 - a).sqrt() * x + a.sqrt() * our_v
    close(noise, expected, 1e-5)
    # what theirs adds to it, as noise
    wrong = (1 - a).sqrt() * x + a.sqrt() * their_v
    assert (wrong - expected).abs().max() > 0.01 * expected.abs().max()


def guided_noise(unet: Any, noises: nn.Module, x: Tensor, t: Tensor, a: Tensor, given: dict[str, Any]) -> Tensor:
    """Equations 9 to 12 for a model that predicts noise, written out, with whole maps."""
    maps: list[Tensor] = []

    def seen(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        maps.append((query @ key.mT * query.shape[-1] ** -0.5).softmax(-1))
        return maps[-1] @ value

    middle = [index for index, name in enumerate(attentions(unet)) if name.startswith("mid") and name.endswith("attn1")]
    with torch.no_grad():
        with exchanged(middle, seen):
            uncond = noises(x, t, encoder_hidden_states=given["negative_prompt_embeds"])
        cond = noises(x, t, encoder_hidden_states=given["prompt_embeds"])
        rows, columns = x.shape[-2:]
        grid = -(-rows // 2), -(-columns // 2)
        mask = (maps[0].mean(1).sum(1) > 1).float().view(-1, 1, *grid)
        mask = nn.functional.interpolate(mask, (rows, columns))
        clean = (x - (1 - a).sqrt() * uncond) / a.sqrt()
        kernel = torch.exp(-0.5 * torch.arange(-4, 5) ** 2.0)
        kernel = torch.outer(kernel, kernel) / kernel.sum() ** 2
        padded = nn.functional.pad(clean, (4,) * 4, mode="reflect")
        blurred = nn.functional.conv2d(padded, kernel.expand(4, 1, 9, 9), groups=4)
        degraded = a.sqrt() * (mask * blurred + (1 - mask) * clean) + (1 - a).sqrt() * uncond
        again = noises(degraded, t, encoder_hidden_states=given["negative_prompt_embeds"])
    return uncond + given["guidance_scale"] * (cond - uncond) + 0.75 * (uncond - again)


def attentions(unet: Any) -> list[str]:
    """The paths of a UNet's attentions in the order in which they run."""
    found: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: found.append(name))
        for name, module in unet.named_modules()
        if name.endswith(("attn1", "attn2"))
    ]
    with torch.no_grad():
        unet(torch.zeros(1, 4, 13, 21), 1, encoder_hidden_states=torch.zeros(1, 7, models.TEXT))
    for hook in hooks:
        hook.remove()
    return found


def test_self_attention_with_timesteps_that_are_not_whole() -> None:
    """Theirs refuses such schedulers."""
    scheduler = EulerDiscreteScheduler(**BETAS, steps_offset=1, use_karras_sigmas=True)
    given = {**text(), **GIVEN, "guidance_scale": 3.0}
    with pytest.raises((ValueError, IndexError, TypeError)):
        run(sd(StableDiffusionSAGPipeline, scheduler), given, steps=3)
    pipe = sd(scheduler=scheduler)
    plain = run(pipe, given, steps=3)
    with sloth_fx.attach(pipe, SAG()):
        found = run(pipe, given, steps=3)
    assert found.isfinite().all()
    assert not torch.equal(found, plain)


def test_self_attention_of_a_flow() -> None:
    pipe, given = pipelines.sd3()
    plain = run(pipe, given, steps=3)
    with sloth_fx.attach(pipe, SAG(where="transformer_blocks.1.*")) as handle:
        found = run(pipe, given, steps=3)
        assert handle.context.prediction.kind == "flow"
    assert found.isfinite().all()
    assert not torch.equal(found, plain)


def test_a_pipeline_that_calls_once_for_each_text(monkeypatch: Any) -> None:
    pipe, given = pipelines.wan()

    def first_prediction() -> Tensor:
        with monkeypatch.context() as patch:
            steps = Steps(pipe, patch)
            pipe(**{**given, "num_inference_steps": 2, "generator": torch.Generator().manual_seed(7)})
        return steps.taken[0][0]

    plain = first_prediction()
    with exchanged([0], itself):  # the first attention of the first call alone, which is the conditional one
        perturbed = first_prediction()
    with sloth_fx.attach(pipe, PAG(scale=2.0, where="self")):
        found = first_prediction()
    # plain is u + w (c - u), perturbed u + w (p - u), so their difference is w (c - p)
    close(found, plain + 2.0 * (plain - perturbed) / given["guidance_scale"], 1e-5)


def test_a_scale_that_a_pipeline_keeps_to_itself() -> None:
    pipe, given = pipelines.flux()
    negative = {"negative_prompt_embeds": pipelines.noise(2, 7, 24, seed=5)}
    negative["negative_pooled_prompt_embeds"] = pipelines.noise(2, 12, seed=6)
    spec = PAG(scale=2.0, where="transformer_blocks.0.*")
    with (
        sloth_fx.attach(pipe, spec),
        pytest.raises(SlothError, match=r"once for each text.*attach with guidance_scale="),
    ):
        run(pipe, {**given, **negative}, true_cfg_scale=4.0)
    with sloth_fx.attach(pipe, spec, guidance_scale=4.0) as handle:
        run(pipe, {**given, **negative}, true_cfg_scale=4.0)
        assert handle.context.guidance_scale == 4.0
    with sloth_fx.attach(pipe, spec):
        run(pipe, given)  # nothing guides


def test_a_scale_that_nothing_needs() -> None:
    pipe, _ = pipelines.sd()
    with pytest.raises(SlothError, match="none is given"):
        sloth_fx.attach(pipe, sloth_fx.SlothfulAttention(), guidance_scale=3.0)
    with pytest.raises(SlothError, match=r"guidance_scale=-1 is refused"):
        sloth_fx.attach(sd(), PAG(), guidance_scale=-1)


def test_groups_that_nobody_knows() -> None:
    pipe = sd()
    given = {**text(), **GIVEN, "guidance_scale": 3.0}
    with sloth_fx.attach(pipe, PAG()) as handle:
        handle.context.rows = ("cond", "uncond")  # the wrong way round, and kept: the caller's word
        swapped = run(pipe, given, steps=2)
        assert handle.context.rows == ("cond", "uncond")
    with sloth_fx.attach(pipe, PAG()) as handle:
        right = run(pipe, given, steps=2)
        assert handle.context.rows == ("uncond", "cond")
    assert not torch.equal(swapped, right)


def test_everything_is_put_back() -> None:
    pipe = sd()
    given = {**text(), **GIVEN, "guidance_scale": 3.0}
    before = run(pipe, given, steps=2)
    unet = pipe.unet
    with sloth_fx.attach(pipe, SAG()):
        run(pipe, given, steps=2)
    assert pipe.unet is unet
    assert "encode_prompt" not in vars(pipe)
    assert torch.equal(run(pipe, given, steps=2), before)


def test_a_model_that_lives_on_is_told_nothing_any_more() -> None:
    """What the last call was says nothing of calls that the pipeline has no part in."""
    pipe, given = sd(), {**text(), **GIVEN, "guidance_scale": 3.0}
    handle = sloth_fx.attach(pipe, SAG())
    context = handle.context
    run(pipe, given, steps=2)
    assert (context.rows, context.halves, context.prediction.kind) == (("uncond", "cond"), 2, "epsilon")
    handle.detach()
    assert (context.rows, context.halves, context.guidance_scale) == (("cond",), 1, None)
    assert context.prediction is None
    assert not context.driven

    pipe, given = pipelines.wan()
    handle = sloth_fx.attach(pipe, PAG(scale=2.0, where="self"))
    context = handle.context
    pipe(**{**given, "num_inference_steps": 2})
    assert (context.rows, context.guidance_scale) == (("uncond",), given["guidance_scale"])
    handle.detach()
    assert (context.rows, context.guidance_scale) == (("cond",), None)


def test_what_a_caller_told_the_context_stays() -> None:
    pipe, given = sd(), {**text(), **GIVEN, "guidance_scale": 3.0}
    handle = sloth_fx.attach(pipe, SAG())
    context = handle.context
    context.rows, context.prediction = ("other", "cond"), "v_prediction"
    run(pipe, given, steps=2)
    handle.detach()
    assert (context.rows, context.halves, context.prediction.kind) == (("other", "cond"), 2, "v_prediction")


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({}, 2.5),  # nothing but what the caller gave
        ({"do_classifier_free_guidance": False, "guidance_scale": 7.0}, None),
        ({"do_classifier_free_guidance": True, "guidance_scale": 7.0}, 7.0),
        ({"do_classifier_free_guidance": True}, 2.5),
        ({"do_classifier_free_guidance": True, "guidance_scale": 7.0, "_guidance_scale_2": 3.0}, 7.0),
        ({"do_classifier_free_guidance": True, "guidance_scale": 7.0, "_guidance_scale_2": 3.0, "second": True}, 3.0),
    ],
)
def test_the_scale_that_a_pipeline_tells(told: dict[str, Any], expected: float | None) -> None:
    model = nn.Identity()
    pipe = SimpleNamespace(**told, **({"transformer_2": model} if told.get("second") else {}))
    assert guidance_scale_of(pipe, model, 2.5) == expected


def test_the_scale_of_a_second_transformer_that_is_compiled() -> None:
    model = nn.Identity()
    pipe = SimpleNamespace(
        do_classifier_free_guidance=True,
        guidance_scale=7.0,
        _guidance_scale_2=3.0,
        transformer_2=torch.compile(model, backend="eager"),
    )
    assert guidance_scale_of(pipe, model, None) == 3.0


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("Krea2Pipeline", 5.5),
        ("CosmosTextToWorldPipeline", 5.5),
        ("CosmosVideoToWorldPipeline", 5.5),
        ("Cosmos2_5_PredictBasePipeline", 5.5),
        ("Cosmos3OmniPipeline", 4.5),
        ("WanPipeline", 4.5),
    ],
)
def test_pipelines_that_count_their_scale_from_the_conditional_prediction(kind: str, expected: float) -> None:
    """Of c + w (c - u) the conditional prediction has a share of 1 + w, so s / (1 + w) comes out as s."""
    told = {"do_classifier_free_guidance": True, "guidance_scale": 4.5}
    pipe = type("Mine", (type(kind, (), {}),), told)()
    found = guidance_scale_of(pipe, nn.Identity(), None)
    assert found == expected
    u, c, p = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def result(c: Tensor) -> Tensor:
        return (u if expected == 4.5 else c) + 4.5 * (c - u)

    assert found is not None
    torch.testing.assert_close(result(c + 2.0 / found * (c - p)), result(c) + 2.0 * (c - p))


def test_a_pipeline_that_leaves_out_unconditional_calls() -> None:
    """Lumina 2 does so from a share of its steps on (cfg_trunc_ratio), and does not say of which."""
    pipe = type("Lumina2Pipeline", (), {"do_classifier_free_guidance": True, "guidance_scale": 4.0})()
    with pytest.raises(SlothError, match=r"Lumina2Pipeline .*cfg_trunc_ratio.*attach with guidance_scale="):
        guidance_scale_of(pipe, nn.Identity(), None)
    assert guidance_scale_of(pipe, nn.Identity(), 4.0) == 4.0
    pipe.do_classifier_free_guidance = False
    assert guidance_scale_of(pipe, nn.Identity(), None) is None


def test_a_scale_that_is_no_number_to_divide_by() -> None:
    for scale in ([3.0, 4.0], 0.0, -1.0, None):
        pipe = SimpleNamespace(do_classifier_free_guidance=True, guidance_scale=scale)
        with pytest.raises(SlothError, match="a number above 0 is needed"):
            guidance_scale_of(pipe, nn.Identity(), None)


def test_rows_that_nobody_tells() -> None:
    pipe = sd()
    pipe.encode_prompt = None  # as a pipeline without text has it
    model = sloth_fx.transform(pipe.unet, PAG())
    follower = Follower(pipe, model, steers=True)
    latent = pipelines.noise(2, 4, 13, 21)
    call = {"encoder_hidden_states": pipelines.noise(4, 7, models.TEXT)}
    with pytest.raises(SlothError, match=r"which rows .*\(2 groups\) are conditional is not known"):
        model(torch.cat([latent, latent]), 500, **call)
    sloth_fx.context(model).rows = ("uncond", "cond")
    with torch.no_grad():
        model(torch.cat([latent, latent]), 500, **call)
    follower.stop()
