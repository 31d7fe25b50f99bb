"""Inputs of nodes, as ComfyUI declares them, from what a parameter accepts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from sloth_fx.checks import FLAG, Accepts
from sloth_fx.errors import SlothError
from sloth_fx.integrations.comfy.documentation import documented
from sloth_fx.node_values import Form
from sloth_fx.schedule import PeakDecay, StepDecay
from sloth_fx.spec import NearSightedAttention, NearSightedTile, Reduction

Input = tuple[Any, dict[str, Any]]
Inputs = dict[str, Input]

_MOST = 1000.0  # of a widget for a number without limit, for which it stands
_STEPS = {"adaptive": 0.001}  # of widgets that need finer ones
_FIELDS = {"slothful": "rate", "strength": "rate", "blend": "k_blend", "tiling_max_depth": "max_depth"}
"""Parameters of the original nodes whose field in a spec is called otherwise."""

WHERE: Input = (
    "STRING",
    {
        "default": "",
        "tooltip": "Which layers: empty for all, or in, middle, out, self, cross, joint, a glob over paths, or JSON.",
    },
)


def widget(default: Any, accepts: Accepts, step: float, tooltip: str) -> Input:
    """The declaration of one input."""
    tooltip = tooltip.replace("math.inf", f"{_MOST:g}")
    options = {"default": default, "tooltip": tooltip} if tooltip else {"default": default}
    if accepts.choices:
        return list(accepts.choices), options
    if accepts is FLAG["accepts"]:
        return "BOOLEAN", options
    low, high = accepts.range or (0, math.inf)
    options |= {"default": min(default, _MOST) if math.isinf(high) else default}
    options |= {"min": low, "max": high if math.isfinite(high) else _MOST, "step": step}
    return ("INT" if accepts.whole else "FLOAT"), options


def inputs_of_form(node: type, form: Form) -> Inputs:
    """The inputs of an original node, by its own names."""
    return {
        name: widget(each.default, each.limits["accepts"], each.step, _tooltip_of(node, name, form))
        for name, each in form.items()
    }


def inputs_of_spec(spec: type) -> Inputs:
    """The inputs of a node for ``spec``: every field that is a number, a choice or a switch, and where."""
    told = documented(spec)
    found: Inputs = {}
    for each in fields(spec):
        accepts = each.metadata.get("accepts")
        if accepts is not None and (accepts.choices or isinstance(each.default, int | float)):
            step = 1 if accepts.whole else _STEPS.get(each.name, 0.05)
            found[each.name] = widget(each.default, accepts, step, told.get(each.name, ""))
            if each.name == "seed":  # which the browser would make anew for each run, and the model with it
                found[each.name][1]["control_after_generate"] = False
        elif accepts is not None and isinstance(each.default, tuple):
            found[each.name] = (
                "STRING",
                {"default": ", ".join(map(str, each.default)), "tooltip": told.get(each.name, "")},
            )
    where = {field.name: field.default for field in fields(spec)}.get("where")
    return {**found, "where": (WHERE[0], {**WHERE[1], "default": where if isinstance(where, str) else ""})}


def values_of_spec(spec: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments for ``spec`` from the inputs of its node. Raises :class:`SlothError` for text that is none."""
    defaults = {each.name: each.default for each in fields(spec)}
    limits = {each.name: each.metadata["accepts"] for each in fields(spec) if "accepts" in each.metadata}
    values = {
        name: _value(name, defaults[name], limits[name], value) for name, value in given.items() if name != "where"
    }
    return {**values, "where": _where(given.get("where", ""))} if "where" in defaults else values


def _value(name: str, default: Any, accepts: Accepts, value: Any) -> Any:
    if isinstance(default, tuple) and isinstance(value, str):
        return _numbers(name, value)
    endless = isinstance(default, float) and not accepts.whole and accepts.holds(math.inf)
    return math.inf if endless and value == _MOST else value


def _where(text: str) -> Any:
    text = text.strip()
    if not text.startswith(("{", "[")):
        return text or None
    try:
        found = json.loads(text)
    except ValueError as error:
        raise SlothError(f"where={text!r:.80} is no JSON: {error}") from None
    return tuple(found) if isinstance(found, list) else found


def _numbers(name: str, text: str) -> tuple[Any, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    try:
        return tuple(int(part) for part in parts)
    except ValueError:
        if any(part.lstrip("+-").replace(".", "").isdigit() for part in parts):
            raise SlothError(
                f"{name}={text!r:.80} is refused: {name} takes whole numbers with commas between"
            ) from None
        return tuple(parts)


def _tooltip_of(node: type, name: str, form: Form) -> str:
    field = name.removeprefix("in_").removeprefix("out_")
    field = _FIELDS.get(field, field)
    if node is NearSightedTile:
        field = {"base_tile_size": "tile_size", "base_global_ratio": "global_ratio"}.get(field, field)
    schedule = PeakDecay if "peak_time" in form else StepDecay
    kinds = (node, Reduction, schedule, NearSightedAttention, NearSightedTile)
    return next((told[field] for kind in kinds if field in (told := documented(kind))), "")
