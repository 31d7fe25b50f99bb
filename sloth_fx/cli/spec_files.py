"""Specs from files: JSON, a PNG that a command here wrote, or a ComfyUI workflow."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sloth_fx.cli.models import read_json
from sloth_fx.cli.png import PNG, text_of
from sloth_fx.errors import SlothError
from sloth_fx.serialize import load_spec
from sloth_fx.spec import Spec

KEY = "sloth_fx"
"""The text chunk of a PNG that holds what it was made with."""


def read_specs(path: Path) -> list[Spec]:
    """The specs in a file, whatever its form. Raises :class:`SlothError` where it holds none."""
    if not path.exists():
        raise SlothError(f"cannot read {path}: it does not exist")
    if path.is_dir():
        raise SlothError(f"cannot read {path}: it is a folder")
    if path.suffix.lower() == PNG:
        return _listed(made_with(path)["spec"]) if KEY in text_of(path) else _from_workflow(path)
    data = read_json(path)
    return _from_workflow(path) if _is_workflow(data) else _listed(data)


def made_with(path: Path) -> dict[str, Any]:
    """What a PNG was made with: "spec", "prompt", "seed" and so on, as :func:`as_text` wrote it."""
    found = text_of(path).get(KEY)
    try:
        data = json.loads(found or "")
    except ValueError:
        data = None
    if not isinstance(data, dict) or "spec" not in data:
        raise SlothError(f"{path} holds no spec: sloth-fx did not write it, or its text was lost")
    return data


def as_text(specs: Sequence[Spec], **settings: Any) -> dict[str, str]:
    """The text chunks that :func:`made_with` reads."""
    return {KEY: json.dumps({"spec": as_data(specs), **settings})}


def as_data(specs: Sequence[Spec]) -> Any:
    """The JSON form: one spec as it is, several as a list."""
    found = [spec.to_dict() for spec in specs]
    return found[0] if len(found) == 1 else found


def _listed(data: Any) -> list[Spec]:
    specs = load_spec(data)
    if not specs:
        raise SlothError("the list of specs is empty")
    return specs if isinstance(specs, list) else [specs]


def _is_workflow(data: Any) -> bool:
    """Either form that ComfyUI writes: a graph with a list of nodes, or nodes by id."""
    if not isinstance(data, Mapping):
        return False
    nodes = data.get("nodes")
    return isinstance(nodes, list) or any(isinstance(node, Mapping) and "class_type" in node for node in data.values())


def _from_workflow(path: Path) -> list[Spec]:
    from sloth_fx.workflow import read_workflow

    return [node.spec for node in read_workflow(path)]
