"""What the specs ask of one site, and what that comes to at a moment: a :class:`KeyLayout`."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from sloth_fx.errors import SlothError
from sloth_fx.operators import KeyLayout, Pooling, axis_strides, flat_stride
from sloth_fx.operators.tiling import tile_size
from sloth_fx.schedule import Moment, StepDecay, ratio_at
from sloth_fx.site import AttentionSite
from sloth_fx.spec import NearSightedAttention, NearSightedTile, Reduction, SlothfulAttention, Spec
from sloth_fx.where import matches, nearest

Tiling = NearSightedTile | NearSightedAttention
Reducing = SlothfulAttention | NearSightedAttention
_Spec = TypeVar("_Spec")


@dataclass(frozen=True, kw_only=True)
class SitePlan:
    """One site and the specs that act on it.

    ``reducing`` says how its keys and values are pooled, ``tiling`` how its queries are tiled; one NearSightedAttention
    may be both, and SlothfulAttention with NearSightedTile pools the keys within each tile. ``shallowest`` is the site
    against which depth is measured, ``deepest`` the greatest depth of the model.
    """

    site: AttentionSite
    shallowest: AttentionSite
    deepest: float
    reducing: Reducing | None = None
    tiling: Tiling | None = None

    @property
    def specs(self) -> tuple[Spec, ...]:
        """The specs at work, each once."""
        return tuple({id(spec): spec for spec in (self.reducing, self.tiling) if spec is not None}.values())

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

    def layout(self, moment: Moment, latent: tuple[int, int]) -> KeyLayout:
        """Windows, tiles and samples at ``moment``, for a latent of (rows, columns) ``latent``."""
        grid = self.site.grid_at(latent)
        if grid is None:
            raise SlothError(f"{self.site.name}: the grid of its {self.site.q_tokens} tokens is not known")
        stride, tile = self._stride(moment, grid, latent), self._tile(moment, grid)
        flat, long_axis = self._direction(stride)

        def along(factor: float, area: tuple[int, int]) -> tuple[int, int]:
            return flat_stride(factor, math.prod(area)) if flat else axis_strides(factor, area, long_axis)

        window = along(stride, tile or grid) if stride > 1 else (1, 1)
        if self.tiling is None or tile is None:
            return KeyLayout(grid, window, flat=flat and stride > 1)
        layout = KeyLayout(grid, window, tile, self._pad(moment, grid, tile), flat=flat)
        ratio = self.tiling.global_ratio_at(ratio_at(self.tiling.schedule, moment))
        if ratio <= 0:
            return layout
        tiles = math.prod(math.ceil(size / part) for size, part in zip(grid, tile, strict=True))
        return layout._replace(
            samples=along(max(1.0, stride) * tiles / ratio, grid),
            sample_window=along(stride, grid) if stride > 1 else (1, 1),
        )

    def _direction(self, stride: float) -> tuple[bool, str]:
        """Whether windows and samples run along the flattened tokens, and which axis otherwise takes more."""
        if isinstance(self.tiling, NearSightedTile) and stride <= 1:
            return self.tiling.mode == "1d", self.tiling.long_axis
        reduction = self.reduction
        return (reduction.mode.startswith("1d"), reduction.long_axis) if reduction is not None else (False, "y")

    def _stride(self, moment: Moment, grid: tuple[int, int], latent: tuple[int, int]) -> float:
        reduction = self.reduction
        if reduction is None or self.reducing is None:
            return 1.0
        relative = self.site.depth**-2.0
        if isinstance(self.reducing.schedule, StepDecay):  # the release of 2023-12-11 counts the tokens that there are
            first = self.shallowest.grid_at(latent)
            relative = math.prod(grid) / math.prod(first) if first is not None else relative
        return reduction.stride(ratio_at(self.reducing.schedule, moment), relative, self.deepest)

    def _tile(self, moment: Moment, grid: tuple[int, int]) -> tuple[int, int] | None:
        if self.tiling is None or not self.tiling.tiles(self.site.downscale):
            return None
        size = self.tiling.tile(ratio_at(self.tiling.schedule, moment))
        tile = tile_size(grid[0], size), tile_size(grid[1], size)
        return None if tile == grid else tile

    def _pad(self, moment: Moment, grid: tuple[int, int], tile: tuple[int, int]) -> tuple[int, int]:
        assert self.tiling is not None
        if self.tiling.pad == "end":
            return 0, 0
        draw = random.Random(f"{self.tiling.seed} {round((1 - moment.progress) * 1000)} {self.site.name}")
        rows, columns = (draw.randint(0, -size % part) for size, part in zip(grid, tile, strict=True))
        return rows, columns


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


def make_plan(specs: Sequence[Spec], sites: Sequence[AttentionSite], *, strict: bool = True) -> Plan:
    """Which spec acts where.

    Raises :class:`SlothError` for a spec that acts nowhere, for two that conflict, and with ``strict`` for a selected
    site whose grid is not known.
    """
    images = [site for site in sites if site.kind == "self"]
    if not images:
        kinds = ", ".join(dict.fromkeys(site.kind for site in sites))
        raise SlothError(f"reducing and tiling need self-attention, and this model has none (it has: {kinds})")
    shallowest = min(images, key=lambda site: site.depth)
    deepest = max(site.depth for site in images)
    plans = {site.name: SitePlan(site=site, shallowest=shallowest, deepest=deepest) for site in images}
    notes = {site.name: f"{site.kind}-attention" for site in sites if site.kind != "self"}
    for spec in specs:
        chosen = _selected(spec, sites, images)
        unfit = {site.name: reason for site in chosen if (reason := _unfit(spec, site, strict)) is not None}
        if len(unfit) == len(chosen):
            raise SlothError(
                f"{type(spec).__name__} acts on no site that it selects: " + _few(map(": ".join, unfit.items()))
            )
        for site in chosen:
            if site.name not in unfit:
                plans[site.name] = _with(plans[site.name], spec)
        notes.update(unfit)
    for name, plan in plans.items():
        if not plan.specs:
            notes.setdefault(name, "not selected by where")
    return Plan(tuple(plan for plan in plans.values() if plan.specs), notes)


def _selected(spec: Spec, sites: Sequence[AttentionSite], images: list[AttentionSite]) -> list[AttentionSite]:
    chosen = [site for site in images if matches(spec.where, site)]
    if chosen:
        return chosen
    others = [site.name for site in sites if matches(spec.where, site)]
    if others:
        raise SlothError(
            f"{type(spec).__name__} acts on self-attention only, and where={spec.where!r} selects none: "
            f"{_few(others)} are {', '.join(dict.fromkeys(s.kind for s in sites if s.name in others))}-attention"
        )
    raise SlothError(
        f"{type(spec).__name__}: where={spec.where!r} matches no site; nearest: {_few(nearest(spec.where, images))}"
    )


def _unfit(spec: Spec, site: AttentionSite, strict: bool) -> str | None:
    """Why a spec that selects a site does nothing there."""
    if site.grid is None:
        reason = f"{type(spec).__name__} needs rows and columns, and the grid of its {site.q_tokens} tokens is unknown"
        if strict:
            raise SlothError(f"{site.name}: {reason}; select other sites with where=, or pass strict=False")
        return reason
    if isinstance(spec, SlothfulAttention) and site.stage == "middle" and spec.keep_middle:
        return "middle block, kept (keep_middle)"
    if isinstance(spec, NearSightedTile) and not spec.tiles(site.downscale):
        return f"{site.downscale:g} times coarser than the latent, so not tiled (max_depth={spec.max_depth})"
    return None


def _with(plan: SitePlan, spec: Spec) -> SitePlan:
    if not isinstance(spec, NearSightedTile):
        plan = replace(plan, reducing=_only(plan, plan.reducing, spec, "reduce the keys of"))
    if not isinstance(spec, SlothfulAttention):
        plan = replace(plan, tiling=_only(plan, plan.tiling, spec, "tile"))
    return plan


def _only(plan: SitePlan, taken: object, spec: _Spec, deed: str) -> _Spec:
    if taken is not None:
        raise SlothError(
            f"{type(taken).__name__} and {type(spec).__name__} both {deed} {plan.site.name}: "
            "give them different sites with where="
        )
    return spec


def _few(names: Iterable[str], limit: int = 4) -> str:
    listed = list(names)
    return ", ".join(listed[:limit]) + (f", ... ({len(listed)} in all)" if len(listed) > limit else "")
