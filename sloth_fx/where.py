"""Which attention sites a spec applies to: a selector, checked once, then asked per site."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Protocol, TypeAlias

from sloth_fx.checks import between, unknown
from sloth_fx.errors import SlothError

STAGES = ("in", "middle", "out")
KINDS = ("self", "cross", "joint", "temporal", "linear")
KEYS = ("path", "stage", "kind", "depth")
DEPTH = between(0, 9999)
FORMS = (
    f"a stage ({', '.join(STAGES)}), a kind ({', '.join(KINDS)}), a glob over the path, a depth range (low, high), "
    f"a mapping with any of {', '.join(KEYS)}, a function of the site that returns a bool, or None for every site"
)


class Site(Protocol):
    """What a selector may ask of an attention site."""

    @property
    def path(self) -> str: ...
    @property
    def stage(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def depth(self) -> float: ...


Where: TypeAlias = str | tuple[float, float] | Mapping[str, Any] | Callable[[Any], bool] | None
"""A selector of attention sites.

- ``"in"``, ``"middle"``, ``"out"``: a stage; ``"self"``, ``"cross"``, ``"joint"``, ``"temporal"``,
  ``"linear"``: a kind;
- any other string: a glob over the whole path, as ``fnmatch.fnmatchcase`` reads it (``*`` crosses dots);
- ``(1, 2)``: a depth range, both ends included;
- ``{"path": ..., "stage": ..., "kind": ..., "depth": (1, 2)}``: all of them hold; path, stage and kind may be lists of
  alternatives;
- a function that gets the site and returns a bool;
- ``None``: every site.
"""


def validate(where: Where) -> Where:
    """The selector in its canonical form (lists become tuples, a mapping becomes a dict of its own).

    Raises SlothError, naming what would work, for anything that is not a selector.
    """
    if where is None or callable(where):
        return where
    if isinstance(where, str):
        if not where:
            raise SlothError(f"where='' selects nothing: give {FORMS}")
        return where
    if isinstance(where, Mapping):
        if not where:
            raise SlothError(f"where={{}} has no condition: give one of {', '.join(KEYS)}, or None for every site")
        return {key: _condition(key, value) for key, value in where.items()}
    if isinstance(where, list | tuple):
        return _depths(where)
    raise SlothError(f"where={where!r:.80} is not a selector: give {FORMS}")


def matches(where: Where, site: Site) -> bool:
    """Whether the selector selects the site. SlothError for a bad selector, or a function that returns no bool."""
    where = validate(where)
    if callable(where):
        answer: object = where(site)
        if not isinstance(answer, bool):
            raise SlothError(f"where={where!r:.80} gave {answer!r:.80} for {site.path}: it must return True or False")
        return answer
    return all(_holds(key, wanted, site) for key, wanted in _conditions(where).items())


def nearest(where: Where, sites: Sequence[Site]) -> list[str]:
    """What to suggest when a selector selects none of the sites.

    For each condition that no site meets: the closest paths, or the stages, kinds or depths that exist. Where each
    condition is met by some site, but never all at once: the paths that meet the most of them.
    """
    where = validate(where)
    if callable(where):
        return [site.path for site in sites[:3]]
    conditions = _conditions(where)
    hints: list[str] = []
    for key, wanted in conditions.items():
        if any(_holds(key, wanted, site) for site in sites):
            continue
        if key == "path":
            words = [*dict.fromkeys(word for site in sites for word in (site.path, site.stage, site.kind))]
            hints += [near for glob in wanted for near in difflib.get_close_matches(glob, words, n=3, cutoff=0.0)]
        elif key == "depth":
            hints += [f"depth {depth:g}" for depth in sorted({site.depth for site in sites})]
        else:
            hints += [getattr(site, key) for site in sites]
    if not hints:
        best = sorted(sites, key=lambda site: -sum(_holds(key, wanted, site) for key, wanted in conditions.items()))
        hints = [site.path for site in best[:3]]
    return list(dict.fromkeys(hints))


def as_json(where: Where) -> str | list[float] | dict[str, Any] | None:
    """The selector as JSON writes it; SlothError for a function, which has no such form."""
    where = validate(where)
    if where is None or isinstance(where, str):
        return where
    if isinstance(where, Mapping):
        return {key: list(value) if isinstance(value, tuple) else value for key, value in where.items()}
    if isinstance(where, tuple):
        return list(where)
    raise SlothError(
        f"where={where!r:.80} has no JSON form, being a function: give a string, a depth range or a mapping"
    )


def _conditions(where: str | tuple[float, float] | Mapping[str, Any] | None) -> dict[str, tuple[Any, ...]]:
    if where is None:
        return {}
    if isinstance(where, Mapping):
        return {key: value if isinstance(value, tuple) else (value,) for key, value in where.items()}
    if isinstance(where, tuple):
        return {"depth": where}
    return {"stage" if where in STAGES else "kind" if where in KINDS else "path": (where,)}


def _holds(key: str, wanted: tuple[Any, ...], site: Site) -> bool:
    if key == "depth":
        return bool(wanted[0] <= site.depth <= wanted[1])
    if key == "path":
        return any(fnmatchcase(site.path, glob) for glob in wanted)
    return getattr(site, key) in wanted


def _condition(key: object, value: Any) -> Any:
    if key not in KEYS:
        raise SlothError(f"where: key {unknown(key, KEYS)}")
    if key == "depth":
        return _depths(value)
    words = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not words or not all(isinstance(word, str) and word for word in words):
        raise SlothError(f"where: {key}={value!r:.80} is refused: {key} takes a string, or a list of alternatives")
    allowed = {"stage": STAGES, "kind": KINDS}.get(str(key), words)
    for word in words:
        if word not in allowed:
            raise SlothError(f"where: {key} {unknown(word, allowed)}")
    return value if isinstance(value, str) else words


def _depths(value: Any) -> tuple[float, float]:
    if isinstance(value, list | tuple) and len(value) == 2 and all(DEPTH["accepts"].holds(each) for each in value):
        low, high = value
        if low <= high:
            return (low, high)
    raise SlothError(
        f"where: {value!r:.80} is not a depth range: give two numbers, (low, high), such as (1, 2), low first, "
        f"each {DEPTH['accepts'].words}"
    )
