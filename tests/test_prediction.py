"""What a model predicts, against x0 and noise that are known."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from sloth_fx.errors import SlothError
from sloth_fx.integrations.scheduler import moments_of, prediction_of
from sloth_fx.model_adapters import ModelAdapter
from sloth_fx.prediction import ENDLESS, KINDS, Prediction, flow_of, sigma_of_flow

SHAPE = (2, 4, 5, 7)


def known(kind, sigma):
    """x0, noise, what the model is given, and what it predicts, in float64."""
    clean, noise = torch.randn(2, *SHAPE, dtype=torch.float64)
    if kind in ("flow", "reversed_flow"):
        share = sigma / (1 + sigma)
        x, velocity = (1 - share) * clean + share * noise, noise - clean
        return clean, noise, x, velocity if kind == "flow" else -velocity
    if kind == "edm":
        length = math.sqrt(sigma**2 + 0.25)
        x = (clean + sigma * noise) / length
        return clean, noise, x, (clean - 0.25 / length**2 * length * x) / (sigma * 0.5 / length)
    abar = 1 / (1 + sigma**2)
    signal, share = math.sqrt(abar), math.sqrt(1 - abar)
    said = {"epsilon": noise, "v_prediction": signal * noise - share * clean, "sample": clean}
    return clean, noise, signal * clean + share * noise, said[kind]


@pytest.mark.parametrize("sigma", [0.03, 1.0, 14.6])
@pytest.mark.parametrize("kind", KINDS)
def test_the_clean_latent_of_a_prediction(kind, sigma):
    clean, _, x, prediction = known(kind, sigma)
    level = Prediction(kind).level(sigma)
    torch.testing.assert_close(level.of_input * x + level.of_prediction * prediction, clean)


@pytest.mark.parametrize("sigma", [0.03, 1.0, 14.6])
@pytest.mark.parametrize("kind", KINDS)
def test_how_a_prediction_follows_the_clean_latent(kind, sigma):
    clean, _, x, prediction = known(kind, sigma)
    change = 0.1 * torch.randn(SHAPE, dtype=torch.float64)
    level = Prediction(kind).level(sigma)
    moved = x + level.signal * change  # the same noise
    found = (clean + change - level.of_input * moved) / level.of_prediction
    torch.testing.assert_close(found - prediction, level.shift * change)


@pytest.mark.parametrize("kind", ["v_prediction", "flow", "sample"])
def test_pure_noise(kind):
    level = Prediction(kind).level(ENDLESS)
    assert all(map(math.isfinite, (*level, level.shift)))
    assert level.signal < 1e-200


def test_pure_noise_of_a_model_that_predicts_noise():
    with pytest.raises(SlothError, match="says nothing of the image"):
        Prediction("epsilon").level(ENDLESS)


@pytest.mark.parametrize("kind", ["eps", "v", "", None, 3])
def test_kinds_that_are_none(kind):
    with pytest.raises(SlothError, match=r"prediction=.*: one of epsilon, v_prediction, sample, flow"):
        Prediction(kind)
    with pytest.raises(SlothError, match="data_sigma=0"):
        Prediction("edm", data_sigma=0)


def test_the_flow_of_a_model_runs_with_its_own_time():
    assert flow_of("Any", ModelAdapter()).kind == "flow"
    assert flow_of("Any", ModelAdapter(timesteps=0, final_timestep=1)).kind == "reversed_flow"
    assert flow_of("HiDreamImageTransformer2DModel", ModelAdapter()).kind == "reversed_flow"
    assert sigma_of_flow(0.25) == pytest.approx(3.0)
    assert sigma_of_flow(0.0) == ENDLESS


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_a_scheduler_says_it(scheduler, kind):
    assert prediction_of(scheduler(prediction_type=kind)) == Prediction(kind)


def test_schedulers_of_other_kinds():
    assert prediction_of(FlowMatchEulerDiscreteScheduler()) == Prediction("flow")
    assert prediction_of(EDMEulerScheduler(sigma_data=0.7)) == Prediction("edm", 0.7)
    assert prediction_of(object()) is None
    assert prediction_of(None) is None


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_what_a_scheduler_makes_of_it(scheduler, kind):
    """The x0 of a step of theirs is ours, with the noise level that is read off the scheduler."""
    made = scheduler(prediction_type=kind, beta_schedule="scaled_linear", **_unclipped(scheduler))
    made.set_timesteps(5)
    moment = moments_of(made)[2]
    for timestep in made.timesteps[:2]:
        made.step(torch.randn(SHAPE), timestep, torch.randn(SHAPE))
    sample, prediction, timestep = torch.randn(SHAPE), torch.randn(SHAPE), made.timesteps[2]
    x = made.scale_model_input(sample, timestep)
    theirs = made.step(prediction, timestep, sample).pred_original_sample
    level = Prediction(kind).level(moment.sigma)
    torch.testing.assert_close(level.of_input * x + level.of_prediction * prediction, theirs, rtol=1e-4, atol=1e-4)


def _unclipped(scheduler):
    return {"clip_sample": False} if scheduler is DDIMScheduler else {}
