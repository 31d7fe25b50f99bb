"""What is measured: operators at strengths from harmless to broken, and what their author claims.

The self-attention of the lab's UNet has 16 x 16, 8 x 8 and 4 x 4 tokens, that of its transformer 8 x 8. Strengths are
chosen for these; every one is accepted by both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from sloth_fx.spec import (
    HyperTile,
    NearSightedAttention,
    NearSightedTile,
    Reduction,
    SlothfulAttention,
    Spec,
    TokenDownsample,
    TokenMerging,
)


@dataclass(frozen=True)
class Point:
    """One set of images. ``first_seed`` is that of the noise of the first image; the others follow."""

    name: str
    spec: Spec | None
    first_seed: int = 0


@dataclass(frozen=True)
class Series:
    """An operator over one parameter, the weakest first: ``settings`` are (label, spec). ``line`` tells apart the
    series that share a panel of the plot; where it is None the series is for a claim, and is not drawn."""

    operator: str
    parameter: str
    settings: tuple[tuple[str, Spec], ...]
    line: str | None = ""

    @property
    def title(self) -> str:
        return f"{self.operator}, {self.line}" if self.line else self.operator


@dataclass(frozen=True)
class Claim:
    """That ``measure`` goes up (+1) or down (-1) from one spec to another."""

    text: str
    at: str
    measure: str
    direction: int
    ends: tuple[tuple[str, Spec], tuple[str, Spec]]


UNPATCHED = Point("unpatched", None)
OTHER_SEEDS = Point("unpatched-other-seeds", None, first_seed=1_000_000)

# Operators over strength


def _slothful(rate: float) -> SlothfulAttention:
    return SlothfulAttention(in_=Reduction(rate=rate), out=Reduction(rate=rate))


def _near(rate: float) -> NearSightedAttention:
    reduction = Reduction(rate=rate)
    return NearSightedAttention(base_tile_size=8, peak_tile_size=8, in_=reduction, out=reduction)


RATES, TILES, SHARES = (2, 4, 8, 16, 32), (8, 4, 3, 2, 1), (0.1, 0.2, 0.4, 0.6, 0.75)
STRENGTHS = (
    Series("SlothfulAttention", "rate", tuple((str(rate), _slothful(rate)) for rate in RATES)),
    Series("NearSightedAttention", "rate, in tiles of 8", tuple((str(rate), _near(rate)) for rate in RATES)),
    Series("NearSightedTile", "tile_size", tuple((str(edge), NearSightedTile(tile_size=edge)) for edge in TILES)),
    Series(
        "NearSightedTile, global samples",
        "global_ratio, tiles of 4",
        tuple((f"{ratio:g}", NearSightedTile(tile_size=4, global_ratio=ratio)) for ratio in (2, 1, 0.5, 0.25, 0)),
    ),
    Series("TokenDownsample", "factor", tuple((str(n), TokenDownsample(factors=(n,))) for n in (2, 3, 4, 8))),
    *(
        Series(
            "HyperTile",
            "tile_size",
            tuple((str(edge), HyperTile(tile_size=edge, swap_size=sizes)) for edge in (64, 48, 32)),
            "one size" if sizes == 1 else "two sizes by chance",
        )
        for sizes in (1, 2)
    ),
    *(
        Series(
            "TokenMerging",
            "ratio",
            tuple((f"{share:g}", TokenMerging(ratio=share, tokens=tokens)) for share in SHARES),
            "all tokens" if tokens == "all" else "keys and values alone",
        )
        for tokens in ("all", "kv")
    ),
)

# Claims of the author

NODE = SlothfulAttention()
BASES = {"the node's defaults": NODE, "rates of 16": _slothful(16)}
BLENDS = (0, 0.5, 1)


def _in_k(base: SlothfulAttention, blend: float) -> SlothfulAttention:
    return replace(base, in_=replace(base.in_, k_blend=blend))


def _out_v_average(base: SlothfulAttention, blend: float) -> SlothfulAttention:
    return replace(base, out=replace(base.out, v_blend=blend))


def _out_v_max(base: SlothfulAttention, blend: float) -> SlothfulAttention:
    # Without blend nothing is pooled, and both modes are the same.
    return replace(base, out=replace(base.out, v_blend=blend, mode="2d_max")) if blend else base


def _of_blends() -> tuple[list[Series], list[Claim]]:
    series: list[Series] = []
    claims: list[Claim] = []
    for parameter, blended, said in (
        ("in_k_blend", _in_k, [("less noise", "noise", -1)]),
        ("out_v_blend, average", _out_v_average, [("softer", "hardness", -1), ("lower contrast", "contrast", -1)]),
        ("out_v_blend, max", _out_v_max, [("harder", "hardness", 1)]),
    ):
        for at, base in BASES.items():
            settings = tuple((f"{blend:g}", blended(base, blend)) for blend in BLENDS)
            series.append(Series(f"SlothfulAttention at {at}", parameter, settings, line=None))
            claims += [
                Claim(f"larger {parameter}: {text}", at, measure, direction, (settings[0], settings[-1]))
                for text, measure, direction in said
            ]
    return series, claims


def _of_tiles() -> list[Claim]:
    said = [
        ("more detail", "detail", 1),
        ("less consistency: fewer prompts right", "right", -1),
        ("less consistency: more things not asked for", "extra", 1),
    ]
    ends = tuple((str(edge), NearSightedTile(tile_size=edge)) for edge in (8, 2))
    return [
        Claim(f"smaller tiles: {text}", "global_ratio 0.5", measure, direction, ends)
        for text, measure, direction in said
    ]


_SERIES, _CLAIMS = _of_blends()
SERIES = (
    *STRENGTHS,
    Series("SlothfulAttention", "rates", (("the node's defaults", NODE),), line=None),
    *_SERIES,
)
CLAIMS = (*_CLAIMS, *_of_tiles())


def points(series: Iterable[Series] = SERIES) -> dict[Spec | None, Point]:
    """Every point by its spec, also those without. What is in several series is one point, named by the first."""
    found: dict[Spec | None, Point] = {}
    for each in series:
        for label, spec in each.settings:
            found.setdefault(spec, Point(_slug(f"{each.title} {each.parameter} {label}"), spec))
    return found


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")
