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
import os
import re
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from importlib import metadata
from itertools import groupby, zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import sloth_fx
from benchmarks.common import ROOT, Table
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
from sloth_fx.locate import Survey, survey
from sloth_fx.model_adapters import Arguments, adapter_for, trial_call
from sloth_fx.passes.canonicalise import canonicalise
from sloth_fx.passes.core import attention_cores
from sloth_fx.planner import make_plan
from sloth_fx.spec import Spec
from tests.zoo.recipe import Inputs
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
KINDS = ("self", "joint", "cross", "temporal", "linear")
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


# What it comes to


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
    measured = Measured(subject)
    try:
        model = subject.build()
    except Exception as error:
        return replace(measured, outcomes=dict.fromkeys(COLUMNS, _failure(error, "cannot be built: ")))
    outcomes = {"inputs": _tried(_made_inputs, model)}
    try:
        case = _Case(subject, model, subject.inputs(model))
    except Exception as error:
        return replace(measured, outcomes={**dict.fromkeys(COLUMNS, _failure(error)), **outcomes})
    outcomes |= {"located": _tried(case.located), "captured": _tried(case.captured), "graph": _tried(case.graph)}
    outcomes["text K/V"] = _tried(case.text_kv)
    outcomes |= {type(spec).__name__: _tried(case.transformed, spec) for spec in SPECS}
    return replace(measured, sites=Counter(site.kind for site in case.found.sites), outcomes=outcomes)


def _tried(attempt: Callable[..., Outcome], *arguments: Any) -> Outcome:
    try:
        return attempt(*arguments)
    except Exception as error:  # of whatever kind: the table tells
        return _failure(error)


def _failure(error: Exception, what: str = "") -> Outcome:
    if "--trace" in sys.argv:
        traceback.print_exception(error)
    lines = str(error).strip().splitlines() or ["no message"]
    kind = "" if isinstance(error, SlothError) else f"{type(error).__name__}: "
    message = re.sub(r"0x[0-9a-f]+|(?<=attention_)\d+", "...", lines[0])  # differs from run to run
    message = re.sub(r"^[a-z_]+(\.\w+)*(\[\d+\])?: ", "", message)  # where in the model
    return Outcome(FAILS, f"{what}{kind}{message:.200}")


def _made_inputs(model: nn.Module) -> Outcome:
    sloth_fx.inspect(model)
    return Outcome(WORKS)


class _Case:
    """A model with its inputs, of which attentions are found."""

    def __init__(self, subject: Subject, model: nn.Module, inputs: Inputs) -> None:
        self.subject, self.model, self.inputs = subject, model, inputs
        self.before = run(model, inputs) if subject.tiny else []
        self.found: Survey = survey(model, adapter_for(model), ((), inputs))
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
        names = [name for name, tensor in labelled if any(tensor is each for each in text)]
        if not names:
            return Outcome(NOT_APPLICABLE, "no text among its inputs")
        found = text_kv(self.whole, names)
        missing = [i for i, site in enumerate(self.attentions) if site.kind == "cross" and i in found.reasons]
        if found.cores and not missing:
            return Outcome(WORKS)
        if not any(site.kind == "cross" for site in self.attentions):
            return Outcome(NOT_APPLICABLE, "text shares a sequence with the image")
        return Outcome(NOT_APPLICABLE, ("in part: " if found.cores else "") + found.reasons[missing[0]])

    def transformed(self, spec: Spec) -> Outcome:
        """Whether the operator changes what the model computes, and leaves the model as it is."""
        try:
            make_plan([spec], self.found.sites)
        except SlothError as refusal:
            return Outcome(NOT_APPLICABLE, _why_nowhere(self.found.sites, refusal))
        patched = sloth_fx.transform(self.model, spec, example_inputs=self.inputs)
        if not self.subject.tiny:
            return Outcome(WORKS)
        sloth_fx.context(patched).at(EARLY)
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
    return _failure(refusal).note


# The page


