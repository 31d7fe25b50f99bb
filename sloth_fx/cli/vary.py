"""What ``--vary`` says: which field of a spec takes which values."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import typer

from sloth_fx.checks import unknown
from sloth_fx.errors import SlothError
from sloth_fx.schedule import SCHEDULES
from sloth_fx.spec import Spec

_COMMA = re.compile(r",(?![^\[({]*[\])}])")  # but not within brackets
_WORDS = {"true": True, "false": False, "none": None, "null": None}


@dataclass(frozen=True)
class Variation:
    """``field`` as it was given, and each of ``values`` as it was written."""

    field: str
    values: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Variation:
        """Of ``field=value,value,...``; commas within brackets are part of a value. Raises a usage error."""
        field, equals, values = text.partition("=")
        found = tuple(value.strip() for value in _COMMA.split(values))
        if not field.strip() or not equals or "" in found:
            raise typer.BadParameter(f"{text!r} is not FIELD=VALUE,VALUE,... such as rate=1,2,4", param_hint="--vary")
        if len(set(found)) < len(found):
            raise typer.BadParameter(f"{text!r} has a value twice", param_hint="--vary")
        return cls(field.strip(), found)

    def apply(self, specs: Sequence[Spec], value: str) -> list[Spec]:
        """The specs with ``field`` set to ``value`` wherever they have it.

        A field is one of a spec, or of a part of it (``out.rate``, ``schedule.time_decay``); a bare name stands for all
        that have it (``rate``: that of ``in_`` and of ``out``); the name of the spec may come first
        (``HyperTile.seed``). Raises :class:`SlothError` for an unknown field, naming the nearest, and for a value that
        the field refuses.
        """
        known = list(dict.fromkeys(name for spec in specs for name in _names(spec)))
        found = [[path for path in _paths(spec) if self.field in _spellings(spec, path)] for spec in specs]
        if not any(found):
            raise SlothError(f"--vary: field {unknown(self.field, known)}")
        read = _read(value, self.field.rpartition(".")[2])
        try:
            return [_with(spec, paths, read) for spec, paths in zip(specs, found, strict=True)]
        except SlothError as error:
            raise SlothError(f"--vary {self.field}={value}: {error}") from None


def _names(spec: Spec) -> Iterator[str]:
    for path in _paths(spec):
        yield ".".join(path)
        if len(path) > 1:
            yield path[-1]


def _paths(spec: Spec) -> list[tuple[str, ...]]:
    """The fields of a spec and of its parts."""
    found: list[tuple[str, ...]] = []
    for each in fields(spec):
        found.append((each.name,))
        part = getattr(spec, each.name)
        if is_dataclass(part):
            found += [(each.name, inner.name) for inner in fields(part)]
    return found


def _spellings(spec: Spec, path: tuple[str, ...]) -> tuple[str, ...]:
    full = ".".join(path)
    return full, path[-1], f"{type(spec).__name__}.{full}", f"{type(spec).__name__}.{path[-1]}"


def _with(spec: Spec, paths: Sequence[tuple[str, ...]], value: Any) -> Spec:
    for first, *rest in paths:
        part = getattr(spec, first)
        changed: dict[str, Any] = {first: replace(part, **{rest[0]: value}) if rest else value}
        spec = replace(spec, **changed)
    return spec


def _read(value: str, field: str) -> Any:
    """A number, a tuple, a dict, a word such as true or none, a schedule by its name, or else text as it is."""
    if field == "schedule" and value in SCHEDULES:
        return SCHEDULES[value]()
    if value.lower() in _WORDS:
        return _WORDS[value.lower()]
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return value
