"""What cannot be done raises a SlothError that says what, where and what would work, and changes nothing."""

import json
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

import sloth_fx
from sloth_fx import (
    NearSightedAttention,
    NearSightedTile,
    NoiseSchedule,
    PeakDecay,
    Reduction,
    SlothError,
    SlothfulAttention,
    StepDecay,
)
from tests import models

SPEC = SlothfulAttention()


def refused(model: Any, specs: Any = SPEC, **options: Any) -> str:
    """The message of the error that transform raises; the model must not have changed."""
    before = models.state_of(model) if isinstance(model, nn.Module) else None
    with pytest.raises(SlothError) as caught:
        sloth_fx.transform(model, specs, **options)
    assert before is None or models.state_of(model) == before
    return str(caught.value)


def says(message: str, *words: str) -> None:
    for word in words:
        assert word in message, message


# Models


def test_not_a_module():
    for what in (42, "unet", None, models.MODELS, models.UNet2DModel):
        says(refused(what), type(what).__name__, "torch.nn.Module")
        with pytest.raises(SlothError, match=r"torch\.nn\.Module"):
            sloth_fx.inspect(what)


def test_a_pipeline_is_not_a_module_and_its_unet_is_named():
    class Pipeline:
        unet = models.shared("sdxl")

    says(refused(Pipeline()), "Pipeline", "unet")


def test_no_attention():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.SiLU())
    says(refused(model, example_inputs=(torch.zeros(1, 4, 8, 8),)), "no attention", "Sequential")


def test_no_attention_found_at_the_first_call():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))
    with pytest.raises(SlothError, match=r"Sequential.*no attention"):
        sloth_fx.transform(model, SPEC)(torch.zeros(1, 4, 8, 8))


def test_only_cross_attention():
    class Cross(nn.Module):
        def forward(self, latent, text):
            query = latent.flatten(2).mT.unsqueeze(1)
            return F.scaled_dot_product_attention(query, text.unsqueeze(1), text.unsqueeze(1))

    example = (torch.zeros(1, 4, 8, 8), torch.zeros(1, 5, 4))
    says(refused(Cross(), example_inputs=example), "self-attention", "cross")


def test_compiled_already():
    model = models.ssd1b()
    says(refused(torch.compile(model, backend="eager")), "compiled", "transform first")
    model.compile(backend="eager")
    says(refused(model), "compiled", "transform first")
    model = models.ssd1b()
    model.compile_repeated_blocks(backend="eager")
    says(refused(model), "compiled", "UNet2DConditionModel", "transform first")


def test_patched_already():
    patched = sloth_fx.transform(models.shared("ssd1b"), SPEC)
    says(refused(patched), "patched already", "UNet2DConditionModel", "one call")
    says(refused(nn.Sequential(patched)), "patched already")


# Specs


@pytest.mark.parametrize("empty", [None, [], ()])
def test_no_spec(empty):
    says(refused(models.shared("ssd1b"), empty), "empty", "SlothfulAttention", "NearSightedTile")


