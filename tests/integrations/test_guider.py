"""The guider for modular pipelines, against the formula; and what diffusers' own do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.guiders import SkipLayerGuidance, SmoothedEnergyGuidance
from torch import Tensor, nn

import sloth_fx
from sloth_fx import PAG, SAG, SEG, SLG, SlothError
from sloth_fx.integrations.guider import PerturbedGuidance
from tests.integrations.pipelines import noise, sd3
from tests.perturbed_by_hand import exchanged, itself_and_others, mean_queries

GRID = (5, 7)
TEXT = 6


def denoiser() -> SD3Transformer2DModel:
    return sd3()[0].transformer


def inputs(timestep: float = 700.0) -> dict[str, Any]:
    return {
        "hidden_states": noise(2, 4, *GRID),
        "timestep": torch.full((2,), timestep),
        "encoder_hidden_states": (noise(2, TEXT, 24), noise(2, TEXT, 24, seed=2)),
        "pooled_projections": (noise(2, 12), noise(2, 12, seed=3)),
    }


def guided(guider: Any, model: nn.Module, given: dict[str, Any]) -> Tensor:
    """What a modular pipeline does in one step."""
    passes = guider.prepare_inputs(given)
    for each in passes:
        guider.prepare_models(model)
        call = {name: getattr(each, name) for name in given}
        with torch.no_grad():
            each.noise_pred = model(**call, return_dict=False)[0]
        guider.cleanup_models(model)
    return guider(passes).pred


def predictions(model: nn.Module, given: dict[str, Any], attention: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Unconditional, conditional, and conditional with other attention in the first block."""

    def predict(which: int) -> Tensor:
        call = {name: each[which] if isinstance(each, tuple) else each for name, each in given.items()}
        with torch.no_grad():
            return model(**call, return_dict=False)[0]

    with exchanged([0], attention):
        perturbed = predict(0)
    return predict(1), predict(0), perturbed


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("weight", [4.0, 1.0])
def test_the_published_formula(original: bool, weight: float) -> None:
    model, given = denoiser(), inputs()
    uncond, cond, perturbed = predictions(model, given, itself_and_others(0, GRID[0] * GRID[1]))
    patched = sloth_fx.transform(model, PAG(scale=2.0, where="transformer_blocks.0.*"))
    scale = weight - 1 if original else weight  # theirs counts from c, or from u
    guider = PerturbedGuidance(guidance_scale=scale, use_original_formulation=original)
    guider.set_state(3, 10, torch.tensor(700.0))
    seen: list[float] = []
    patched.register_forward_hook(lambda model, *_: seen.append(sloth_fx.context(model).progress))
    found = guided(guider, patched, given)
    expected = uncond + weight * (cond - uncond) + 2.0 * (cond - perturbed)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    assert set(seen) == {0.3}
    context = sloth_fx.context(patched)
    assert (context.driven, context.rows, context.guidance_scale) == (False, ("cond",), None)


def test_self_attention_guidance_is_told_what_is_predicted() -> None:
    model, given = denoiser(), inputs()
    patched = sloth_fx.transform(model, SAG(where="transformer_blocks.0.*"))
    silent = PerturbedGuidance(guidance_scale=4.0)
    silent.set_state(3, 10, torch.tensor(700.0))
    with pytest.raises(SlothError, match="what the model predicts"):
        guided(silent, patched, given)
    guider = PerturbedGuidance(guidance_scale=4.0, prediction="flow")
    guider.set_state(3, 10, torch.tensor(700.0))
    found = guided(guider, patched, given)
    uncond, cond, _ = predictions(model, given, itself_and_others(0, 1))
    assert (found - uncond - 4 * (cond - uncond)).abs().max() > 1e-3
    context = sloth_fx.context(patched)
    assert context.sigma == pytest.approx(0.7 / 0.3)  # of the call, not of its number
    assert context.prediction is None  # whoever calls next has to say it
    context.prediction = "flow"
    guided(silent, patched, given)
    assert context.prediction.kind == "flow"  # that of the caller


def test_a_model_that_was_not_transformed() -> None:
    with pytest.raises(SlothError, match="is no patched model"):
        guided(PerturbedGuidance(), denoiser(), inputs())


def test_a_guider_has_a_form_to_save() -> None:
    guider = PerturbedGuidance(guidance_scale=4.0, prediction="flow")
    again = PerturbedGuidance.from_config(guider.config)
    assert (again.guidance_scale, again.prediction) == (4.0, "flow")


def test_smoothed_energy_that_does_nothing() -> None:
    """Theirs never comes to change a query, and pays for a third pass."""
    model, given = denoiser(), inputs()
    uncond, cond, perturbed = predictions(model, given, mean_queries(0, GRID[0] * GRID[1]))
    theirs = SmoothedEnergyGuidance(guidance_scale=4.0, seg_guidance_scale=2.0, seg_guidance_layers=[0])
    theirs.set_state(3, 10, torch.tensor(700.0))
    assert theirs.num_conditions == 3
    plain = uncond + 4.0 * (cond - uncond)
    bound = {"rtol": 0, "atol": 2e-5 * float(plain.abs().max())}
    torch.testing.assert_close(guided(theirs, model, given), plain, **bound)

    patched = sloth_fx.transform(denoiser(), SEG(scale=2.0, where="transformer_blocks.0.*"))
    ours = PerturbedGuidance(guidance_scale=4.0)
    ours.set_state(3, 10, torch.tensor(700.0))
    found = guided(ours, patched, given)
    torch.testing.assert_close(found, plain + 2.0 * (cond - perturbed), **bound)
    assert (found - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("steps", "theirs", "ours"),
    [(1, [], [0]), (4, [], [0]), (8, [], [1]), (20, [1, 2, 3], [1, 2, 3]), (50, [*range(1, 10)], [*range(1, 10)])],
)
def test_ranges_in_short_runs(steps: int, theirs: list[int], ours: list[int]) -> None:
    """Theirs never skips a layer in runs of few steps."""
    guider = SkipLayerGuidance(skip_layer_guidance_layers=[0])
    found = []
    for step in range(steps):
        guider.set_state(step, steps, torch.tensor(0.0))
        found += [step] * guider._is_slg_enabled()
    assert found == theirs
    patched = sloth_fx.transform(denoiser(), SLG(layers=[0]))
    context = sloth_fx.context(patched)
    spec = SLG(layers=[0])
    acting = []
    for step in range(steps):
        context.step(step, steps)
        acting += [step] * spec.acts(context.moment)
    assert acting == ours
