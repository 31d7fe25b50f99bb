"""What to do to the attention of a model: frozen, checked, and free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from sloth_fx import node_values
from sloth_fx.checks import FLAG, accepting, between, check_fields, one_of, or_none, require
from sloth_fx.guidance_specs import NAG
from sloth_fx.peer_specs import HyperTile, TokenDownsample, TokenMerging
from sloth_fx.perturbation_specs import PAG, SAG, SEG, SLG, TPG, Perturb, PerturbationSpec
from sloth_fx.schedule import SCHEDULE, Constant, PeakDecay, Schedule
from sloth_fx.spec_base import SEED, VERSION, BaseSpec
from sloth_fx.where import STAGES, Where

__all__ = [
    "NAG",
    "PAG",
    "SAG",
    "SEG",
    "SLG",
    "TPG",
    "VERSION",
    "HyperTile",
    "NearSightedAttention",
    "NearSightedTile",
    "Perturb",
    "PerturbationSpec",
    "Perturbing",
    "Reduction",
    "SlothfulAttention",
    "Spec",
    "TokenDownsample",
    "TokenMerging",
]

Mode: TypeAlias = Literal["1d_avg", "1d_max", "2d_avg", "2d_max"]
Axis: TypeAlias = Literal["y", "x"]
Pad: TypeAlias = Literal["end", "random"]

BLEND = between(0, 1)
TILE_SIZE = between(1, 4096, whole=True)
GLOBAL_RATIO = between(0, 2)
MAX_DEPTH = between(1, 8, whole=True)
POSITIVE = accepting("a number above 0", lambda value: isinstance(value, int | float) and value > 0)
AXIS = one_of("y", "x")
PAD = one_of("end", "random")


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """How far keys and values are pooled: stride = rate * time ratio * depth factor, in tokens per kept token.

    The two that matter:

    rate: the stride at the shallowest attention level and the peak of the schedule, 0..50; 1 or less changes nothing.
    depth_decay: how much less the deeper levels are reduced, -2..4; 0 is the same everywhere, and a negative value
        turns it around, so that the deepest level is reduced most (`stride` has the law).

    The rest:

    mode: "1d_*" pools along the flattened tokens, "2d_*" over rows and columns; "*_max" takes maxima, "*_avg" means.
    k_blend, v_blend: 0..1, (1 - blend) * (every n-th token) + blend * (the pooled window), for keys and for values.
    long_axis: in 2d, which axis takes the larger factor ceil(sqrt(stride)): "y" (rows) or "x" (columns).
    border: where the stride does not divide the grid, "keep" lets the last window be partial, "crop" drops it.
    temporal: frames of a video that are pooled together, besides the windows within frames, whole, 1..64; at sites of
        kind "temporal" the only reduction there is. It does not vary over the run.

    Raises SlothError for a value of the wrong type or out of range. Source: Slothful Attention (strength in the
    release of 2023-12-11, slothful in that of 2023-12-16; the former has long_axis "x", the latter "y"; both crop,
    except at blend 1/1, where their code keeps the border and takes every n-th token; we pool, as documented).
    """

    rate: float = field(metadata=between(0, 50))
    mode: Mode = field(default="2d_avg", metadata=one_of("1d_avg", "1d_max", "2d_avg", "2d_max"))
    depth_decay: float = field(default=2.0, metadata=between(-2, 4))
    k_blend: float = field(default=0.0, metadata=BLEND)
    v_blend: float = field(default=0.0, metadata=BLEND)
    long_axis: Axis = field(default="y", metadata=AXIS)
    border: Literal["keep", "crop"] = field(default="keep", metadata=one_of("keep", "crop"))
    temporal: int = field(default=1, metadata=between(1, 64, whole=True))

    def __post_init__(self) -> None:
        check_fields(self)

    def stride(self, time_ratio: float, relative_tokens: float, deepest: float) -> float:
        """rate * time_ratio * depth factor, at one site and one moment; a stride of 1 or less means no reduction.

        time_ratio: the schedule's, 0..1. relative_tokens: tokens here over tokens at the shallowest attention level
        (1, 1/4, 1/16, ...). deepest: downscale of the deepest attention level over that of the shallowest (SD1.5: 8,
        SDXL: 2).

        With d = depth_decay: d >= 0: relative_tokens^(d/2); d < 0: ((1/relative_tokens) / deepest^2)^(|d|/2).
        """
        require("time_ratio", time_ratio, between(0, 1))
        require("relative_tokens", relative_tokens, POSITIVE)
        require("deepest", deepest, POSITIVE)
        share = relative_tokens if self.depth_decay >= 0 else 1 / relative_tokens / deepest**2
        return float(self.rate * time_ratio * share ** (abs(self.depth_decay) / 2))


REDUCTION = accepting("a Reduction(rate=...)", lambda value: isinstance(value, Reduction))


@dataclass(frozen=True, kw_only=True)
class SlothfulAttention(BaseSpec):
    """Self-attention over fewer keys and values: the inputs of both projections are pooled, queries stay.

    in_, out: the Reduction in the input and output blocks. schedule: how it varies over the sampling run.
    keep_middle: leave the middle block alone; otherwise it takes in_.
    where: which of the sites (`sloth_fx.where.Where`), None for all.

    Raises SlothError for a value of the wrong type. Source: Slothful Attention, both releases.
    """

    in_: Reduction = field(default=Reduction(rate=6.0), metadata=REDUCTION)
    out: Reduction = field(default=Reduction(rate=4.0), metadata=REDUCTION)
    schedule: Schedule = field(default=PeakDecay(), metadata=SCHEDULE)
    keep_middle: bool = field(default=True, metadata=FLAG)
    where: Where = field(default=None, hash=False)

    def reduction(self, stage: str) -> Reduction | None:
        """The reduction in a stage ("in", "middle", "out"); None where the stage is left alone."""
        return None if stage == "middle" and self.keep_middle else _side(self, stage)

    @classmethod
    def from_node(cls, *, release: str = "2023-12-16", **values: Any) -> SlothfulAttention:
        """The spec that does what the node does with these parameters, by the node's own names, ranges and defaults.

        release: "2023-12-11" (with its Simple form), "2023-12-16" or "later". In the last two the node's code reads
        in_slothful for output blocks and out_slothful for input blocks; here in_ is in_, as documented. Blends of 1
        and 1 mean pool, as documented. Raises SlothError for what the node does not know.
        """
        return cls(**_built(node_values.fields_of("SlothfulAttention", release, values)))


@dataclass(frozen=True, kw_only=True)
class NearSightedTile(BaseSpec):
    """Self-attention within tiles, plus global samples of the whole grid that every tile sees.

    The two that matter:

    tile_size: largest edge of a tile, in tokens of the site, whole, 1..4096; the grid is split evenly into
        ceil(h / tile_size) x ceil(w / tile_size) tiles, and left alone where that is one.
    global_ratio: global samples per token of a tile, 0..2; their stride is tiles / global_ratio, and 0 means none.

    The rest:

    max_depth: whole, 1..8; sites coarser than the latent by more than 2^(max_depth - 1) are not tiled.
    peak_tile_size, peak_global_ratio: the values at ratio 1 of the schedule, linear in between; None for no change.
    schedule: how far towards the peak, over the sampling run.
    mode, long_axis: global samples are strided along the flattened tokens ("1d") or, more along long_axis, in "2d".
    pad: where the padding goes when tiles do not divide the grid: "end" (bottom and right) or "random" (split at
        random, by seed and timestep). seed: whole, 0 or more.
    concat_local, concat_global: let the images of a batch (within a half of classifier-free guidance) see each other's
        tiles, each other's global samples. How many halves the batch holds is `halves` of the context, default 1.
    where: which of the sites (`sloth_fx.where.Where`), None for all.

    Raises SlothError for a value of the wrong type or out of range. Source: Near-sighted Tile, release of 2023-12-16;
    peaks, mode "1d" and concat: the author's later node.
    """

    tile_size: int = field(default=32, metadata=TILE_SIZE)
    global_ratio: float = field(default=0.5, metadata=GLOBAL_RATIO)
    max_depth: int = field(default=2, metadata=MAX_DEPTH)
    peak_tile_size: int | None = field(default=None, metadata=or_none(TILE_SIZE))
    peak_global_ratio: float | None = field(default=None, metadata=or_none(GLOBAL_RATIO))
    schedule: Schedule = field(default=Constant(), metadata=SCHEDULE)
    mode: Literal["1d", "2d"] = field(default="2d", metadata=one_of("1d", "2d"))
    long_axis: Axis = field(default="x", metadata=AXIS)
    pad: Pad = field(default="end", metadata=PAD)
    seed: int = field(default=0, metadata=SEED)
    concat_local: bool = field(default=False, metadata=FLAG)
    concat_global: bool = field(default=False, metadata=FLAG)
    where: Where = field(default=None, hash=False)

    def tile(self, ratio: float) -> int:
        """Tile size at a ratio of the schedule: tile_size + (peak - tile_size) * ratio, rounded half to even."""
        return round(_lerp(self.tile_size, self.peak_tile_size, ratio))

    def global_ratio_at(self, ratio: float) -> float:
        """Global ratio at a ratio of the schedule: global_ratio + (peak - global_ratio) * ratio."""
        return _lerp(self.global_ratio, self.peak_global_ratio, ratio)

    def tiles(self, downscale: float) -> bool:
        """Whether sites this much coarser than the latent are tiled: downscale <= 2^(max_depth - 1)."""
        return downscale <= 2.0 ** (self.max_depth - 1)

    def reduction(self, stage: str) -> Reduction | None:
        """None in every stage: local keys and values are not pooled."""
        require("stage", stage, one_of(*STAGES))
        return None

    @classmethod
    def from_node(cls, *, release: str = "2023-12-16", **values: Any) -> NearSightedTile:
        """The spec that does what the node does with these parameters; release "2023-12-16" or "later".

        Raises SlothError for what the node does not know.
        """
        return cls(**_built(node_values.fields_of("NearSightedTile", release, values)))


@dataclass(frozen=True, kw_only=True)
class NearSightedAttention(BaseSpec):
    """Tiles whose own keys and values are pooled, plus pooled global samples; sites not tiled are pooled whole.

    base_tile_size, peak_tile_size: largest edge of a tile, in tokens of the site, at ratio 0 and 1 of the schedule;
        whole, 1..4096.
    base_global_ratio, peak_global_ratio: global samples per local one, likewise, 0..2; their stride is
        max(1, stride) * tiles / global ratio.
    in_, out: the Reduction in the input (and middle) and output blocks. schedule: drives stride, tile and global ratio.

    max_depth, pad, seed, concat_local, concat_global, where: as in `NearSightedTile`.

    Raises SlothError for a value of the wrong type or out of range. Source: Near-sighted Attention, release of
    2023-12-16; concat: the author's later node.
    """

    base_tile_size: int = field(default=24, metadata=TILE_SIZE)
    peak_tile_size: int = field(default=32, metadata=TILE_SIZE)
    base_global_ratio: float = field(default=0.2, metadata=GLOBAL_RATIO)
    peak_global_ratio: float = field(default=0.8, metadata=GLOBAL_RATIO)
    max_depth: int = field(default=2, metadata=MAX_DEPTH)
    in_: Reduction = field(default=Reduction(rate=6.0), metadata=REDUCTION)
    out: Reduction = field(default=Reduction(rate=4.0), metadata=REDUCTION)
    schedule: Schedule = field(default=PeakDecay(), metadata=SCHEDULE)
    pad: Pad = field(default="end", metadata=PAD)
    seed: int = field(default=0, metadata=SEED)
    concat_local: bool = field(default=False, metadata=FLAG)
    concat_global: bool = field(default=False, metadata=FLAG)
    where: Where = field(default=None, hash=False)

    def tile(self, ratio: float) -> int:
        """Tile size at a ratio of the schedule: base + (peak - base) * ratio, rounded half to even."""
        return round(_lerp(self.base_tile_size, self.peak_tile_size, ratio))

    def global_ratio_at(self, ratio: float) -> float:
        """Global ratio at a ratio of the schedule: base + (peak - base) * ratio."""
        return _lerp(self.base_global_ratio, self.peak_global_ratio, ratio)

    def tiles(self, downscale: float) -> bool:
        """Whether sites this much coarser than the latent are tiled: downscale <= 2^(max_depth - 1)."""
        return downscale <= 2.0 ** (self.max_depth - 1)

    def reduction(self, stage: str) -> Reduction:
        """The reduction in a stage ("in", "middle", "out"); the middle block takes in_."""
        return _side(self, stage)

    @classmethod
    def from_node(cls, *, release: str = "2023-12-16", **values: Any) -> NearSightedAttention:
        """The spec that does what the node, or its Simple form, does with these parameters.

        release: "2023-12-16" or "later". Raises SlothError for what the node does not know.
        """
        return cls(**_built(node_values.fields_of("NearSightedAttention", release, values)))


Spec: TypeAlias = (
    SlothfulAttention
    | NearSightedTile
    | NearSightedAttention
    | TokenDownsample
    | HyperTile
    | TokenMerging
    | NAG
    | SAG
    | PAG
    | SEG
    | TPG
    | SLG
    | Perturb
)

Perturbing: TypeAlias = SAG | PAG | SEG | TPG | SLG | Perturb


def _side(spec: SlothfulAttention | NearSightedAttention, stage: str) -> Reduction:
    require("stage", stage, one_of(*STAGES))
    return spec.out if stage == "out" else spec.in_


def _lerp(start: float, end: float | None, ratio: float) -> float:
    require("ratio", ratio, between(0, 1))
    return start if end is None else start + (end - start) * ratio


def _built(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: Reduction(**value) if isinstance(value, dict) else value for name, value in values.items()}
