"""What the specs ask of one site, and what that comes to at a moment: a :class:`KeyLayout`."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass

from sloth_fx.errors import SlothError
from sloth_fx.operators import KeyLayout, Pooling, axis_strides, flat_stride
from sloth_fx.operators.tiling import tile_size
from sloth_fx.schedule import Moment, StepDecay, ratio_at
from sloth_fx.site import AttentionSite, LatentSize
from sloth_fx.spec import (
    NAG,
    TPG,
    HyperTile,
    NearSightedAttention,
    NearSightedTile,
    PerturbationSpec,
    Perturbing,
    Reduction,
    SlothfulAttention,
    Spec,
    TokenDownsample,
    TokenMerging,
)

Tiling = NearSightedTile | NearSightedAttention | HyperTile
Reducing = SlothfulAttention | NearSightedAttention
_Area = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class SitePlan:
    """One site and the specs that act on it.

    ``reducing`` says how its keys and values are pooled, ``downsampling`` how they are thinned out besides, ``tiling``
    how its queries are tiled and ``merging`` how tokens are merged; one NearSightedAttention may be the first and the
    third, and SlothfulAttention with NearSightedTile pools the keys within each tile. ``guiding`` says how a negative
    text guides what is read; where ``branching`` is given, that text passes the model in a branch of its own, through
    all sites, guided or not. ``perturbing`` says how what is read is spoilt where the model is asked once more.
    ``remark`` is for the report. ``shallowest`` is the site against which depth is measured, ``deepest`` the greatest
    depth of the model.
    """

    site: AttentionSite
    shallowest: AttentionSite
    deepest: float
    reducing: Reducing | None = None
    downsampling: TokenDownsample | None = None
    tiling: Tiling | None = None
    merging: TokenMerging | None = None
    guiding: NAG | None = None
    branching: NAG | None = None
    perturbing: Perturbing | None = None
    remark: str = ""

    @property
    def specs(self) -> tuple[Spec, ...]:
        """The specs at work, each once."""
        given = (self.reducing, self.downsampling, self.tiling, self.merging, self.guiding, self.perturbing)
        return tuple({id(spec): spec for spec in given if spec is not None}.values())

    @property
    def reduces(self) -> bool:
        """Whether keys and values become fewer."""
        return self.reducing is not None or self.downsampling is not None

    @property
    def reduction(self) -> Reduction | None:
        return self.reducing.reduction(self.site.stage) if self.reducing is not None else None

    @property
    def pooling(self) -> Pooling:
        reduction = self.reduction
        if reduction is None:
            return Pooling()
        kind = reduction.mode.split("_")[1]
        return Pooling(kind, reduction.k_blend, reduction.v_blend, reduction.border)

    @property
    def merged_tokens(self) -> str:
        """Which tokens are merged: queries alone where something else is done to the keys."""
        assert self.merging is not None
        return "q" if self.reduces or self.tiling is not None else self.merging.tokens

    def layout(self, moment: Moment, latent: LatentSize) -> KeyLayout:
        """Windows, tiles and samples at ``moment``, for a latent of size ``latent``, and whether a text guides, or
        attention is perturbed."""
        guides = self.branching or self.guiding
        layout = self._keys(moment, latent)
        if self.perturbing is not None and self.perturbing.acts(moment):
            layout = layout._replace(perturbed=True)
        return layout._replace(guided=True) if guides is not None and guides.acts(moment) else layout

    def _keys(self, moment: Moment, latent: LatentSize) -> KeyLayout:
        whole = self.site.grid_at(latent)
        if whole is None and self.needs_no_grid:
            return KeyLayout((1, self.site.q_tokens))
        if whole is None:
            raise SlothError(f"{self.site.name}: the grid of its {self.site.q_tokens} tokens is not known")
        frames, *area = (1, *whole)[-3:]
        grid = area[0], area[1]
        if self.site.kind == "temporal":
            return KeyLayout((1, frames), (1, self._frame_window(frames)))
        stride, tile = self._stride(moment, grid, latent), self._tile(moment, grid)
        flat, long_axis = self._direction(stride)

        def along(factor: float, area: _Area) -> _Area:
            return flat_stride(factor, math.prod(area)) if flat else axis_strides(factor, area, long_axis)

        window = self._thinned(along(stride, tile or grid) if stride > 1 else (1, 1), tile or grid, flat)
        layout = KeyLayout(
            grid, window, flat=flat and stride > 1, frames=frames, frame_window=self._frame_window(frames)
        )
        if self.tiling is None or tile is None:
            return layout
        layout = layout._replace(tile=tile, pad=self._pad(moment, grid, tile), flat=flat)
        if isinstance(self.tiling, HyperTile):
            return layout
        ratio = self.tiling.global_ratio_at(ratio_at(self.tiling.schedule, moment))
        if ratio <= 0:
            return layout
        tiles = math.prod(math.ceil(size / part) for size, part in zip(grid, tile, strict=True))
        return layout._replace(
            samples=along(max(1.0, stride) * tiles / ratio, grid),
            sample_window=self._thinned(along(stride, grid) if stride > 1 else (1, 1), grid, flat),
        )

    @property
    def attends_whole(self) -> bool:
        """Whether the host's own attention is called, with all queries."""
        return self.tiling is None and self.merging is None

    @property
    def attends_branches(self) -> bool:
        """Whether the host's own attention takes what differs between two texts; what perturbs it does so by itself."""
        return self.branching is not None and self.attends_whole and self.perturbing is None

    @property
    def needs_no_grid(self) -> bool:
        """Whether all that is done here is the same for tokens in any order."""
        return not self.reduces and self.attends_whole

    @property
    def level(self) -> int:
        """The attention level, 0 for the shallowest."""
        return level_of(self.site)

    def _direction(self, stride: float) -> tuple[bool, str]:
        """Whether windows and samples run along the flattened tokens, and which axis otherwise takes more."""
        if isinstance(self.tiling, NearSightedTile) and stride <= 1:
            return self.tiling.mode == "1d", self.tiling.long_axis
        reduction = self.reduction
        return (reduction.mode.startswith("1d"), reduction.long_axis) if reduction is not None else (False, "y")

    def _stride(self, moment: Moment, grid: _Area, latent: LatentSize) -> float:
        reduction = self.reduction
        if reduction is None or self.reducing is None:
            return 1.0
        relative = self.site.depth**-2.0
        if isinstance(self.reducing.schedule, StepDecay):  # the release of 2023-12-11 counts the tokens that there are
            first = self.shallowest.grid_at(latent)
            relative = math.prod(grid) / math.prod(first[-2:]) if first is not None else relative
        return reduction.stride(ratio_at(self.reducing.schedule, moment), relative, self.deepest)

    def _thinned(self, window: _Area, area: _Area, flat: bool) -> _Area:
        """The strides of two reductions multiply."""
        factor = self.downsampling.factor(self.level) if self.downsampling is not None else 1
        if flat:
            return 1, min(window[1] * factor**2, math.prod(area))
        return min(window[0] * factor, area[0]), min(window[1] * factor, area[1])

    def _frame_window(self, frames: int) -> int:
        reduction = self.reduction
        return min(reduction.temporal, frames) if reduction is not None else 1

    def _tile(self, moment: Moment, grid: _Area) -> _Area | None:
        if isinstance(self.tiling, HyperTile):
            draw = self._draw(moment, self.tiling.seed, f"level {self.level}")  # alike at all sites: fewer graphs
            rows, columns = (draw.choice(self.tiling.choices(size, self.level)) for size in grid)
        elif self.tiling is None or not self.tiling.tiles(self.site.downscale):
            return None
        else:
            size = self.tiling.tile(ratio_at(self.tiling.schedule, moment))
            rows, columns = tile_size(grid[0], size), tile_size(grid[1], size)
        return None if (rows, columns) == grid else (rows, columns)

    def _pad(self, moment: Moment, grid: _Area, tile: _Area) -> _Area:
        if self.tiling is None or isinstance(self.tiling, HyperTile) or self.tiling.pad == "end":
            return 0, 0
        draw = self._draw(moment, self.tiling.seed, self.site.name)
        rows, columns = (draw.randint(0, -size % part) for size, part in zip(grid, tile, strict=True))
        return rows, columns

    def seed(self, moment: Moment) -> int:
        """For the choice of the tokens that others are merged into, or the order in which they are shuffled."""
        spec = self.merging or self.perturbing
        assert isinstance(spec, TokenMerging | TPG)
        return self._draw(moment, spec.seed, self.site.name).getrandbits(31)

    @property
    def draws(self) -> bool:
        """Whether something is chosen at random at each moment, by :meth:`seed`."""
        return isinstance(self.merging or self.perturbing, TokenMerging | TPG)

    def _draw(self, moment: Moment, seed: int, what: str) -> random.Random:
        """Choices that are the same whenever a run comes to this moment."""
        return random.Random(f"{seed} {round((1 - moment.progress) * 1000)} {what}")


