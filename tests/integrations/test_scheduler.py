"""Moments read off the schedulers of diffusers, against what the model's own timestep says."""

import math
from typing import Any

import diffusers
import pytest
import torch
from torch.overrides import TorchFunctionMode

import sloth_fx
from sloth_fx import ModelAdapter, Moment, NoiseSchedule, Reduction, SlothfulAttention, StepDecay
from sloth_fx.integrations.follow import Follower
from sloth_fx.integrations.scheduler import SchedulerReader, moments_of
from tests.integrations import pipelines

PROGRESS = SlothfulAttention(in_=Reduction(rate=6.0), out=Reduction(rate=4.0))
SIGMA = SlothfulAttention(schedule=StepDecay(), in_=Reduction(rate=9.0), out=Reduction(rate=4.0))

VARIANCE_PRESERVING = {
    "DDIM": (diffusers.DDIMScheduler, {}),
    "DDIM trailing": (diffusers.DDIMScheduler, {"timestep_spacing": "trailing"}),
    "DDPM": (diffusers.DDPMScheduler, {}),
    "PNDM": (diffusers.PNDMScheduler, {}),
    "LCM": (diffusers.LCMScheduler, {}),
    "TCD": (diffusers.TCDScheduler, {}),
    "Euler": (diffusers.EulerDiscreteScheduler, {}),
    "Euler with Karras' sigmas": (diffusers.EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    "Euler ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "Heun": (diffusers.HeunDiscreteScheduler, {}),
    "KDPM2": (diffusers.KDPM2DiscreteScheduler, {}),
    "DPM++": (diffusers.DPMSolverMultistepScheduler, {}),
    "DPM++ with Karras' sigmas": (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "DPM++ of one step": (diffusers.DPMSolverSinglestepScheduler, {}),
    "DEIS": (diffusers.DEISMultistepScheduler, {}),
    "UniPC": (diffusers.UniPCMultistepScheduler, {}),
}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 2.0}
FLOWS = {
    "Euler": (diffusers.FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
    "Heun": (diffusers.FlowMatchHeunDiscreteScheduler, {}),
    "UniPC": (diffusers.UniPCMultistepScheduler, FLOW),
    "DPM++": (diffusers.DPMSolverMultistepScheduler, FLOW),
}


def preserving(name: str) -> Any:
    kind, options = VARIANCE_PRESERVING[name]
    return kind(**pipelines.BETAS, **options)


def flow(name: str) -> Any:
    kind, options = FLOWS[name]
    return kind(**options)


class Log:
    """Every moment that an attached pipeline came to, and what the same call says of itself."""

    def __init__(self, handle: Any, original: torch.nn.Module, spec: Any) -> None:
        self.driven: list[Moment] = []
        self.own: list[Moment] = []
        self.flags: list[bool] = []
        self.handle, self.twin = handle, sloth_fx.transform(original, spec)
        handle.model.register_forward_pre_hook(self.look, with_kwargs=True)

    def look(self, model, args, kwargs):
        self.twin(*args, **kwargs)
        self.driven.append(self.handle.context.moment)
        self.own.append(sloth_fx.context(self.twin).moment)
        self.flags.append(self.handle.context.driven)


def logged(pipe: Any, given: dict[str, Any], spec: Any, name: str = "unet", **options: Any) -> Log:
    original = getattr(pipe, name)
    with sloth_fx.attach(pipe, spec) as handle:
        log = Log(handle, original, spec)
        pipelines.run(pipe, given, **options)
    return log


def agree(log: Log, sigma: float = 1e-3) -> None:
    for driven, own in zip(log.driven, log.own, strict=True):
        assert driven.progress == pytest.approx(own.progress, abs=1e-6)
        assert driven.sigma == pytest.approx(own.sigma, rel=sigma)


@pipelines.numpy_warning
@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
def test_the_scheduler_says_what_the_timesteps_say(name):
    pipe, given = pipelines.sd()
    pipe.scheduler = preserving(name)
    log = logged(pipe, given, SIGMA)
    twice = {"Heun": 7, "KDPM2": 7, "PNDM": 13}
    assert len(log.driven) == twice.get(name, 4)
    assert all(log.flags)
    assert len({moment.progress for moment in log.driven}) >= 4
    agree(log)


@pipelines.numpy_warning
@pytest.mark.parametrize("name", ["DDIM", "Euler", "Heun", "DPM++", "LCM"])
def test_a_late_start_begins_at_a_late_progress(name):
    pipe, given = pipelines.image_to_image()
    pipe.scheduler = preserving(name)
    log = logged(pipe, given, SIGMA, steps=6)
    agree(log)
    assert log.driven[0].progress > 0.4
    assert all(log.flags)


@pipelines.numpy_warning
@pytest.mark.parametrize("name", FLOWS)
def test_flow_matching(name):
    pipe, given = pipelines.sd3()
    pipe.scheduler = flow(name)
    log = logged(pipe, given, PROGRESS, name="transformer")
    assert all(log.flags)
    for driven, own in zip(log.driven, log.own, strict=True):
        assert driven.progress == pytest.approx(own.progress, abs=2e-3)  # some round the timestep down
        level = 1 - driven.progress
        assert driven.sigma > 1e6 if level == 1 else driven.sigma == pytest.approx(level / (1 - level))


def test_flow_matching_by_sigma():
    """The model alone does not know sigma, and the first call of this pipeline gives time in units of its own."""
    pipe, given = pipelines.flux()
    pipe.scheduler.set_begin_index = lambda index: None
    with sloth_fx.attach(pipe, SIGMA) as handle:
        seen = []
        handle.model.register_forward_pre_hook(lambda model, args: seen.append(handle.context.moment))
        pipelines.run(pipe, given)
    expected = [float(s) for s in pipe.scheduler.sigmas[:-1]]
    assert [1 - moment.progress for moment in seen] == pytest.approx(expected, abs=1e-6)
    assert [moment.sigma for moment in seen[1:]] == pytest.approx([s / (1 - s) for s in expected[1:]], rel=1e-4)


def test_number_of_steps_and_timesteps_may_change_between_calls():
    pipe, given = pipelines.sd()
    for options in ({"steps": 3}, {"steps": 5}, {"timesteps": [981, 500, 77], "steps": None}):
        if "timesteps" in options:
            pipe.scheduler = diffusers.DDPMScheduler(**pipelines.BETAS)
        log = logged(pipe, given, SIGMA, **options)
        assert len(log.driven) == (options["steps"] or 3)
        agree(log)
    assert [moment.progress for moment in log.driven] == pytest.approx([0.019, 0.5, 0.923])


@pipelines.numpy_warning
def test_sigmas_of_the_callers_own():
    pipe, given = pipelines.sd()
    pipe.scheduler = diffusers.EulerDiscreteScheduler(**pipelines.BETAS)
    log = logged(pipe, given, SIGMA, steps=None, sigmas=[14.0, 3.0, 0.5, 0.0])
    assert [moment.sigma for moment in log.driven] == pytest.approx([14.0, 3.0, 0.5], rel=1e-3)
    agree(log)


@pipelines.numpy_warning
def test_a_scheduler_exchanged_while_attached_is_followed():
    pipe, given = pipelines.sd()
    original = pipe.unet
    with sloth_fx.attach(pipe, SIGMA) as handle:
        log = Log(handle, original, SIGMA)
        for scheduler in (pipe.scheduler, *(preserving(name) for name in ("Euler", "LCM", "DDIM"))):
            pipe.scheduler = scheduler
            pipelines.run(pipe, given, steps=3)
    assert len(log.driven) == 12
    assert all(log.flags)
    agree(log)


def test_without_a_scheduler_the_timestep_is_followed():
    pipe, given = pipelines.sd()
    values = {"sample": pipelines.noise(2, 4, 13, 21), "encoder_hidden_states": given["prompt_embeds"]}
    pipe.scheduler = None
    with sloth_fx.attach(pipe, PROGRESS) as handle, torch.no_grad():
        for timestep in (900, 100):
            handle.model(timestep=timestep, **values)
            assert handle.context.progress == pytest.approx(1 - timestep / 1000)
            assert not handle.context.driven


def test_a_context_that_is_driven_otherwise_is_left_alone():
    pipe, given = pipelines.sd()
    with sloth_fx.attach(pipe, PROGRESS) as handle:
        handle.context.at(0.25)
        pipelines.run(pipe, given, steps=2)
        assert handle.context.progress == 0.25
        handle.context.auto()
        pipelines.run(pipe, given, steps=2)
        assert handle.context.progress > 0.9
        values = {"sample": pipelines.noise(2, 4, 13, 21), "timestep": 500}
        values["encoder_hidden_states"] = given["prompt_embeds"]
        assert sloth_fx.warmup(handle.model, values, progress=False) == len(handle.context.moments())
        pipelines.run(pipe, given, steps=2)
        assert handle.context.progress > 0.9


class Reads(TorchFunctionMode):
    """Counts what would wait for a device."""

    names = ("tolist", "item", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy", "to", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += getattr(func, "__name__", "") in self.names
        return func(*args, **(kwargs or {}))


@pipelines.numpy_warning
@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "pixart", "flux"])
def test_only_the_first_step_of_a_run_reads_the_device(name, monkeypatch):
    pipe, given = pipelines.PIPELINES[name]()
    counts = []
    follow = Follower.follow

    def counted(self, *call):
        with Reads() as reads:
            follow(self, *call)
        counts.append(reads.count)

    monkeypatch.setattr(Follower, "follow", counted)
    with sloth_fx.attach(pipe, PROGRESS):
        for _ in range(2):
            pipelines.run(pipe, given, steps=3)
    assert [count > 0 for count in counts] == [True, False, False] * 2


# Without a pipeline


class Known:
    """A scheduler of three timesteps."""

    def __init__(self, timesteps, *, sigmas=None, alphas_cumprod=None, **config):
        self.timesteps = torch.tensor(timesteps)
        self.sigmas = None if sigmas is None else torch.tensor([*sigmas, 0.0])
        self.alphas_cumprod = alphas_cumprod
        self.config = type("Config", (), {"num_train_timesteps": 1000, **config})()


def test_an_index_in_order_of_trust():
    """Where the timestep lies, then the scheduler's count, then its value. Here each says something else."""
    reader = SchedulerReader(ModelAdapter(timesteps=1))
    scheduler = Known([900.0, 500.0, 100.0], sigmas=[0.9, 0.5, 0.1])
    each_token = torch.tensor([[0.9, 0.0], [0.9, 0.0]])  # first frames that are given have no noise
    assert reader.moment(scheduler, each_token) is None
    assert reader.moment(scheduler, torch.tensor([0.1, 0.1])).progress == pytest.approx(0.9)
    assert reader.moment(scheduler, 0.3) is None  # of another schedule
    scheduler.begin_index = 1
    assert reader.moment(scheduler, each_token).progress == pytest.approx(0.5)
    scheduler.step_index = 0
    assert reader.moment(scheduler, torch.tensor([0.1])).progress == pytest.approx(0.1)
    assert reader.moment(scheduler, scheduler.timesteps[2].expand(2)).progress == pytest.approx(0.9)
    scheduler.step_index = 3  # the run is over
    assert reader.moment(scheduler, None) is None
    assert reader.runs == 1


def test_edm_counts_in_the_logarithm_of_sigma():
    sigmas = [80.0, 1.0, 0.002]
    scheduler = Known([math.log(s) / 4 for s in sigmas], sigmas=sigmas, sigma_max=80.0, sigma_min=0.002)
    moments = moments_of(scheduler)
    assert [moment.sigma for moment in moments] == pytest.approx(sigmas)
    assert [moment.progress for moment in moments] == pytest.approx([0, math.log(80) / math.log(40000), 1], abs=1e-6)


def test_inverted_sigmas_count_from_the_end():
    moments = moments_of(Known([0.0, 250.0, 900.0], sigmas=[0.0, 0.25, 0.9], invert_sigmas=True))
    assert [moment.progress for moment in moments] == pytest.approx([0, 0.25, 0.9])
    assert moments[1].sigma == pytest.approx(3.0)


def test_no_signal_at_all_is_a_finite_sigma():
    abar = torch.linspace(0.99, 0.0, 1000)
    first, second, _ = moments_of(Known([999, 500, 0], alphas_cumprod=abar))
    assert 1e100 < first.sigma < math.inf
    assert second.sigma == pytest.approx(float(((1 - abar[500]) / abar[500]) ** 0.5), rel=1e-4)


def test_stable_diffusions_own_betas_give_its_own_sigmas():
    scheduler = diffusers.DDIMScheduler(**pipelines.DDIM)
    scheduler.set_timesteps(7)
    for t, moment in zip(scheduler.timesteps.tolist(), moments_of(scheduler), strict=True):
        assert moment.progress == pytest.approx(1 - t / 1000)
        assert moment.sigma == pytest.approx(NoiseSchedule().sigma(t), rel=1e-4)


def test_schedulers_of_no_known_kind():
    abar = torch.linspace(0.99, 0.1, 1000)
    assert moments_of(Known([1.57, 0.8, 0.1])) is None
    assert moments_of(Known([1.57, 0.8, 0.1], sigmas=[50.0, 3.0, 0.2])) is None
    assert moments_of(Known([5000, 3000, 1], alphas_cumprod=abar)) is None
    assert moments_of(Known([999, 500, 1], alphas_cumprod=abar, num_train_timesteps=None)) is None
    assert len(moments_of(Known([999, 500, 1], alphas_cumprod=abar))) == 3


@pytest.mark.parametrize("kind", [diffusers.EDMEulerScheduler, diffusers.EDMDPMSolverMultistepScheduler])
def test_edm_schedulers_of_diffusers(kind):
    scheduler = kind()
    scheduler.set_timesteps(5)
    moments = moments_of(scheduler)
    assert [moment.sigma for moment in moments] == pytest.approx(scheduler.sigmas[:5].tolist())
    assert (moments[0].progress, moments[-1].progress) == pytest.approx((0.0, 1.0), abs=1e-6)
    assert sorted(moments) == moments


@pipelines.numpy_warning
@pytest.mark.parametrize(
    ("spacing", "steps", "expected"),
    [
        ("trailing", 4, [(0.0, 0.251), (0.251, 0.501), (0.501, 0.751), (0.751, 1.0)]),
        ("leading", 4, [(0.0, 0.5), (0.5, 0.75), (0.75, 1.0), (1.0, 1.0)]),
        ("leading", 1, [(0.0, 1.0)]),
    ],
)
def test_the_part_of_the_run_that_a_step_covers(spacing, steps, expected):
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    found = [moment.step for moment in moments_of(scheduler)]
    assert found == [pytest.approx(each, abs=2e-3) for each in expected]
    acting = [moment.within(0.01, 0.2) for moment in moments_of(scheduler)]
    assert acting == [True] + [False] * (steps - 1)  # of a short run the first step, wherever it begins


@pipelines.numpy_warning
def test_two_calls_of_one_step_cover_the_same():
    scheduler = diffusers.HeunDiscreteScheduler()
    scheduler.set_timesteps(5)
    steps = [moment.step for moment in moments_of(scheduler)]
    assert steps[1] == steps[2]
    assert steps[3] == steps[4]
    assert steps[-1][1] == 1.0


def test_a_run_that_begins_late_does_not_cover_what_it_left_out():
    scheduler = Known([500.0, 400.0, 300.0], alphas_cumprod=torch.linspace(0.99, 0.01, 1000))
    assert moments_of(scheduler)[0].step == pytest.approx((0.5, 0.6))
    assert not moments_of(scheduler)[0].within(0.01, 0.2)
