"""What the library can do with each denoiser that diffusers exports, as a table in docs/coverage.md.

    python -m benchmarks.coverage                                # all: 8 minutes on two cores
    python -m benchmarks.coverage --only PixArtTransformer2DModel UNet2DModel    # a table on the terminal

A denoiser is a model that takes a timestep. The classes are found in diffusers itself, so that new ones appear. Those
of which tests/zoo has tiny builds are run; any other is built on ``meta``, from its default config, and is not run.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import multiprocessing
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from itertools import groupby

import torch
from torch import nn
from tqdm import tqdm

from benchmarks.common import ROOT, Table
from benchmarks.coverage_cases import COLUMNS, DEAR, FAILS, NOT_APPLICABLE, WORKS, Measured, Outcome, measure, subjects
from tests.zoo.registry import MODELS

PAGE = ROOT / "docs" / "coverage.md"
KINDS = ("self", "joint", "cross", "temporal", "linear")


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
    if not hasattr(model.__init__, "__wrapped__"):  # diffusers wraps constructors whose arguments are the config
        return "has no config: it holds several models, each of which has a row of its own"
    return None


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
            _head(),
            _totals(rows),
            str(table),
            "\n".join(f"{number} {note}  " for note, number in footnotes.items()).rstrip(),
            "## What is no denoiser",
            *(f"{reason[0].upper()}{reason[1:]}: {', '.join(names)}." for reason, names in reasons.items()),
        )
    )


def _head() -> str:
    versions = {name: metadata.version(name) for name in ("torch", "diffusers")}
    return _HEAD.format(**versions, works=WORKS, dear=DEAR, na=NOT_APPLICABLE, fails=FAILS)


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
        return sum(all(each.outcomes[column].mark in (WORKS, DEAR) for each in row) for row in rows)

    failing = sum(any(outcome.mark == FAILS for each in row for outcome in each.outcomes.values()) for row in rows)
    builds = sum(len(row) for row in rows)
    counts = ", ".join(f"{column} {works(column)}" for column in COLUMNS)
    return (
        f"**{len(rows)} classes in {builds} builds. Classes with {WORKS} or {DEAR} for all builds: {counts}. "
        f"Classes with any {FAILS}: {failing}.**"
    )


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
- operators and guidance: the patched model runs, its output is finite and not the original's, and the original is as it
  was. NAG has noise for a negative text; SLG leaves out the last block.

{works} works; {dear} works, at the price of a second call; {na} does not apply, or is refused; {fails} fails. Footnotes
tell why."""


# The program


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", nargs="+", metavar="NAME", help="classes; the table is printed, not written")
    options.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    options.add_argument("--trace", action="store_true", help="print the traceback of every failure")
    chosen = options.parse_args()
    _prepare(chosen.trace)
    found, excluded = denoisers()
    unknown = sorted(set(chosen.only or ()) - set(found))
    if unknown:
        options.error(f"{', '.join(unknown)}: no denoisers of diffusers; these are: {', '.join(found)}")
    todo = subjects(name for name in found if name in (chosen.only or found))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(chosen.jobs, mp_context=context, initializer=_prepare, initargs=(chosen.trace,)) as pool:
        measured = list(tqdm(pool.map(measure, todo), total=len(todo), unit="model"))
    text = page(measured, excluded)
    if chosen.only:
        print(text)
    else:
        PAGE.write_text(f"{text}\n", encoding="utf-8")


def _prepare(trace: bool) -> None:
    """One thread per process, and none of the warnings of hosts."""
    from diffusers.utils import logging as hosts

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    hosts.set_verbosity_error()
    logging.basicConfig(format="%(message)s")
    logging.getLogger(measure.__module__).setLevel(logging.DEBUG if trace else logging.WARNING)


if __name__ == "__main__":
    main()