@pytest.mark.parametrize(
    "wrong", ["slothful", 3, {"type": "SlothfulAttention"}, Reduction(rate=2.0), SlothfulAttention, [SPEC, None]]
)
def test_no_instance_of_a_spec(wrong):
    says(refused(models.shared("ssd1b"), wrong), "is no spec", "SlothfulAttention")


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Reduction(rate=51.0), ("Reduction", "rate=51.0", "0 to 50")),
        (lambda: Reduction(rate=float("nan")), ("rate=nan", "0 to 50")),
        (lambda: Reduction(rate="6"), ("rate='6'", "number")),
        (lambda: Reduction(rate=True), ("rate=True", "number")),
        (lambda: Reduction(rate=2.0, mode="3d_avg"), ("mode='3d_avg'", "2d_avg")),
        (lambda: PeakDecay(peak_time=1.5), ("PeakDecay", "peak_time=1.5", "0 to 1")),
        (lambda: StepDecay(time_decay=-1.0), ("StepDecay", "time_decay=-1.0")),
        (lambda: SlothfulAttention(in_=6.0), ("SlothfulAttention", "in_=6.0", "Reduction(rate=...)")),
        (lambda: SlothfulAttention(schedule="peak"), ("schedule='peak'", "PeakDecay()")),
        (lambda: NearSightedTile(tile_size=0), ("NearSightedTile", "tile_size=0")),
        (lambda: NearSightedTile(tile_size=32.0), ("tile_size=32.0", "whole number")),
        (lambda: NearSightedTile(global_ratio=float("inf")), ("global_ratio=inf", "0 to 2")),
        (lambda: NearSightedAttention(max_depth=9), ("NearSightedAttention", "max_depth=9")),
        (lambda: NoiseSchedule(beta_end=2.0), ("NoiseSchedule", "beta_end=2.0")),
        (lambda: SlothfulAttention.from_node(in_strength=6.0), ("in_strength", "in_slothful", "2023-12-16")),
        (lambda: NearSightedTile.from_node(tile_size=8), ("tile_size=8", "16 to 64")),
        (lambda: SlothfulAttention.from_node(release="2024"), ("2024", "2023-12-16")),
        (lambda: sloth_fx.load_spec({"version": 1, "type": "SlothfulAttention", "in": {}}), ("'in'", "in_")),
        (lambda: sloth_fx.load_spec({"version": 1, "type": "Slothful"}), ("Slothful", "SlothfulAttention")),
        (
            lambda: sloth_fx.load_spec({"version": 1, "type": "NearSightedTile", "tilesize": 3}),
            ("'tilesize'", "nearest: tile_size"),
        ),
    ],
)
def test_values_that_a_spec_refuses(build, words):
    with pytest.raises(SlothError) as caught:
        build()
    says(str(caught.value), *words)


def test_a_bad_file(tmp_path):
    path = tmp_path / "spec.json"
    with pytest.raises(SlothError, match=r"spec\.json"):
        sloth_fx.load_spec(path)
    path.write_text(json.dumps({**SPEC.to_dict(), "rte": 1}))
    with pytest.raises(SlothError, match="'rte'"):
        sloth_fx.load_spec(path)


def test_two_specs_for_one_site():
    model = models.shared("ssd1b")
    message = refused(model, [NearSightedTile(tile_size=8), NearSightedAttention()])
    says(message, "NearSightedTile", "NearSightedAttention", "tile", models.BLIND, "where=")
    says(refused(model, [SPEC, NearSightedAttention(where="out")]), "reduce the keys", "up_blocks.", "where=")
    sloth_fx.transform(model, [NearSightedAttention(where="in"), SlothfulAttention(where="out")])


@pytest.mark.parametrize("phases", [0, -1, 2.0, True, "2"])
def test_phases_that_are_no_number_of_phases(phases):
    says(refused(models.shared("ssd1b"), phases=phases), f"phases={phases!r}")


def test_phases_need_one_clock():
    specs = [SlothfulAttention(schedule=StepDecay(), where="in"), SlothfulAttention(where="out")]
    says(refused(models.shared("ssd1b"), specs, phases=4), "phases", "one clock", "phases=None")
    sloth_fx.transform(models.shared("ssd1b"), specs)


# where


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("down_block.1.*", ("matches no site", "down_block.1.*", "nearest", "down_blocks.1.")),
        ("middle", ("matches no site", "middle", "nearest", "out")),
        ((3, 8), ("matches no site", "(3, 8)", "depth 1", "depth 2")),
        ({"stage": "out", "path": "down_blocks.*"}, ("matches no site", "nearest", "down_blocks.")),
        (lambda site: False, ("matches no site", "down_blocks.")),
        ("cross", ("self-attention", "attn2", "cross-attention")),
        ("*.attn2", ("self-attention", "attn2", "cross-attention")),
    ],
)
def test_where_that_selects_nothing(where, words):
    says(refused(models.shared("ssd1b"), SlothfulAttention(where=where)), "SlothfulAttention", *words)


def test_where_that_is_no_selector():
    for wrong, words in (
        ({"stge": "out"}, ("'stge'", "stage")),
        ((2, 1), ("(2, 1)", "low first")),
        (7, ("where=7", "glob")),
        ({"stage": "up"}, ("'up'", "out")),
    ):
        with pytest.raises(SlothError) as caught:
            SlothfulAttention(where=wrong)
        says(str(caught.value), *words)
    says(refused(models.shared("ssd1b"), SlothfulAttention(where=lambda site: 1)), "True or False", models.BLIND)


