"""NAG in pipelines: the negative prompt is encoded as the pipeline encodes its own, and the right rows are guided."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline

import sloth_fx
from sloth_fx import NAG
from sloth_fx.errors import SlothError
from tests import models
from tests.integrations import pipelines
from tests.integrations.pipelines import HEIGHT, WIDTH, numpy_warning, quiet, randomised

LAB = str(Path(__file__).parents[2] / "examples" / "lab")
PROMPTS = ["a large red circle", "a small blue square on the left"]


@pytest.fixture
def encoders(monkeypatch):
    """A real tokenizer, and a text encoder with random weights."""
    monkeypatch.syspath_prepend(LAB)
    import models as lab

    tokenizer = lab.tokenizer()
    yield tokenizer, randomised(lab.text_encoder(tokenizer))
    sys.modules.pop("models")


def stable_diffusion(encoders: Any) -> Any:
    from transformers import CLIPTextModel

    tokenizer, encoder = encoders
    plain = CLIPTextModel(encoder.config)
    plain.load_state_dict(encoder.text_model.state_dict())
    pipe, _ = pipelines.sd()
    unet = models.one_level(cross_attention_dim=128)
    parts = {**pipe.components, "unet": unet, "text_encoder": plain.eval(), "tokenizer": tokenizer}
    return quiet(StableDiffusionPipeline(**parts, requires_safety_checker=False))


def stable_diffusion_3(encoders: Any) -> Any:
    tokenizer, encoder = encoders
    pipe, _ = pipelines.sd3()
    transformer = randomised(
        type(pipe.transformer).from_config(
            {**pipe.transformer.config, "joint_attention_dim": 256, "pooled_projection_dim": 256}
        )
    )
    text = {
        f"{part}{n}": each for n in ("", "_2") for part, each in (("tokenizer", tokenizer), ("text_encoder", encoder))
    }
    return quiet(StableDiffusion3Pipeline(**{**pipe.components, **text, "transformer": transformer}))


def run(pipe: Any, prompts: Any = None, guidance: float = 1.0, **more: Any) -> torch.Tensor:
    given = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 3, "output_type": "latent", **more}
    random = torch.Generator().manual_seed(7)
    return pipe(prompts or PROMPTS, guidance_scale=guidance, generator=random, **given).images


KINDS = {"Stable Diffusion": stable_diffusion, "Stable Diffusion 3": stable_diffusion_3}
GUIDED = NAG(scale=6, alpha=0.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@numpy_warning
def test_the_prompt_itself_as_negative_changes_nothing(encoders, kind, guidance):
    pipe = KINDS[kind](encoders)
    plain = run(pipe, guidance=guidance)
    with sloth_fx.attach(pipe, GUIDED, negative_prompt=PROMPTS) as handle:
        torch.testing.assert_close(run(pipe, guidance=guidance), plain, atol=1e-3, rtol=1e-3)
        assert handle.context.rows == (("uncond", "cond") if guidance > 1 else ("cond",))
    with sloth_fx.attach(pipe, GUIDED, negative_prompt="a green cross"):
        assert not torch.allclose(run(pipe, guidance=guidance), plain, atol=1e-2)
    assert torch.equal(run(pipe, guidance=guidance), plain)


@pytest.mark.parametrize("kind", KINDS)
@numpy_warning
def test_the_same_as_embeddings_by_hand(encoders, kind):
    pipe = KINDS[kind](encoders)
    with torch.no_grad():
        found = pipe.encode_prompt(
            prompt=["a green cross"] * 2,
            device=torch.device("cpu"),
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
            **({"prompt_2": None, "prompt_3": None} if kind.endswith("3") else {}),
        )
    with sloth_fx.attach(pipe, GUIDED, negative_prompt="a green cross"):
        expected = run(pipe)
    with sloth_fx.attach(pipe, GUIDED) as handle:
        pooled = {"pooled_projections": found[2]} if kind.endswith("3") else {}
        handle.context.set_negative(encoder_hidden_states=found[0], **pooled)
        torch.testing.assert_close(run(pipe), expected, atol=1e-3, rtol=1e-3)  # encoded one by one, or together


@numpy_warning
def test_each_run_encodes_anew(encoders):
    pipe = stable_diffusion(encoders)
    with sloth_fx.attach(pipe, GUIDED, negative_prompt="a green cross"):
        first, more = run(pipe), run(pipe, PROMPTS[:1], num_images_per_prompt=3)
        many = run(pipe, num_images_per_prompt=3)
        again = run(pipe)
        with torch.no_grad():
            next(pipe.text_encoder.parameters()).mul_(1.5)
        other = run(pipe)
    assert (more.shape[0], many.shape[0]) == (3, 6)
    assert torch.equal(first, again)
    assert "encode_prompt" not in vars(pipe)
    with sloth_fx.attach(pipe, GUIDED, negative_prompt="a green cross"):
        assert torch.equal(run(pipe), other)


@numpy_warning
def test_encoders_that_always_give_a_negative_prompt_of_their_own(encoders):
    pipe = stable_diffusion(encoders)
    with sloth_fx.attach(pipe, GUIDED, negative_prompt="a green cross"):
        expected = run(pipe, guidance=3.0)
    own = pipe.encode_prompt

    def encode_prompt(prompt, device, count, guides, negative_prompt=None, **more):
        return own(prompt, device, count, True, negative_prompt, **more)

    pipe.encode_prompt = encode_prompt
    with sloth_fx.attach(pipe, GUIDED, negative_prompt="a green cross") as handle:
        assert torch.equal(run(pipe, guidance=3.0), expected)
        assert handle.context.rows == ("uncond", "cond")


@numpy_warning
def test_one_negative_prompt_for_each_image(encoders):
    pipe = stable_diffusion(encoders)
    others = ["a green cross", "a purple triangle"]
    with sloth_fx.attach(pipe, GUIDED, negative_prompt=others):
        both = run(pipe)
    for index, other in enumerate(others):
        with sloth_fx.attach(pipe, GUIDED, negative_prompt=other):
            torch.testing.assert_close(run(pipe)[index], both[index], atol=1e-4, rtol=1e-4)


@numpy_warning
def test_prompts_that_are_embeddings(encoders):
    pipe = stable_diffusion(encoders)
    embeds, _ = pipe.encode_prompt(PROMPTS, torch.device("cpu"), 1, False)
    with sloth_fx.attach(pipe, GUIDED, negative_prompt="a green cross"):
        expected = run(pipe)
        random = torch.Generator().manual_seed(7)
        given = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 3, "output_type": "latent"}
        found = pipe(prompt_embeds=embeds, guidance_scale=1.0, generator=random, **given).images
    torch.testing.assert_close(found, expected)


def test_what_cannot_be(encoders):
    pipe = stable_diffusion(encoders)
    with pytest.raises(SlothError, match="negative_prompt is for NAG"):
        sloth_fx.attach(pipe, sloth_fx.SlothfulAttention(), negative_prompt="a cross")
    for wrong in (3, [], [1, 2]):
        with pytest.raises(SlothError, match="a string, or a list"):
            sloth_fx.attach(pipe, GUIDED, negative_prompt=wrong)
    with sloth_fx.attach(pipe, GUIDED), pytest.raises(SlothError, match="no negative text"):
        run(pipe)
    with sloth_fx.attach(pipe, GUIDED, negative_prompt=["a cross"] * 3), pytest.raises(SlothError, match="3 rows"):
        run(pipe)
    assert "encode_prompt" not in vars(pipe)
    pipe.encode_prompt = None
    with pytest.raises(SlothError, match="has no encode_prompt"):
        sloth_fx.attach(pipe, GUIDED, negative_prompt="a cross")


@numpy_warning
def test_a_pipeline_that_calls_its_model_once_for_each_text():
    pipe, given = pipelines.wan()
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        del given[name]

    def embedded(texts: list[str]) -> torch.Tensor:
        return torch.stack([pipelines.noise(7, 24, seed=len(each)) for each in texts])

    def encode_prompt(prompt, negative_prompt=None, do_classifier_free_guidance=True, **more):
        others = embedded(["none"] * len(prompt)) if do_classifier_free_guidance else None
        return embedded(prompt), others

    def painted() -> torch.Tensor:
        given["generator"].manual_seed(7)
        return pipe(prompt=PROMPTS, negative_prompt=None, **given).frames

    pipe.encode_prompt = encode_prompt
    plain = painted()
    calls = []
    with sloth_fx.attach(pipe, GUIDED, negative_prompt=PROMPTS):
        torch.testing.assert_close(painted(), plain, atol=1e-4, rtol=1e-4)
    with sloth_fx.attach(pipe, GUIDED, negative_prompt="a green cross") as handle:
        for model in handle.models.values():
            context = sloth_fx.context(model)
            model.blocks[0].register_forward_pre_hook(lambda _, args, context=context: calls.append(context.rows))
        assert not torch.allclose(painted(), plain, atol=1e-2)
    assert calls == [("cond",), ("uncond",)] * 4


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_run_may_have_another_negative_prompt(encoders, kind):
    pipe = KINDS[kind](encoders)
    others = ["a green cross", "an outlined triangle at the top"]
    with sloth_fx.attach(pipe, GUIDED, negative_prompt=others) as handle:
        expected = run(pipe)
    with sloth_fx.attach(pipe, GUIDED, negative_prompt="a white background") as handle:
        assert handle.negative_prompt == ("a white background",)
        first = run(pipe)
        handle.negative_prompt = others
        assert handle.negative_prompt == tuple(others)
        second = run(pipe)
        for wrong in (None, [], 3, ["a", None]):
            with pytest.raises(SlothError, match="negative_prompt="):
                handle.negative_prompt = wrong
        assert handle.negative_prompt == tuple(others)
        handle.negative_prompt = "a white background"
        assert torch.equal(run(pipe), first)
    assert torch.equal(second, expected)
    assert not torch.equal(first, second)


def test_a_pipeline_attached_without_a_negative_prompt_takes_none(encoders):
    pipe = stable_diffusion(encoders)
    for spec in (GUIDED, sloth_fx.PAG()):
        with sloth_fx.attach(pipe, spec) as handle:
            assert handle.negative_prompt == ()
            with pytest.raises(SlothError, match="attached without negative_prompt"):
                handle.negative_prompt = "a cross"
