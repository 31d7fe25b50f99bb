"""The parameters of the original ComfyUI nodes, per node, release and form, and what they mean as fields of a spec.

Releases: "2023-12-11" and "2023-12-16" are the two of Slothful Attention; "later" is the author's later node of its
own, Near-sighted Attention. The simple form of a node has fewer parameters, and is recognised by the names only it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

from sloth_fx.checks import FLAG, Limits, between, one_of, require, unknown
from sloth_fx.errors import SlothError
from sloth_fx.schedule import PeakDecay, StepDecay


class Parameter(NamedTuple):
    """One input of a node: its default, what it takes, and the step by which its widget changes a number."""

    default: Any
    limits: Limits
    step: float = 1


Form: TypeAlias = Mapping[str, Parameter]


def _number(default: float, low: float, high: float, step: float) -> Parameter:
    return Parameter(default, between(low, high), step)


MODE = Parameter("2D_AVG", one_of("1D_AVG", "1D_MAX", "2D_AVG", "2D_MAX"))
BLEND = _number(0.0, 0, 1, 0.05)


def _sides(rate: str, depth_decay: Parameter) -> Form:
    """The reduction of input and of output blocks; the rate is called strength or slothful, 6 and 4 by default."""
    return {
        f"{side}_{name}": parameter
        for side, default in (("in", 6.0), ("out", 4.0))
        for name, parameter in {
            "mode": MODE,
            "depth_decay": depth_decay,
            rate: _number(default, 0, 50, 0.5),
            "k_blend": BLEND,
            "v_blend": BLEND,
        }.items()
    }


def _tiling(size: tuple[int, int], most: int, ratio: tuple[float, float], ratio_most: float) -> Form:
    """Tile size and global ratio, each at base and at the peak of the schedule."""
    return {
        "base_tile_size": Parameter(size[0], between(16, most, whole=True), 2),
        "peak_tile_size": Parameter(size[1], between(16, most, whole=True), 2),
        "base_global_ratio": _number(ratio[0], 0, ratio_most, 0.1),
        "peak_global_ratio": _number(ratio[1], 0, ratio_most, 0.1),
    }


def _peak(peak_time: float = 0.4) -> Form:
    return {"peak_time": _number(peak_time, 0, 1, 0.1), "time_decay": _number(2.0, 0, 4, 0.5)}


TIME_DECAY = _number(1.0, 0, 4, 0.1)
STRENGTH_DECAY = _number(1.0, -2, 4, 0.1)
SLOTHFUL = _sides("slothful", _number(2.0, 0, 4, 0.5))
MAX_DEPTH: Form = {"tiling_max_depth": Parameter(2, between(1, 3, whole=True))}
SIMPLE: Form = {"slothful": _number(4.0, 0, 50, 0.5), "in_blend": BLEND, "out_blend": BLEND, "mode": MODE}
CONCAT: Form = {"concat_local": Parameter(False, FLAG), "concat_global": Parameter(False, FLAG)}
TILING = _tiling((24, 32), 64, (0.2, 0.8), 1)
LATER_TILING = _tiling((32, 48), 96, (1.0, 0.5), 2)

NODES: Mapping[str, Mapping[str, Mapping[str, Form]]] = {
    "SlothfulAttention": {
        "2023-12-11": {
            "full": {
                "time_decay": TIME_DECAY,
                "keep_middle": Parameter(True, FLAG),
                **_sides("strength", STRENGTH_DECAY),
            },
            "simple": {
                "time_decay": TIME_DECAY,
                "depth_decay": STRENGTH_DECAY,
                "in_mode": MODE,
                "in_strength": _number(6.0, 0, 50, 0.5),
                "in_blend": BLEND,
                "out_mode": MODE,
                "out_strength": _number(4.0, 0, 50, 0.5),
                "out_blend": BLEND,
            },
        },
        "2023-12-16": {"full": {**_peak(), **SLOTHFUL}},
        "later": {"full": {**_peak(), **SLOTHFUL}},
    },
    "NearSightedAttention": {
        "2023-12-16": {
            "full": {**MAX_DEPTH, **_peak(), **TILING, **SLOTHFUL},
            "simple": {**MAX_DEPTH, **_peak(), **TILING, **SIMPLE, "depth_decay": _number(1.5, 0, 4, 0.5)},
        },
        "later": {
            "full": {**MAX_DEPTH, **_peak(), **LATER_TILING, **SLOTHFUL, **CONCAT},
            "simple": {
                **MAX_DEPTH,
                **_peak(),
                **LATER_TILING,
                **SIMPLE,
                "depth_decay": _number(2.0, 0, 4, 0.5),
                **CONCAT,
            },
        },
    },
    "NearSightedTile": {
        "2023-12-16": {
            "full": {
                **MAX_DEPTH,
                "global_ratio": _number(0.5, 0, 1, 0.1),
                "tile_size": Parameter(32, between(16, 64, whole=True), 2),
            }
        },
        "later": {"full": {**MAX_DEPTH, **_peak(0.3), **LATER_TILING, **CONCAT}},
    },
}


def fields_of(node: str, release: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of the spec that does what the node does with these values; a reduction is a nested dict.

    Parameters not given take the node's default; `simple=True` among them asks for the simple form. Raises SlothError
    for an unknown release or parameter, a value out of the node's range, and names of both forms at once.
    """
    if release not in tuple(NODES[node]):
        raise SlothError(f"{node}: release {unknown(release, NODES[node])}")
    title = f"{node} of {release}"
    given = {name: value for name, value in values.items() if name != "simple"}
    form = _form(title, NODES[node][release], given, values.get("simple"))
    read = {name: parameter.default for name, parameter in form.items()}
    for name, value in given.items():
        value = value.upper() if form[name] is MODE and isinstance(value, str) else value
        try:
            require(name, value, form[name].limits)
        except SlothError as error:
            raise SlothError(f"{title}: {error}") from None
        read[name] = value
    if node == "NearSightedTile":
        return _tile(read) if release == "2023-12-16" else _later_tile(read)
    reductions = {"in_": _reduction(read, "in", release), "out": _reduction(read, "out", release)}
    if node == "SlothfulAttention":
        return reductions | _scheduled(read) | _kept(read, "keep_middle")
    tiling = ("base_tile_size", "peak_tile_size", "base_global_ratio", "peak_global_ratio", *CONCAT)
    return reductions | _scheduled(read) | _kept(read, *tiling) | {"max_depth": read["tiling_max_depth"]}


