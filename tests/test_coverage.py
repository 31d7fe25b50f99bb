"""The coverage table: which classes have a row, and what stands in it."""

import copy
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks import coverage, coverage_cases
from benchmarks.coverage_cases import DEAR, FAILS, NOT_APPLICABLE, WORKS, Measured, Outcome, Subject, measure, subjects
from tests.zoo.registry import MODELS

diffusers = pytest.importorskip("diffusers")
FOUND, EXCLUDED = coverage.denoisers()


class Tomorrow(diffusers.ModelMixin, diffusers.ConfigMixin):
    """A class as diffusers may add it."""

    @diffusers.configuration_utils.register_to_config
    def __init__(self, channels=4):
        super().__init__()

    def forward(self, latent, noise_sigma):
        return latent * noise_sigma


class Several(diffusers.ModelMixin, diffusers.ConfigMixin):
    def __init__(self, denoisers):
        super().__init__()

    def forward(self, latent, timestep):
        return latent


class Decoder(Tomorrow):
    def forward(self, latent):
        return latent


def test_every_model_of_diffusers_has_a_row_or_a_reason():
    models = {
        name
        for name in dir(diffusers)
        if isinstance(each := getattr(diffusers, name), type) and issubclass(each, diffusers.ModelMixin)
    }
    assert models - {"ModelMixin"} == FOUND.keys() | EXCLUDED.keys()
    assert not FOUND.keys() & EXCLUDED.keys()
    assert {"UNet2DConditionModel", "ControlNetModel", "SparseControlNetModel", "UVit2DModel"} <= FOUND.keys()
    assert {"AutoencoderKL", "T2IAdapter", "MotionAdapter", "QwenImageMultiControlNetModel"} <= EXCLUDED.keys()


def test_what_a_denoiser_is_follows_from_the_class(monkeypatch):
    assert coverage.why_no_denoiser(Tomorrow) is None
    assert "timestep" in coverage.why_no_denoiser(Decoder)
    assert "several models" in coverage.why_no_denoiser(Several)
    monkeypatch.setattr(diffusers, "Tomorrow", Tomorrow, raising=False)
    assert "Tomorrow" in coverage.denoisers()[0]


def test_every_tiny_build_of_an_exported_class_is_measured():
    measured = {subject.name for subject in subjects(FOUND)}
    assert {name for name in MODELS if hasattr(diffusers, name.partition("/")[0])} <= measured
    assert {subject.class_name for subject in subjects(FOUND)} == FOUND.keys()


def outcomes(name):
    measured = measure(Subject(name))
    return measured, {column: outcome.mark for column, outcome in measured.outcomes.items()}


def test_a_unet():
    measured, marks = outcomes("UNet2DModel")
    assert measured.sites["self"] == len(MODELS["UNet2DModel"].expected)
    refused = dict.fromkeys(("text K/V", "NAG", "SLG"), NOT_APPLICABLE)
    assert marks == dict.fromkeys(coverage.COLUMNS, WORKS) | refused
    assert "(it has: self)" in measured.outcomes["NAG"].note


def test_what_has_to_be_called_twice():
    measured, marks = outcomes("LuminaNextDiT2DModel")
    assert marks["PAG"] == DEAR
    assert "rows along axis 0" in measured.outcomes["PAG"].note
    assert marks["HyperTile"] == WORKS


def test_a_dit():
    measured, marks = outcomes("PixArtTransformer2DModel")
    assert measured.sites == {"self": 2, "cross": 2}
    assert marks == dict.fromkeys(coverage.COLUMNS, WORKS)


class Broken(nn.Module):
    def forward(self, latent, timestep):
        raise RuntimeError("at 0x7f00ab\nand more")


class Unbuilt(nn.Module):
    def __init__(self, config):
        raise AssertionError


@pytest.mark.parametrize(("cls", "mark", "why"), [(Broken, FAILS, "not known"), (Unbuilt, NOT_APPLICABLE, "TypeError")])
def test_what_goes_wrong_is_told(monkeypatch, cls, mark, why):
    monkeypatch.setattr(diffusers, cls.__name__, cls, raising=False)
    measured, marks = outcomes(cls.__name__)
    assert marks == dict.fromkeys(coverage.COLUMNS, mark)
    assert not measured.sites
    assert all(why in outcome.note for column, outcome in measured.outcomes.items() if column != "inputs")


def test_a_model_that_needs_what_is_not_installed(monkeypatch):
    name = "CosmosControlNetModel"
    monkeypatch.delattr(sys.modules[getattr(diffusers, name).__module__], "transforms", raising=False)  # torchvision's
    measured, marks = outcomes(name)
    assert marks == dict.fromkeys(coverage.COLUMNS, NOT_APPLICABLE)
    assert "'transforms' is not defined" in measured.outcomes["inputs"].note


@pytest.mark.parametrize(
    ("transform", "why"),
    [
        (lambda model: copy.deepcopy(model), "nothing changes"),
        (lambda model: filled(copy.deepcopy(model), math.nan), "not finite"),
        (lambda model: filled(model, 1.0), "the original changed"),
    ],
)
def test_an_operator_that_fails_is_told(monkeypatch, transform, why):
    monkeypatch.setattr(coverage_cases.sloth_fx, "transform", lambda model, spec, **_: transform(model))
    monkeypatch.setattr(coverage_cases.sloth_fx, "context", lambda patched: SimpleNamespace(at=lambda progress: None))
    measured, marks = outcomes("PixArtTransformer2DModel")
    assert marks["HyperTile"] == FAILS
    assert why in measured.outcomes["HyperTile"].note
    assert marks["graph"] == WORKS


def filled(model, value):
    with torch.no_grad():
        next(model.parameters()).fill_(value)
    return model


def test_a_page():
    """Builds of a class share a row, notes are numbered once, and a failure is counted."""
    rest = {column: Outcome(WORKS) for column in coverage.COLUMNS}
    rows = [
        Measured(Subject("UNet2DModel"), outcomes=rest),
        Measured(Subject("UNet2DModel"), outcomes=rest | {"graph": Outcome(FAILS, "why")}),
        Measured(
            Subject("Tomorrow"),
            outcomes=rest | {"graph": Outcome(FAILS, "why"), "located": Outcome(NOT_APPLICABLE, "as")},
        ),
    ]
    page = coverage.page(rows, {"Decoder": "takes no timestep"})
    one, other = (line for line in page.splitlines() if line.startswith(("| UNet2DModel", "| Tomorrow")))
    assert "UNet2DModel (2 builds)" in one
    assert "✓ ✗¹" in one
    assert "Tomorrow †" in other
    assert f"{NOT_APPLICABLE}²" in other
    assert "✗¹" in other
    assert "¹ why" in page
    assert "² as" in page
    assert "2 classes in 3 builds" in page
    assert "with any ✗: 2" in page
    assert "Takes no timestep: Decoder." in page
