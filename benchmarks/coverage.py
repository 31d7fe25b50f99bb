"""What the library can do with each denoiser that diffusers exports, as a table in docs/coverage.md.

    python -m benchmarks.coverage                                # all: under 6 minutes on two quiet cores
    python -m benchmarks.coverage --only PixArtTransformer2DModel UNet2DModel    # a table on the terminal

A denoiser is a model that takes a timestep. The classes are found in diffusers itself, so that new ones appear. Those
of which tests/zoo has tiny builds are run; any other is built on ``meta``, from its default config, and is not run.
"""

from __future__ import annotations

import argparse
import inspect
import multiprocessing
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import sloth_fx
from benchmarks.common import ROOT, Table
from sloth_fx import Constant, HyperTile, NearSightedAttention, NearSightedTile, Reduction, SlothfulAttention, SlothError
from sloth_fx import TokenDownsample, TokenMerging
from sloth_fx.analysis import text_kv, whole_graph
from sloth_fx.capture import capture
from sloth_fx.locate import Survey, survey
from sloth_fx.model_adapters import Arguments, adapter_for, trial_call
from sloth_fx.passes.canonicalise import canonicalise
from sloth_fx.passes.core import attention_cores
from sloth_fx.planner import make_plan
from tests.zoo.registry import MODELS, run

PAGE = ROOT / "docs" / "coverage.md"
WORKS, NOT_APPLICABLE, FAILS = "✓", "–", "✗"
EARLY = 0.25  # progress

# Strong enough to act on grids of 9 x 11 tokens, and everywhere.
_QUARTER = Reduction(rate=4, depth_decay=0, k_blend=1, v_blend=1, temporal=2)
SPECS = (
    SlothfulAttention(in_=_QUARTER, out=_QUARTER, schedule=Constant(), keep_middle=False),
    NearSightedTile(tile_size=3, max_depth=8),
    NearSightedAttention(
        base_tile_size=3, peak_tile_size=3, max_depth=8, in_=_QUARTER, out=_QUARTER, schedule=Constant()
    ),
    TokenDownsample(factors=(2, 2, 2)),
    HyperTile(tile_size=32, max_depth=7, scale_depth=False),
    TokenMerging(max_depth=7),
)
STEPS = ("inputs", "located", "captured", "graph", "text K/V")
COLUMNS = (*STEPS, *(type(spec).__name__ for spec in SPECS))


# What there is


def denoisers() -> tuple[dict[str, type[nn.Module]], dict[str, str]]:
    """The denoisers that diffusers exports, by name, and for every other model of it why it is none."""
    import diffusers

    exported = {name: getattr(diffusers, name) for name in sorted(dir(diffusers))}
    reasons = {
        name: why_no_denoiser(each)
        for name, each in exported.items()
        if isinstance(each, type) and issubclass(each, diffusers.ModelMixin) and each is not diffusers.ModelMixin
    }
    found = {name: exported[name] for name, reason in reasons.items() if reason is None}
    return found, {name: reason for name, reason in reasons.items() if reason is not None}


def why_no_denoiser(model: type[nn.Module]) -> str | None:
    """``None`` for a denoiser: it is told how much noise there is, and can be built from a config of its own."""
    if model.__name__ in {name.partition("/")[0] for name in MODELS}:
        return None
    parameters = inspect.signature(model.forward).parameters
    if not any("time" in name or "sigma" in name or name == "t" for name in parameters):
        return "takes no timestep"
    if not hasattr(model, "config_name") or model.config_name is None:
        return "has no config: it holds several models, each of which has a row of its own"
    return None