def page(measured: Sequence[Measured], excluded: dict[str, str]) -> str:
    """The whole of docs/coverage.md."""
    footnotes: dict[str, str] = {}
    table = Table("denoiser", "sites", *COLUMNS)
    rows = [list(group) for _, group in groupby(measured, key=lambda each: each.subject.class_name)]
    for row in rows:
        cells = [_cell([each.outcomes[column] for each in row], footnotes) for column in COLUMNS]
        table.rows.append((_label(row), _sites(row), *cells))
    reasons = {reason: [name for name in excluded if excluded[name] == reason] for reason in excluded.values()}
    return "\n\n".join(
        (
            _HEAD.format(torch=metadata.version("torch"), diffusers=metadata.version("diffusers")),
            _totals(rows),
            str(table),
            "\n".join(f"{number} {note}  " for note, number in footnotes.items()).rstrip(),
            "## What is no denoiser",
            *(f"{reason[0].upper()}{reason[1:]}: {', '.join(names)}." for reason, names in reasons.items()),
        )
    )


def _cell(outcomes: Sequence[Outcome], footnotes: dict[str, str]) -> str:
    """Every outcome that the builds of a class have, with the number of its footnote."""
    cells = []
    for outcome in dict.fromkeys(outcomes):
        number = footnotes.setdefault(outcome.note, _superscript(len(footnotes) + 1)) if outcome.note else ""
        cells.append(f"{outcome.mark}{number}")
    return " ".join(cells)


def _superscript(number: int) -> str:
    return str(number).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _label(row: Sequence[Measured]) -> str:
    subject = row[0].subject
    return subject.class_name + ("" if subject.tiny else " †") + (f" ({len(row)} builds)" if len(row) > 1 else "")


def _sites(row: Sequence[Measured]) -> str:
    total = sum((each.sites for each in row), Counter())
    return ", ".join(f"{total[kind]} {kind}" for kind in KINDS if total[kind]) or "none"


def _totals(rows: Sequence[Sequence[Measured]]) -> str:
    def works(column: str) -> int:
        return sum(all(each.outcomes[column].mark == WORKS for each in row) for row in rows)

    failing = sum(any(outcome.mark == FAILS for each in row for outcome in each.outcomes.values()) for row in rows)
    builds = sum(len(row) for row in rows)
    counts = ", ".join(f"{column} {works(column)}" for column in COLUMNS)
    return f"**{len(rows)} classes in {builds} builds. Without exception in all builds: {counts}. Any ✗: {failing}.**"


_HEAD = """# Coverage

Every denoiser class that diffusers {diffusers} exports, with torch {torch}. Made by `python -m benchmarks.coverage`;
do not edit.

A denoiser is a model that takes a timestep, or one of which there is a tiny build nevertheless. Most classes have tiny
builds with random weights (`tests/zoo`, several where options change the attention): batches of 2, grids of 9 x 11
tokens. Where builds of a class differ, a cell lists each outcome. A class with † has none: it has its default config,
lies on `meta` and is transformed, but not run.

- sites: attentions by kind, summed over the builds.
- inputs: `inspect(model)` runs on inputs that the library makes.
- located: as many softmax attentions are found as the tiny build is known to compute.
- captured: the graphs of all owners have as many attentions, cross-attention included.
- graph: the whole model is one graph that computes the same, again with all attentions.
- text K/V: the keys and values of all attention to text alone are computed from the text alone.
- operators: the patched model runs, its output is finite and not the original's, and the original is as it was.

✓ works; – does not apply, for the reason in the footnote; ✗ fails."""


# The program


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", nargs="+", metavar="NAME", help="classes; the table is printed, not written")
    options.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    options.add_argument("--trace", action="store_true", help="print the traceback of every failure")
    chosen = options.parse_args()
    _prepare()
    found, excluded = denoisers()
    unknown = sorted(set(chosen.only or ()) - set(found))
    if unknown:
        options.error(f"{', '.join(unknown)}: no denoisers of diffusers; these are: {', '.join(found)}")
    todo = subjects(name for name in found if name in (chosen.only or found))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(chosen.jobs, mp_context=context, initializer=_prepare) as pool:
        measured = list(tqdm(pool.map(measure, todo), total=len(todo), unit="model"))
    text = page(measured, excluded)
    if chosen.only:
        print(text)
    else:
        PAGE.write_text(f"{text}\n", encoding="utf-8")


def _prepare() -> None:
    """One thread per process, and none of the warnings of hosts."""
    from diffusers.utils import logging

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()


if __name__ == "__main__":
    main()