def _form(title: str, forms: Mapping[str, Form], given: Iterable[str], simple: object) -> Form:
    """The form that was asked for, or else the one whose names were given; the full one where both would do."""
    full, short = forms["full"], forms.get("simple", {})
    if simple is not None:
        require("simple", simple, FLAG)
    if simple and not short:
        raise SlothError(f"{title} has no simple form: leave simple=True out")
    for name in given:
        if name not in full and name not in short:
            raise SlothError(f"{title}: parameter {unknown(name, {**full, **short})}")
    if simple is None:
        simple = any(name not in full for name in given)
    form, this, other = (short, "simple", "full") if simple else (full, "full", "simple")
    strays = [name for name in given if name not in form]
    if strays:
        raise SlothError(
            f"{title}: {', '.join(strays)} is of the {other} form, but the call asks for the {this} one: "
            f"give the parameters of one form (the {this} one takes {', '.join(form)})"
        )
    return form


def _reduction(read: Mapping[str, Any], side: str, release: str) -> dict[str, Any]:
    def first(*names: str) -> Any:
        return next(read[name] for name in names if name in read)

    k_blend, v_blend = first(f"{side}_k_blend", f"{side}_blend"), first(f"{side}_v_blend", f"{side}_blend")
    return {
        "rate": first(f"{side}_slothful", f"{side}_strength", "slothful"),
        "mode": first(f"{side}_mode", "mode").lower(),
        "depth_decay": first(f"{side}_depth_decay", "depth_decay"),
        "k_blend": k_blend,
        "v_blend": v_blend,
        "long_axis": "x" if release == "2023-12-11" else "y",
        "border": "keep" if release == "later" and k_blend == v_blend == 0 else "crop",
    }


def _scheduled(read: Mapping[str, Any]) -> dict[str, Any]:
    if "peak_time" in read:
        return {"schedule": PeakDecay(peak_time=read["peak_time"], time_decay=read["time_decay"])}
    return {"schedule": StepDecay(time_decay=read["time_decay"])}


def _kept(read: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Parameters that a node and its spec call the same."""
    return {name: read[name] for name in names if name in read}


def _tile(read: Mapping[str, Any]) -> dict[str, Any]:
    same = _kept(read, "tile_size", "global_ratio")
    return {**same, "max_depth": read["tiling_max_depth"], "mode": "2d", "long_axis": "x"}


def _later_tile(read: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "tile_size": read["base_tile_size"],
        "global_ratio": read["base_global_ratio"],
        "max_depth": read["tiling_max_depth"],
        "mode": "1d",
        "pad": "end",
        **_kept(read, "peak_tile_size", "peak_global_ratio", *CONCAT),
        **_scheduled(read),
    }