def level_of(site: AttentionSite) -> int:
    """The attention level of a site: 0 for the shallowest, one more for every halving of the grid."""
    return max(0, round(math.log2(site.depth)))


@dataclass(frozen=True)
class Plan:
    """The plans of all sites that a list of specs acts on, in order of execution, and why others are left alone."""

    sites: tuple[SitePlan, ...]
    notes: dict[str, str]

    def by_owner(self) -> dict[str, dict[int, SitePlan]]:
        """The plans by path of their owner, and there by number of the attention call."""
        owners: dict[str, dict[int, SitePlan]] = {}
        for plan in self.sites:
            owners.setdefault(plan.site.path, {})[plan.site.call] = plan
        return owners


def clocks(plans: Iterable[SitePlan]) -> set[str]:
    """What the plans depend on: "progress", "sigma", both or nothing."""
    found: set[str] = set()
    for plan in plans:
        for spec in plan.specs:
            found.update(spec.clocks if isinstance(spec, NAG | PerturbationSpec) else ())
            clock = getattr(getattr(spec, "schedule", None), "clock", None)
            drawn = getattr(spec, "pad", None) == "random" or (isinstance(spec, HyperTile) and spec.swap_size > 1)
            found.update({clock} if clock is not None else ())
            found.update({"progress"} if drawn else ())
    return found
