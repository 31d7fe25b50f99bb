"""From a plan to rewritten owners. Owners of equal structure share one capture, one graph and one function."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from sloth_fx.bind import Variant, Variants, held_objects, make_forward, unbound
from sloth_fx.capture import Skeleton, capture
from sloth_fx.capture.call import read_call
from sloth_fx.capture.capture import Call
from sloth_fx.locate import Survey
from sloth_fx.operators import KeyLayout
from sloth_fx.passes.reduce_kv import KeyValueReduction
from sloth_fx.passes.tile_queries import TiledAttention
from sloth_fx.plan import SitePlan
from sloth_fx.rewrite import Rewritten, reduce_name, rewrite, tile_name

Plans = dict[int, SitePlan]  # of one owner, by number of the attention call


@dataclass(frozen=True)
class RewrittenOwner:
    """What :func:`sloth_fx.bind.bind` gives an owner, but for the operator modules, which each site has for itself."""

    rewritten: Rewritten
    forward: Callable[..., Any]

    def operators(self, plan: SitePlan) -> dict[str, KeyValueReduction | TiledAttention]:
        """The operator modules of one site, by the names under which the rewritten graph calls them."""
        call, grid = plan.site.call, plan.site.grid
        assert grid is not None
        neutral = KeyLayout((grid[-2], grid[-1]), frames=grid[0] if len(grid) > 2 else 1)
        operators: dict[str, KeyValueReduction | TiledAttention] = {}
        if plan.reducing is not None:
            operators[reduce_name(call)] = KeyValueReduction(plan.site.name, plan.pooling, neutral, plan.site.key_place)
        if plan.tiling is not None:
            operators[tile_name(call)] = TiledAttention(
                plan.site.name,
                self.rewritten.attend[call],
                neutral,
                folded_heads=self.rewritten.folded_heads[call],
                concat_local=plan.tiling.concat_local,
                concat_global=plan.tiling.concat_global,
                query_place=plan.site.query_place,
                key_place=plan.site.key_place,
                border=plan.pooling.border,
            )
        return operators


@dataclass
class OwnerRewriter:
    """Rewrites the owners of one surveyed model."""

    found: Survey
    _shared: dict[Hashable, RewrittenOwner] = field(default_factory=dict)

    def rewrite(self, path: str, plans: Plans) -> RewrittenOwner:
        """The owner at ``path``, rewritten. Raises :class:`SlothError` when it cannot be captured or rewritten."""
        owner = self.found.skeleton.model.get_submodule(path)
        structure = self.found.structure[path]
        key = structure, tuple((call, plan.reducing is None, plan.tiling is None) for call, plan in plans.items())
        if key not in self._shared:
            calls = sum(site.path == path for site in self.found.sites)
            call, resized = self.found.calls[path], self.found.resized.get(structure)
            rewritten, variant = _variant(self.found.skeleton, owner, call, resized, plans, calls)
            variants = Variants([variant], held_objects(owner), _Recapture(plans, calls))
            self._shared[key] = RewrittenOwner(rewritten, make_forward(variants))
        return self._shared[key]


@dataclass(frozen=True)
class _Recapture:
    """Captures an owner again, on its own, for a call that no capture of it covers."""

    plans: Plans
    calls: int

    def __call__(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Variant:
        tensors = read_call(args, kwargs)[1]
        skeleton = Skeleton(owner, tensors[0].device if tensors else None)
        call = skeleton.fake_inputs((args, kwargs))
        return _variant(skeleton, unbound(skeleton.model), call, None, self.plans, self.calls)[1]


def _variant(
    skeleton: Skeleton, owner: nn.Module, call: Call, other: Call | None, plans: Plans, calls: int
) -> tuple[Rewritten, Variant]:
    captured = capture(skeleton, owner, call, other)
    rewritten = rewrite(captured, skeleton, plans, calls)
    _, tensors = read_call(*call)
    variant = Variant(
        captured.pattern,
        rewritten.function,
        sizes=None if captured.any_size else [tensor.shape for tensor in tensors],
        types=None if captured.any_type else [(tensor.dtype, tensor.device) for tensor in tensors],
        training=None if captured.any_mode else owner.training,
    )
    return rewritten, variant
