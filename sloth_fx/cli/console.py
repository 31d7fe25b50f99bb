"""Where commands write: results to stdout, errors and progress to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

_NO_LIMIT = 10_000  # columns: what is read by a program is not wrapped


def out() -> Console:
    """The console for results. Where stdout is no terminal, there are no colours and lines are as long as need be."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _NO_LIMIT)


def complain(message: str) -> None:
    """Print an error in one line, in red where stderr is a terminal."""
    line = " ".join(message.split())
    Console(stderr=True, highlight=False).print(f"error: {line}", style="red", soft_wrap=True, markup=False)


def say(message: str) -> None:
    """Print a line, as it is."""
    out().print(message, soft_wrap=True, markup=False)


def say_json(data: Any) -> None:
    """Print JSON, for programs: never coloured or wrapped."""
    typer.echo(json.dumps(data, indent=2))


def table(*columns: str, numbers: str = "") -> Table:
    """A plain table. ``numbers`` has a letter for each column: "r" aligns it to the right."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for index, name in enumerate(columns):
        right = index < len(numbers) and numbers[index] == "r"
        made.add_column(name, justify="right" if right else "left", overflow="fold")
    return made


def add_row(rows: Table, *cells: object) -> None:
    """Add a row of plain text: what models and specs are called may look like markup."""
    rows.add_row(*(Text(str(cell)) for cell in cells))


@contextmanager
def progress(total: int) -> Iterator[Progress]:
    """A bar on stderr, which is not there where stderr is no terminal; advance its task 0."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        bar.add_task("", total=total)
        yield bar
