"""What one denoiser comes to: its attentions found, captured, sliced, and changed by each operator."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import sloth_fx
from benchmarks import coverage_guidance
from sloth_fx import (
    AttentionSite,
    Constant,
    HyperTile,
    NearSightedAttention,
    NearSightedTile,
    Reduction,
    SlothError,
    SlothfulAttention,
    TokenDownsample,
    TokenMerging,
)
from sloth_fx.analysis import WholeGraph, text_kv, whole_graph
from sloth_fx.capture import capture
from sloth_fx.capture.call import labelled_tensors
from sloth_fx.capture.skeleton import Skeleton
from sloth_fx.locate import Survey, survey
from sloth_fx.model_adapters import Arguments, adapter_for, trial_call
from sloth_fx.passes.canonicalise import canonicalise
from sloth_fx.passes.core import attention_cores
from sloth_fx.planner import make_plan
from sloth_fx.spec import Spec
from tests.zoo.recipe import Inputs
from tests.zoo.registry import MODELS, run

WORKS, DEAR, NOT_APPLICABLE, FAILS = "✓", "2", "\N{EN DASH}", "✗"
EARLY = 0.25  # progress
_LOG = logging.getLogger(__name__)

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
COLUMNS = (*STEPS, *(type(spec).__name__ for spec in SPECS), *coverage_guidance.COLUMNS)


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

    def inputs(self, model: nn.Module) -> Inputs:
        """Arguments by keyword; for a class without a tiny build those that the library makes."""
        if self.tiny:
            return MODELS[self.name].inputs()
        made = trial_call(model, adapter_for(model))
        if made is None:
            raise SlothError("what inputs it takes is not known")
        return made[1]


def subjects(classes: Iterable[str]) -> list[Subject]:
    """The tiny builds of each class, or the class."""
    builds: dict[str, list[Subject]] = {}
    for name in MODELS:
        builds.setdefault(name.partition("/")[0], []).append(Subject(name))
    return [each for name in classes for each in builds.get(name, [Subject(name)])]


@dataclass(frozen=True)
class Outcome:
    """``note`` is for a footnote: why not."""

    mark: str
    note: str = ""


@dataclass
class Measured:
    """What came of one subject, by column, and its sites by kind."""

    subject: Subject
    sites: Counter[str] = field(default_factory=Counter)
    outcomes: dict[str, Outcome] = field(default_factory=dict)


def measure(subject: Subject) -> Measured:
    """Try everything on one subject."""
    try:
        model = subject.build()
    except Exception as error:
        why = f"not tried, as the default config builds no model: {_failure(subject.name, error).note}"
        return Measured(subject, outcomes=dict.fromkeys(COLUMNS, Outcome(NOT_APPLICABLE, why)))
    outcomes = {"inputs": _tried(f"{subject.name}, inputs", _made_inputs, model)}
    try:
        case = _Case(subject, model)
    except Exception as error:
        if missing := _missing(subject, model):
            why = f"not tried, as the model itself does not run without what is not installed here: {missing}"
            return Measured(subject, outcomes=dict.fromkeys(COLUMNS, Outcome(NOT_APPLICABLE, why)))
        return Measured(subject, outcomes=dict.fromkeys(COLUMNS, _failure(subject.name, error)) | outcomes)
    attempts: dict[str, Callable[[], Outcome]] = {
        "located": case.located,
        "captured": case.captured,
        "graph": case.graph,
        "text K/V": case.text_kv,
        **{type(spec).__name__: partial(case.transformed, spec) for spec in SPECS},
        **{column: partial(case.guided, column) for column in coverage_guidance.COLUMNS},
    }
    outcomes |= {column: _tried(f"{subject.name}, {column}", attempt) for column, attempt in attempts.items()}
    return Measured(subject, Counter(site.kind for site in case.found.sites), outcomes)


def _missing(subject: Subject, model: nn.Module) -> str:
    """The error of a model that does not run as it is either, because a package is not there, such as torchvision."""
    try:
        skeleton = Skeleton(model)
        inputs = skeleton.fake_inputs(subject.inputs(model))
        with skeleton.running():
            skeleton.model(**inputs)
    except (NameError, ImportError) as error:
        return f"{type(error).__name__}: {error}"
    except Exception:  # of which the table tells elsewhere
        return ""
    return ""


def _tried(what: str, attempt: Callable[..., Outcome], *arguments: Any) -> Outcome:
    try:
        return attempt(*arguments)
    except Exception as error:  # of whatever kind: the table tells
        return _failure(what, error)


def _failure(what: str, error: Exception) -> Outcome:
    _LOG.debug("%s", what, exc_info=error)
    while isinstance(error, SlothError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    lines = str(error).strip().splitlines() or ["no message"]
    kind = "" if isinstance(error, SlothError) else f"{type(error).__name__}: "
    message = re.sub(r"0x[0-9a-f]+|(?<=attention_)\d+", "...", lines[0])  # differs from run to run
    message = re.sub(r"^[a-z_]+(\.\w+)*(\[\d+\])?: ", "", message)  # where in the model
    return Outcome(FAILS, f"{kind}{message:.200}")


def _made_inputs(model: nn.Module) -> Outcome:
    sloth_fx.inspect(model)
    return Outcome(WORKS)


class _Case:
    """A model with its inputs, of which attentions are found."""

    def __init__(self, subject: Subject, model: nn.Module) -> None:
        self.subject, self.model = subject, model
        self.inputs = subject.inputs(model)
        self.before = run(model, self.inputs) if subject.tiny else []
        self.found: Survey = survey(model, adapter_for(model), ((), self.inputs))
        self.attentions = [site for site in self.found.sites if site.kind != "linear"]
        self.whole: WholeGraph | None = None

    def located(self) -> Outcome:
        """Against the attentions that a tiny build is known to compute."""
        known = len(MODELS[self.subject.name].expected) if self.subject.tiny else len(self.attentions)
        if len(self.attentions) != known:
            return Outcome(FAILS, f"{len(self.attentions)} of {known} attentions found")
        return Outcome(WORKS)

    def captured(self) -> Outcome:
        """Whether the graphs of all owners have as many cores as there are attentions."""
        if not self.attentions:
            return Outcome(NOT_APPLICABLE, "all its attention is linear")
        counts = Counter(site.path for site in self.attentions)
        owners = {structure: path for path, structure in self.found.structure.items() if path in counts}
        for structure, path in owners.items():
            owner = self.found.skeleton.model.get_submodule(path)
            visits, resized = self.found.visits[path], self.found.resized.get(structure, [])
            cores = 0
            for visit, again in zip_longest(visits, resized[: len(visits)]):
                captured = capture(self.found.skeleton, owner, visit.call, again.call if again is not None else None)
                canonicalise(captured.graph)
                cores += len(attention_cores(captured.graph))
            if cores != counts[path]:
                return Outcome(FAILS, f"{cores} of {counts[path]} attentions of {type(owner).__name__} recognised")
        return Outcome(WORKS)

    def graph(self) -> Outcome:
        """Whether the whole model is one graph, with all attentions, that computes the same."""
        whole = whole_graph(self.model, **self.inputs)
        cores = len(attention_cores(whole.graph))
        if cores != len(self.attentions):
            return Outcome(FAILS, f"{cores} of {len(self.attentions)} attentions recognised in the whole graph")
        if self.subject.tiny:
            with torch.no_grad():
                out = [each for each in tree_leaves(whole(self.model, **self.inputs)) if isinstance(each, Tensor)]
            if not all(torch.allclose(*pair, atol=1e-4) for pair in zip(out, self.before, strict=True)):
                return Outcome(FAILS, "the whole graph computes something else")
        self.whole = whole
        return Outcome(WORKS)

    def text_kv(self) -> Outcome:
        """Whether the keys and values of all attention to text alone are had from the text."""
        if self.whole is None:
            return Outcome(NOT_APPLICABLE, "no graph of the whole model")
        text = Arguments(self.model, adapter_for(self.model)).text((), self.inputs).values()
        labelled = labelled_tensors(self.model.forward, (), self.inputs)
        names = [name for name, tensor in labelled if any(tensor is each for each in text) or "mask" in name]
        if not names:
            return Outcome(NOT_APPLICABLE, "no text among its inputs")
        to_text = [i for i, site in enumerate(self.attentions) if site.kind == "cross" and site.text is not None]
        if not to_text:
            return Outcome(NOT_APPLICABLE, "no attention to text alone")
        found = text_kv(self.whole, names)
        missing = [i for i in to_text if i not in found.cores]
        if not missing:
            return Outcome(WORKS)
        share = "" if len(missing) == len(to_text) else f"{len(missing)} of {len(to_text)}: "
        return Outcome(NOT_APPLICABLE, share + found.reasons[missing[0]])

    def transformed(self, spec: Spec) -> Outcome:
        """Whether the operator changes what the model computes, and leaves the model as it is."""
        try:
            make_plan([spec], self.found.sites)
        except SlothError as refusal:
            return Outcome(NOT_APPLICABLE, _why_nowhere(self.found.sites, refusal))
        patched = sloth_fx.transform(self.model, spec, example_inputs=self.inputs)
        sloth_fx.context(patched).at(EARLY)
        return self._changed(patched)

    def guided(self, column: str) -> Outcome:
        """Whether guidance changes what the model computes, and leaves the model as it is; what is refused does not
        apply."""
        try:
            spec = coverage_guidance.spec_for(column, self.found.sites)
            patched = sloth_fx.transform(self.model, spec, example_inputs=self.inputs)
        except SlothError as refusal:
            return Outcome(NOT_APPLICABLE, _failure(f"{self.subject.name}, {column}", refusal).note)
        outcome = self._steered(column, patched)
        reason = coverage_guidance.why_dear(sloth_fx.report(patched))
        return Outcome(DEAR, reason) if reason and outcome.mark == WORKS else outcome

    def _steered(self, column: str, patched: nn.Module) -> Outcome:
        """What comes of the first negative text that the model can be guided by, or of no such text."""
        if not self.subject.tiny:
            return Outcome(WORKS)
        refusals = []
        for negative in coverage_guidance.negatives(patched, self.model, self.inputs):
            coverage_guidance.steer(patched, negative, EARLY)
            try:
                return self._changed(patched)
            except SlothError as refusal:
                refusals.append(Outcome(NOT_APPLICABLE, _failure(f"{self.subject.name}, {column}", refusal).note))
        return refusals[0]

    def _changed(self, patched: nn.Module) -> Outcome:
        """Whether a patched model, where there is data, computes something else than the original."""
        if not self.subject.tiny:
            return Outcome(WORKS)
        after, original = run(patched, self.inputs), run(self.model, self.inputs)
        if not all(map(torch.equal, original, self.before)):
            return Outcome(FAILS, "the original changed")
        if not all(each.isfinite().all() for each in after):
            return Outcome(FAILS, "the output is not finite")
        if all(map(torch.equal, after, self.before)):
            return Outcome(FAILS, "nothing changes")
        return Outcome(WORKS)


def _why_nowhere(sites: Sequence[AttentionSite], refusal: SlothError) -> str:
    images = [site for site in sites if site.on_image]
    if not images:
        return "no softmax attention of image tokens to image tokens"
    if all(site.kind == "temporal" for site in images):
        return "attention over frames only, which have no rows and columns"
    if all(site.grid is None or site.kind == "temporal" for site in images):
        return "its tokens have no known grid"
    return str(refusal).partition(": ")[2]