@dataclass(frozen=True)
class Subject:
    """One model to look at: a tiny build of the zoo (``name`` as there), or a class with its default config."""

    name: str

    @property
    def class_name(self) -> str:
        return self.name.partition("/")[0]

    @property
    def tiny(self) -> bool:
        return self.name in MODELS

    def build(self) -> nn.Module:
        import diffusers

        if self.tiny:
            return MODELS[self.name].build()
        with torch.device("meta"):
            model: nn.Module = getattr(diffusers, self.name)()
        return model.eval()

    def call(self, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs), always the same."""
        if self.tiny:
            return (), MODELS[self.name].inputs()
        made = trial_call(model, adapter_for(model))
        if made is None:
            raise SlothError("its inputs are not known")
        return made


def subjects(classes: Iterable[str]) -> list[Subject]:
    """The tiny builds of each class, or the class."""
    by_class: dict[str, list[Subject]] = {}
    for name in MODELS:
        by_class.setdefault(name.partition("/")[0], []).append(Subject(name))
    return [each for name in classes for each in by_class.get(name, [Subject(name)])]


# What it comes to


@dataclass(frozen=True)
class Outcome:
    """``mark`` is one of the three, or "n/m"; ``note`` goes to the footnotes."""

    mark: str
    note: str = ""


@dataclass
class Measured:
    """The outcomes for one subject by column, and its sites by kind."""

    subject: Subject
    sites: Counter[str] = field(default_factory=Counter)
    outcomes: dict[str, Outcome] = field(default_factory=dict)


def measure(subject: Subject) -> Measured:
    """Every column of one subject."""
    _prepare()
    measured = Measured(subject)
    outcomes = measured.outcomes
    try:
        model = subject.build()
    except Exception as error:
        outcomes.update({name: Outcome(FAILS, f"cannot be built: {_first_line(error)}") for name in COLUMNS})
        return measured
    outcomes["inputs"] = _tried(lambda: _inputs_are_made(model))
    try:
        call = subject.call(model)
        found = survey(model, adapter_for(model), call)
    except Exception as error:
        outcomes.update({name: _failure(error) for name in COLUMNS if name not in outcomes})
        return measured
    measured.sites = Counter(site.kind for site in found.sites)
    outcomes["located"] = _located(subject, found)
    outcomes["captured"] = _tried(lambda: _captured(found))
    outcomes.update(_whole(model, subject, call, found))
    for spec in SPECS:
        outcomes[type(spec).__name__] = _tried(lambda spec=spec: _transformed(model, subject, call, found, spec))
    return measured


def _prepare() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    from diffusers.utils import logging

    logging.set_verbosity_error()


def _inputs_are_made(model: nn.Module) -> Outcome:
    sloth_fx.inspect(model)
    return Outcome(WORKS)


def _located(subject: Subject, found: Survey) -> Outcome:
    """Against the attentions that a tiny build is known to compute."""
    seen = sum(site.kind != "linear" for site in found.sites)
    known = len(MODELS[subject.name].expected) if subject.tiny else seen
    return Outcome(WORKS) if seen == known else Outcome(FAILS, f"finds {seen} of {known} attentions")


def _captured(found: Survey) -> Outcome:
    """Whether every softmax attention is a core in the graph of its owner."""
    linear = {site.path for site in found.sites if site.kind == "linear"}
    if all(site.kind == "linear" for site in found.sites):
        return Outcome(NOT_APPLICABLE, "linear attention only")
    owners = {structure: path for path, structure in reversed(found.structure.items()) if path not in linear}
    for structure, path in owners.items():
        owner = found.skeleton.model.get_submodule(path)
        resized = found.resized.get(structure, [])
        for index, visit in enumerate(found.visits[path]):
            graph = capture(found.skeleton, owner, visit.call, resized[index].call if index < len(resized) else None).graph
            canonicalise(graph)
            cores = len(attention_cores(graph))
            if cores != visit.attentions:
                return Outcome(FAILS, f"{cores} of {visit.attentions} attentions of {type(owner).__name__} recognised")
    return Outcome(WORKS)


def _whole(
    model: nn.Module, subject: Subject, call: tuple[tuple[Any, ...], dict[str, Any]], found: Survey
) -> dict[str, Outcome]:
    """The graph of the whole model, and in it the slice from the text to keys and values."""
    softmax = [site for site in found.sites if site.kind != "linear"]
    try:
        whole = whole_graph(model, *call[0], **call[1])
        cores = len(attention_cores(whole.graph))
        if cores != len(softmax):
            raise SlothError(f"{cores} of {len(softmax)} attentions recognised")
        if subject.tiny and not _same(list(_run(whole, model, call)), run(model, call[1])):
            raise SlothError("it computes something else")
    except Exception as error:
        return {"graph": _failure(error), "text K/V": Outcome(FAILS, "there is no graph of the whole model")}
    return {"graph": Outcome(WORKS), "text K/V": _tried(lambda: _text(model, call, whole, softmax))}
