"""Specs from JSON: the way back from `to_dict`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args

from sloth_fx.checks import unknown
from sloth_fx.errors import SlothError
from sloth_fx.schedule import SCHEDULES
from sloth_fx.spec import VERSION, Reduction, Spec

SPECS: Mapping[str, type[Spec]] = {each.__name__: each for each in get_args(Spec)}


def load_spec(source: str | os.PathLike[str] | Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Spec | list[Spec]:
    """The spec, or the list of specs, that a JSON file, a dict or a list of dicts describes.

    The form is that of `to_dict`: "version", "type", and the fields by name; fields left out take their defaults. A
    string is a path. Raises SlothError, saying where, for a file that is missing or not JSON, a missing or newer
    version, an unknown type or key (with the nearest known one), and a value that a field refuses.
    """
    data = _read(Path(source)) if isinstance(source, str | os.PathLike) else source
    if isinstance(data, list | tuple):
        return [_spec(each, f"spec[{index}]") for index, each in enumerate(data)]
    return _spec(data, "spec")


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SlothError(f"cannot read {str(path)!r:.80}: {error.strerror} (a string is taken for a path)") from None
    except (ValueError, RecursionError) as error:
        raise SlothError(f"{str(path)!r} is not a JSON file: {error}") from None


def _spec(data: Any, at: str) -> Spec:
    values = dict(_mapping(data, at))
    _check_version(values.pop("version", None), at)
    for name in ("in_", "out"):
        if name in values:
            values[name] = _build(Reduction, _mapping(values[name], f"{at}.{name}"), f"{at}.{name}")
    if "schedule" in values:
        values["schedule"] = _typed(SCHEDULES, values["schedule"], f"{at}.schedule")
    spec: Spec = _typed(SPECS, values, at)
    return spec


def _check_version(version: Any, at: str) -> None:
    if version is None:
        raise SlothError(f'{at}: the version is missing: give "version": {VERSION}')
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise SlothError(f"{at}: version={version!r:.80} is not a version: give {VERSION}")
    if version > VERSION:
        raise SlothError(f"{at}: version={version} is newer than what this sloth_fx reads, {VERSION}")


def _mapping(data: Any, at: str) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise SlothError(f"{at}: {data!r:.80} is not a JSON object with keys")
    return data


def _typed(types: Mapping[str, type[Any]], data: Any, at: str) -> Any:
    """An object of the type that the key "type" names."""
    values = dict(_mapping(data, at))
    if "type" not in values:
        raise SlothError(f"{at}: the type is missing: one of {', '.join(types)}")
    name = values.pop("type")
    if not isinstance(name, str) or name not in types:
        raise SlothError(f"{at}: type {unknown(name, types)}")
    return _build(types[name], values, at)


def _build(cls: type[Any], values: Mapping[str, Any], at: str) -> Any:
    known = {each.name: each for each in fields(cls)}
    for name in values:
        if name not in known:
            raise SlothError(f"{at}: key {unknown(name, known)}")
    for name, each in known.items():
        if name not in values and each.default is MISSING:
            raise SlothError(f"{at}: {name} is missing")
    try:
        return cls(**values)
    except SlothError as error:
        raise SlothError(f"{at}: {error}") from None
