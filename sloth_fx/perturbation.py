"""How a model is asked once more with its attention perturbed: decided before anything is changed, then installed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sloth_fx.capture.capture import Call
from sloth_fx.capture.skeleton import Skeleton
from sloth_fx.context import TimestepContext
from sloth_fx.errors import SlothError
from sloth_fx.locate import Survey
from sloth_fx.model_adapters import Arguments
from sloth_fx.perturbation_specs import SAG, SLG, PerturbationSpec
from sloth_fx.perturbed import Perturbed, install, latent_argument, share, why_not_shared
from sloth_fx.plan import Plan, SitePlan
from sloth_fx.planner import block_of
from sloth_fx.prediction import flow_of
from sloth_fx.self_attention_guidance import SelfAttentionGuidance
from sloth_fx.self_checks import check_shared, why_not_checked
from sloth_fx.skipping import Streams, skip, skipped_blocks, streams_of
from sloth_fx.spec import Spec


@dataclass(frozen=True)
class Perturbation:
    """What runs the calls of a model, the ``plan`` that tells when, and the blocks that are left out."""

    plan: SitePlan
    perturbed: Perturbed
    skipped: dict[str, Streams]

    def install(self, model: nn.Module, context: TimestepContext, call: Call) -> dict[str, str]:
        """Let ``model``, rewritten, be asked once more. Returns notes for the report, by the name of the block that is
        left out, or under "" for all sites."""
        install(model, self.perturbed)
        skipped = [skip(model.get_submodule(path), streams) for path, streams in self.skipped.items()]
        context.attach(self.plan, [self.perturbed, *skipped])
        if isinstance(self.perturbed, SelfAttentionGuidance):
            return {"": "a call of its own: its latent is another"}
        reason = why_not_shared(model, call)
        rows = len(self.perturbed.latent_of(*call))
        unchecked = why_not_checked(model, call, self.plan.site.q_tokens * rows)
        if reason is None and unchecked is None:
            reason, unchecked = check_shared(model, call)
        if reason is None:
            share(model)
        way = "what lies before it is computed once" if reason is None else f"a call of its own: {reason}"
        if reason is None and unchecked is not None:
            way += f", not tried beforehand: {unchecked}"
        if reason is None and self.plan.branching is not None:
            way += "; while the negative text guides, a call of its own"
        return {"": way, **dict.fromkeys(self.skipped, f"left out in the perturbed branch; {way}")}


def perturbation_for(
    model: nn.Module, specs: Sequence[Spec], plan: Plan, found: Survey, call: Call
) -> Perturbation | None:
    """How ``call`` of a ``model`` is perturbed, if a spec asks for it. Raises :class:`SlothError` where that is not
    possible."""
    spec = next((each for each in specs if isinstance(each, PerturbationSpec)), None)
    if spec is None:
        return None
    arguments = Arguments(found.skeleton.model, found.adapter)
    latent = latent_argument(spec, found.skeleton.model, arguments, call)
    _check_predicts(found.skeleton, call, spec)
    site, skipped = next((each.site for each in plan.sites if each.perturbing is spec), None), {}
    if isinstance(spec, SLG):
        paths = skipped_blocks(spec, found.sites)
        skipped = streams_of(model, found.skeleton, call, paths)
        site = next(site for site in found.sites if block_of(site.path) in paths)
    assert site is not None
    if isinstance(spec, SAG):
        flow = flow_of(type(model).__name__, found.adapter)
        perturbed: Perturbed = SelfAttentionGuidance(spec, latent, found.adapter.axes, flow)
    else:
        perturbed = Perturbed(spec, latent)
    branching = next((each.branching for each in plan.sites if each.branching is not None), None)
    own = SitePlan(site=site, shallowest=site, deepest=site.depth, perturbing=spec, branching=branching)
    return Perturbation(own, perturbed, skipped)


def _check_predicts(skeleton: Skeleton, call: Call, spec: PerturbationSpec) -> None:
    """Raise :class:`SlothError` for a model that gives lists of feature maps, as a ControlNet does."""
    args, kwargs = skeleton.fake_inputs(call)
    with skeleton.running():
        try:
            result = skeleton.model(*args, **kwargs)
        except Exception:
            return  # it runs on real data alone, and what it does there is seen there
    if any(_is_list(each) for each in (result.values() if isinstance(result, dict) else _items(result))):
        raise SlothError(
            f"{type(spec).__name__} steers a prediction away from another, and {type(skeleton.model).__name__} returns "
            "lists of tensors, which are none: transform the model that they go into"
        )


def _items(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else (value,)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(each, Tensor) for each in value)
