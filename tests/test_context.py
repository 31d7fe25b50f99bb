"""The timestep context: how it is driven, what it knows, and what it refuses."""

import copy

import numpy as np
import pytest
import torch

import sloth_fx
from sloth_fx import Constant, NoiseSchedule, SlothError
from tests import models

SLOTHFUL = sloth_fx.SlothfulAttention()
BY_SIGMA = sloth_fx.SlothfulAttention.from_node(release="2023-12-11")


@pytest.fixture
def patched():
    return sloth_fx.transform(models.shared("sd15"), SLOTHFUL)


@pytest.fixture
def context(patched):
    return sloth_fx.context(patched)


def test_step_counts_from_zero(context):
    context.step(0, 4)
    assert context.progress == 0
    context.step(3, 4)
    assert context.progress == 0.75


def test_numbers_may_be_numpys_or_tensors(context):
    context.step(np.int64(1), np.int32(4))
    assert context.progress == 0.25
    context.at(np.float32(0.5), sigma=torch.tensor(2.5))
    assert (context.progress, context.sigma) == (0.5, 2.5)


@pytest.mark.parametrize("step", [(-1, 4), (4, 4), (0, 0), (1.0, 4), (True, 4), ("1", 4)])
def test_step_out_of_range(context, step):
    context.at(0.3)
    with pytest.raises(SlothError, match="from 0 to n - 1"):
        context.step(*step)
    assert context.progress == 0.3


@pytest.mark.parametrize("progress", [-0.1, 1.1, float("nan"), float("inf"), "0.5", None, True])
def test_progress_out_of_range(context, progress):
    with pytest.raises(SlothError, match="progress="):
        context.at(progress)


@pytest.mark.parametrize("sigma", [-1.0, float("nan"), float("inf"), "1"])
def test_sigma_out_of_range(context, sigma):
    with pytest.raises(SlothError, match="sigma="):
        context.at(0.5, sigma=sigma)


def test_sigma_is_the_callers_or_stable_diffusions(context):
    context.at(0.5, sigma=3.0)
    assert context.sigma == 3.0
    context.at(0.5)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    signal = torch.cumprod(1 - betas, 0)[500]
    assert context.sigma == pytest.approx(((1 - signal) / signal).sqrt().item())


def test_a_driven_context_ignores_timesteps_until_auto(patched, context):
    values = models.inputs(patched, timestep=100)
    context.at(0.4)
    models.run(patched, values)
    assert context.progress == 0.4
    assert context.driven
    context.auto()
    models.run(patched, values)
    assert context.progress == pytest.approx(0.9)
    assert not context.driven


@pytest.mark.parametrize("timestep", [700, 700.0, torch.tensor(700), torch.tensor([700, 700])])
def test_auto_reads_any_form_of_timestep(patched, context, timestep):
    models.run(patched, models.inputs(patched, timestep=timestep))
    assert context.progress == pytest.approx(0.3)


def test_timesteps_that_differ_have_no_moment(patched):
    with pytest.raises(SlothError, match="timesteps of this batch differ"):
        models.run(patched, models.inputs(patched, timestep=torch.tensor([700, 100])))


def test_timesteps_may_differ_where_nothing_depends_on_time():
    model = sloth_fx.transform(models.shared("sd15"), sloth_fx.SlothfulAttention(schedule=Constant()))
    models.run(model, models.inputs(model, timestep=torch.tensor([700, 100])))


