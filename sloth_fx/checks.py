"""The checks that every spec shares: what a parameter accepts, in words and as a predicate."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any, NamedTuple, TypeAlias

from sloth_fx.errors import SlothError


class Accepts(NamedTuple):
    """What a parameter accepts: in words, for the error message, and as a predicate.

    ``range`` of a number, and whether it is ``whole``, and ``choices`` of text are for whoever shows a parameter.
    """

    words: str
    holds: Callable[[Any], bool]
    range: tuple[float, float] | None = None
    whole: bool = False
    choices: tuple[str, ...] = ()


Limits: TypeAlias = Mapping[str, Accepts]
"""Metadata of a dataclass field, ``{"accepts": Accepts}``."""


def accepting(words: str, holds: Callable[[Any], bool], **shown: Any) -> Limits:
    """Field metadata for a value that `holds` is true of; `shown` are other fields of `Accepts`."""
    return {"accepts": Accepts(words, holds, **shown)}


def between(low: float, high: float, *, whole: bool = False) -> Limits:
    """Field metadata for a number in low..high, both ends included; `whole` asks for an int. A bool is not a number."""
    types = int if whole else (int, float)
    return accepting(
        f"{'a whole number' if whole else 'a number'} from {low:g} to {high:g}",
        lambda value: isinstance(value, types) and not isinstance(value, bool) and low <= value <= high,
        range=(low, high),
        whole=whole,
    )


def one_of(*choices: str) -> Limits:
    """Field metadata for one of a few strings."""
    holds = lambda value: isinstance(value, str) and value in choices  # noqa: E731
    return accepting("one of " + ", ".join(choices), holds, choices=choices)


def or_none(limits: Limits) -> Limits:
    """The same limits, and None."""
    accepts = limits["accepts"]
    return accepting(f"{accepts.words}, or None", lambda value: value is None or accepts.holds(value))


FLAG: Limits = accepting("True or False", lambda value: isinstance(value, bool))


def require(name: str, value: Any, limits: Limits) -> None:
    """Raise a SlothError that names the parameter, its value and what it takes, unless the value is accepted."""
    accepts = limits["accepts"]
    if not accepts.holds(value):
        raise SlothError(f"{name}={value!r:.80} is refused: {name} takes {accepts.words}")


def check_fields(spec: Any) -> None:
    """Check every field of a dataclass that carries limits; the SlothError begins with the name of the class."""
    for each in fields(spec):
        if "accepts" in each.metadata:
            try:
                require(each.name, getattr(spec, each.name), each.metadata)
            except SlothError as error:
                raise SlothError(f"{type(spec).__name__}: {error}") from None


def unknown(name: object, known: Iterable[str]) -> str:
    """'rte' is unknown, nearest: rate (known: rate, mode): the words of an error about a name that is not known."""
    names = list(known)
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    hint = f", nearest: {', '.join(near)}" if near else ""
    return f"{name!r:.80} is unknown{hint} (known: {', '.join(names)})"