def test_a_spec_that_acts_on_no_site_it_selects():
    says(refused(models.shared("sdxl"), SlothfulAttention(where="middle")), "acts on no site", "keep_middle")
    says(refused(models.shared("sdxl"), NearSightedTile(max_depth=1)), "acts on no site", "max_depth=1")


# Inputs


@pytest.mark.parametrize(
    ("example", "words"),
    [
        ((torch.zeros(1, 4, 8, 8),), ("UNet2DConditionModel", "(1, 4, 8, 8)", "timestep")),
        ({"samples": torch.zeros(1, 4, 8, 8)}, ("UNet2DConditionModel", "samples")),
        ((torch.zeros(1, 3, 8, 8), 5, torch.zeros(1, 7, models.TEXT)), ("(1, 3, 8, 8)", "does not run")),
        ("a picture", ("example_inputs", "str", "dict", "tuple")),
        (5, ("example_inputs", "int")),
    ],
)
def test_inputs_that_the_model_rejects(example, words):
    says(refused(models.shared("sd15"), example_inputs=example), *words)
    with pytest.raises(SlothError) as caught:
        sloth_fx.inspect(models.shared("sd15"), example_inputs=example)
    says(str(caught.value), *words)


def test_inspecting_a_model_of_unknown_class_takes_inputs():
    with pytest.raises(SlothError, match="example_inputs"):
        sloth_fx.inspect(nn.Sequential(nn.Conv2d(4, 4, 3)))


class Tokens(nn.Module):
    """Attention over patches of a latent, with or without a token that belongs to no place."""

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.extra = extra
        self.patch = nn.Conv2d(4, 8, 2, stride=2)
        self.qkv = nn.Linear(8, 24)

    def forward(self, latent):
        tokens = F.pad(self.patch(latent).flatten(2).mT, (0, 0, self.extra, 0))
        return F.scaled_dot_product_attention(*self.qkv(tokens).unsqueeze(1).chunk(3, -1))


class Owner(nn.Module):
    def __init__(self, extra: int) -> None:
        super().__init__()
        self.inner = Tokens(extra)

    def forward(self, latent):
        return self.inner(latent)


class Backwards(Tokens):
    """Its tokens are in an order that is no grid."""

    def forward(self, latent):
        tokens = self.patch(latent).flatten(2).mT.flip(1)
        return F.scaled_dot_product_attention(*self.qkv(tokens).unsqueeze(1).chunk(3, -1))


def test_tokens_without_a_grid():
    message = refused(Backwards(0), example_inputs=(torch.zeros(2, 4, 8, 12),))
    says(message, "24 tokens", "grid", "SlothfulAttention")


def test_tokens_that_do_not_fit_the_grid():
    """This model drops a last odd row, which only a call with an odd latent shows."""
    latent = torch.zeros(2, 4, 8, 12)
    for spec in (SlothfulAttention(keep_middle=False), NearSightedTile(tile_size=2)):
        patched = sloth_fx.transform(Owner(0), spec, example_inputs=(latent,))
        sloth_fx.context(patched).at(0.4)
        patched(latent)
        with pytest.raises(SlothError) as caught:
            patched(torch.zeros(2, 4, 9, 12))
        says(str(caught.value), "inner", "24 tokens", "5 x 6")


# Sites


def test_a_site_that_cannot_be_captured():
    model = models.sdxl()
    models.blind(model)
    says(refused(model), models.BLIND, "Attention", "cannot be captured", "a function that holds a module")


# Context


@pytest.mark.parametrize("ask", [sloth_fx.context, sloth_fx.report, lambda m: sloth_fx.graph(m, models.BLIND)])
def test_asking_a_model_that_is_not_patched(ask):
    for model in (models.shared("ssd1b"), nn.Linear(2, 2)):
        with pytest.raises(SlothError, match=rf"{type(model).__name__} is no patched model.*transform"):
            ask(model)


def test_asking_what_is_no_model():
    for what in (None, 3):
        with pytest.raises(SlothError, match="patched"):
            sloth_fx.context(what)


def test_a_graph_of_what_was_not_rewritten():
    patched = sloth_fx.transform(models.shared("ssd1b"), SPEC)
    with pytest.raises(SlothError, match="nearest") as caught:
        sloth_fx.graph(patched, models.BLIND[:-1])
    says(str(caught.value), models.BLIND)