def test_an_unknown_noise_schedule_has_to_be_told():
    class Host(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unet = models.shared("sd15")

        def forward(self, sample, timestep, text):
            return self.unet(sample, timestep, text).sample

    values = models.inputs(models.shared("sd15"))
    inputs = values["sample"], 500, values["encoder_hidden_states"]
    model = sloth_fx.transform(Host(), BY_SIGMA, example_inputs=inputs)
    context = sloth_fx.context(model)
    with torch.no_grad():
        with pytest.raises(SlothError, match=r"auto\(NoiseSchedule"):
            model(*inputs)
        with pytest.raises(SlothError, match="noise schedule of this model is not known"):
            context.at(0.5)
        context.at(0.5, sigma=2.0)
        told = model(*inputs)
        context.auto(NoiseSchedule())
        model(*inputs)
        assert context.sigma == pytest.approx(NoiseSchedule().sigma(500))
        context.at(0.9, sigma=2.0)
        assert torch.equal(model(*inputs), told)


def test_auto_takes_schedules_only_and_comes_back_to_the_models_own(context):
    with pytest.raises(SlothError, match="give a NoiseSchedule"):
        context.auto(5)
    own = context.sigma_at(0.0)
    longer = NoiseSchedule(steps=2000)
    context.auto(longer)
    assert context.sigma_at(0.0) == pytest.approx(longer.sigma(2000)) != own
    context.auto()
    assert context.sigma_at(0.0) == own


@pytest.mark.parametrize("timestep", [float("nan"), torch.tensor(float("nan")), torch.zeros((), device="meta"), None])
def test_a_timestep_without_a_value(patched, context, timestep):
    with pytest.raises(SlothError, match=r"drive the context with (step\(i, n\) or )?at\(progress\)"):
        patched(**{**models.inputs(patched), "timestep": timestep})


@pytest.mark.parametrize("steps", [0, -3, 2.5, "x"])
def test_warmup_over_no_number_of_steps(patched, steps):
    with pytest.raises(SlothError, match="steps="):
        sloth_fx.warmup(patched, models.inputs(patched), steps=steps, progress=False)


def test_phase_numbers_the_sets(patched, context):
    models.run(patched, models.inputs(patched))
    phases = []
    for i in range(20):
        context.step(i, 20)
        phases.append(context.phase)
    assert len(set(phases)) == len({context.layouts() for i in range(20) if context.step(i, 20) is None})


@pytest.mark.parametrize("spec", [SLOTHFUL, BY_SIGMA])
def test_phases_divide_the_run(spec):
    model = sloth_fx.transform(models.shared("sd15"), spec, phases=4)
    context = sloth_fx.context(model)
    models.run(model, models.inputs(model))
    layouts = {}
    for i in range(100):
        context.step(i, 100)
        layouts.setdefault(context.phase, set()).add(context.layouts())
    assert set(layouts) == {0, 1, 2, 3}
    assert all(len(each) == 1 for each in layouts.values())


def test_phases_need_one_clock():
    both = [
        sloth_fx.SlothfulAttention(where="in"),
        sloth_fx.SlothfulAttention(where="out", schedule=sloth_fx.StepDecay()),
    ]
    sloth_fx.transform(models.shared("sd15"), both)
    with pytest.raises(SlothError, match="phases= needs one clock"):
        sloth_fx.transform(models.shared("sd15"), both, phases=3)


@pytest.mark.parametrize("phases", [0, -1, 2.0, True, "3"])
def test_phases_out_of_range(phases):
    with pytest.raises(SlothError, match="phases="):
        sloth_fx.transform(models.shared("sd15"), SLOTHFUL, phases=phases)


def test_layouts_need_a_latent():
    model = sloth_fx.transform(torch.nn.Sequential(models.shared("unconditional")), SLOTHFUL)
    with pytest.raises(SlothError, match="size of the latent is not known yet"):
        sloth_fx.context(model).layouts()


def test_halves_keep_conditionings_apart():
    spec = sloth_fx.NearSightedTile(tile_size=6, concat_local=True, concat_global=True)
    model = sloth_fx.transform(models.shared("sd15"), spec)
    context, values = sloth_fx.context(model), models.inputs(model, batch=4)
    context.halves = 2
    together = models.run(model, values)
    context.halves = 1
    for half in (slice(0, 2), slice(2, 4)):
        part = {name: value[half] if torch.is_tensor(value) else value for name, value in values.items()}
        assert torch.allclose(models.run(model, part), together[half], atol=1e-5)
    assert not torch.allclose(models.run(model, values), together, atol=1e-3)
    context.halves = 3
    with pytest.raises(SlothError, match="4 cannot be divided into 3 halves"):
        models.run(model, values)
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(SlothError, match="halves="):
            context.halves = wrong


def test_a_copy_has_a_context_of_its_own(patched, context):
    other = copy.deepcopy(patched)
    assert sloth_fx.context(other) is not context
    values = models.inputs(patched)
    context.at(0.4)
    sloth_fx.context(other).at(1.0)
    first, second = models.run(patched, values), models.run(other, values)
    assert not torch.equal(first, second)
    sloth_fx.context(other).at(0.4)
    assert torch.equal(models.run(other, values), first)
    assert context.progress == 0.4


def test_warmup_in_eager_mode_counts_the_sets_of_a_run(patched, context):
    values = models.inputs(patched)
    assert sloth_fx.warmup(patched, values, steps=10, progress=False) == len(context.moments(10))


def test_warmup_meets_what_acts_within_a_step():
    model = sloth_fx.transform(models.shared("sd15"), sloth_fx.PAG(start=0.01, stop=0.2))
    context, values, met = sloth_fx.context(model), models.inputs(model), set()
    model.register_forward_hook(lambda *_: met.add(context.layouts()))
    assert sloth_fx.warmup(model, values, steps=4, progress=False) == len(context.moments(4)) == 2
    assert met == {context.layouts() for i in range(4) if context.step(i, 4) is None}


def test_what_was_saved_is_all_of_it(context):
    context.at(0.5, sigma=7.0)
    with context.saved():
        context.at(0.1)
    before = vars(context._timeline) | {}
    context.at(0.5, sigma=7.0)
    assert vars(context._timeline) == before


@pytest.mark.parametrize(
    ("spec", "fewest"),
    [(sloth_fx.PAG(start=0.01, stop=0.2), 3), (sloth_fx.PAG(start=0.9), 5), (sloth_fx.NAG(stop=0.25), 3)],
)
def test_phases_do_not_switch_guidance_off_in_silence(spec, fewest):
    for phases in range(1, fewest):
        with pytest.raises(SlothError, match=rf"phases={phases} .* would never act"):
            sloth_fx.transform(models.shared("sd15"), spec, phases=phases)
    for phases in (None, fewest):
        sloth_fx.transform(models.shared("sd15"), spec, phases=phases)
    sloth_fx.transform(models.shared("sd15"), sloth_fx.PAG(scale=0.0, start=0.9), phases=2)