def test_moments_that_do_not_exist():
    patched = sloth_fx.transform(models.shared("ssd1b"), SPEC)
    context = sloth_fx.context(patched)
    context.at(0.25, sigma=3.0)
    for progress in (-0.1, 1.01, float("nan"), "0.5", None, True):
        with pytest.raises(SlothError, match=f"progress={progress!r}.*0 .*1"):
            context.at(progress)
    for sigma in (-1.0, float("nan"), float("inf"), "3"):
        with pytest.raises(SlothError, match=f"sigma={sigma!r}"):
            context.at(0.5, sigma=sigma)
    for i, n in ((5, 5), (-1, 5), (0, 0), (0.5, 5), (True, 5)):
        with pytest.raises(SlothError, match=f"i={i!r}, n={n!r}"):
            context.step(i, n)
    for halves in (0, 1.5, True):
        with pytest.raises(SlothError, match=f"halves={halves!r}"):
            context.halves = halves
    assert (context.progress, context.sigma) == (0.25, 3.0)


def test_a_batch_that_cannot_be_halved():
    model = models.shared("sdxl")
    patched = sloth_fx.transform(model, NearSightedTile(tile_size=5, concat_local=True))
    sloth_fx.context(patched).halves = 2
    with pytest.raises(SlothError, match=r"batch of 3.*2 halves"):
        models.run(patched, models.inputs(model, 3))


def test_timesteps_that_tell_no_moment():
    model = models.shared("ssd1b")
    patched = sloth_fx.transform(model, SPEC)
    with pytest.raises(SlothError, match=r"differ.*at\(progress\)"):
        models.run(patched, models.inputs(model, timestep=torch.tensor([3, 700])))
    wrapped = sloth_fx.transform(Denoises(), SPEC)
    with pytest.raises(SlothError, match=r"no timestep.*at\(progress\)"):
        wrapped(torch.zeros(1, 4, 8, 8))


class Denoises(nn.Module):
    """Without a timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Owner(0)

    def forward(self, latent):
        return self.attention(latent)


def test_a_noise_schedule_that_is_not_known():
    spec = SlothfulAttention(schedule=StepDecay())
    patched = sloth_fx.transform(Denoises(), spec)
    latent = torch.zeros(1, 4, 8, 8)
    context = sloth_fx.context(patched)
    context.at(0.4, sigma=2.0)
    patched(latent)
    with pytest.raises(SlothError, match=r"sigma.*noise schedule"):
        context.at(0.4)
    with pytest.raises(SlothError, match=r"sigma.*noise schedule"):
        context.step(2, 5)


@pytest.mark.parametrize("change", ["set_attn_processor", "fuse_qkv_projections", "set_attention_slice"])
def test_a_processor_exchanged_after_the_transform(change):
    patched = sloth_fx.transform(models.one_level(), SPEC)
    values = models.inputs(patched)
    models.run(patched, values)
    arguments = {"set_attn_processor": (AttnProcessor(),), "set_attention_slice": ("max",)}.get(change, ())
    getattr(patched, change)(*arguments)
    with pytest.raises(SlothError, match=r"processor of this Attention was a AttnProcessor2_0 .* transform it again"):
        models.run(patched, values)


def test_inspect_of_a_patched_model():
    patched = sloth_fx.transform(models.one_level(), SPEC)
    with pytest.raises(SlothError, match="patched already"):
        sloth_fx.inspect(patched)


def test_a_part_that_is_compiled_already():
    model = models.one_level()
    model.mid_block = torch.compile(model.mid_block, backend="eager")
    says(refused(model), "compiled already")


def test_a_model_that_cannot_be_copied():
    model = models.one_level()
    model.lock = threading.Lock()
    with pytest.raises(SlothError, match="UNet2DConditionModel cannot be copied: TypeError"):
        sloth_fx.transform(model, SPEC)


def test_a_schedule_that_fails_does_so_before_anything_is_bound():
    class Failing:
        clock = "progress"

        def ratio(self, moment):
            return 2.0

    says(refused(models.one_level(), SlothfulAttention(schedule=Failing())), "Failing", "ratio")
