"""The four steps in order: locate, capture, rewrite, bind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from torch import nn

from sloth_fx.bind import bind, clone
from sloth_fx.branch_trials import choose_way
from sloth_fx.branches import Branches, install
from sloth_fx.capture.capture import Call
from sloth_fx.context import TimestepContext
from sloth_fx.errors import RefusedInputsError, SlothError
from sloth_fx.guidance import guidance_for
from sloth_fx.locate import as_call, survey
from sloth_fx.model_adapters import Arguments, adapter_for, is_known, trial_call
from sloth_fx.negative import NegativeKeys, Original
from sloth_fx.owners import OwnerRewriter, PlannedVisit, RewrittenOwner
from sloth_fx.passes.guide import GuidedAttention
from sloth_fx.patch import Patch, is_patched
from sloth_fx.perturbation import perturbation_for
from sloth_fx.plan import clocks
from sloth_fx.planner import block_of, make_plan
from sloth_fx.report import Report, SiteReport
from sloth_fx.self_checks import check_guidance, why_not_checked
from sloth_fx.site_operators import make_operators
from sloth_fx.spec import NAG, Spec
from sloth_fx.undo import undone_on_error

FIRST_CALL = "first call"


def transform(
    model: nn.Module,
    spec: Spec | Sequence[Spec],
    *,
    example_inputs: Any = None,
    strict: bool = True,
    phases: int | None = None,
) -> nn.Module:
    """A copy of ``model`` that shares its weights and whose attention does what ``spec`` says.

    Args:
        model: a UNet, a transformer, or any module that computes attention; it is not changed. Not compiled, not yet
            patched, and whole on one device.
        spec: what to do, or a sequence of such, applied in order: ``SlothfulAttention``, ``NearSightedTile``,
            ``NearSightedAttention``, ``TokenDownsample``, ``HyperTile``, ``TokenMerging``, ``NAG``, and one of ``PAG``,
            ``SEG``, ``TPG``, ``SLG``, ``SAG`` and ``Perturb``.
        example_inputs: arguments for ``model``, a dict (by keyword) or a tuple (by position). Shapes and dtypes matter,
            and the values of masks, lengths and coordinates. Default: made from the model's config where that is
            possible; otherwise the first call of the patched model serves, as it does for ``"first call"``.
        strict: raise when a selected site cannot be rewritten; ``False`` leaves such a site as it was. Either way the
            report says why. Sites whose tokens form no known grid are left alone unless ``where`` selects them.
        phases: quantise the schedules to this many phases (1 or more), so that ``torch.compile`` makes at most as many
            graphs. ``None``: exact in time, and as many graphs as there are distinct sets of strides and tiles.

    Returns:
        A module of the same class, with the same parameter names. See :func:`sloth_fx.report` and
        :func:`sloth_fx.context`.

    Raises:
        SlothError: for anything that cannot be done as asked; the model is then as it was.
    """
    request = _Request(_checked_specs(spec), strict, _checked_phases(phases))
    check_module(model)
    check_untouched(model)
    check_whole(model)
    adapter = adapter_for(model)
    patched = clone(model)
    name = type(model).__name__
    report = Report(name, (), "located at the first call")
    expects_negative = any(isinstance(each, NAG) for each in request.specs)
    context = TimestepContext(model, adapter, phases, expects_negative=expects_negative)
    patch = Patch(context, report, request.specs, request.strict, request.phases)
    if isinstance(example_inputs, str) and example_inputs == FIRST_CALL:
        call = None
    else:
        call = as_call(example_inputs) if example_inputs is not None else trial_call(model, adapter)
    try:
        if call is not None:
            request(patched, patch, call)
    except RefusedInputsError:
        if example_inputs is not None or is_known(model):
            raise
        call = None  # it was no more than a guess
    if call is None and any(_may_compute_attention(module) for module in model.modules()):
        patch.pending = request
    elif call is None:
        raise SlothError(f"{type(model).__name__} computes no attention: there is nothing to transform")
    patch.install(patched)
    return patched


@dataclass(frozen=True)
class _Request:
    """What :func:`transform` was asked for; calling it does that to a clone, given arguments for a trial run."""

    specs: tuple[Spec, ...]
    strict: bool
    phases: int | None

    def __call__(self, model: nn.Module, patch: Patch, call: Call) -> None:
        with undone_on_error(model, patch.context):
            self._act(model, patch, call)

    def _act(self, model: nn.Module, patch: Patch, call: Call) -> None:
        found = survey(model, adapter_for(model), call)
        guidance = guidance_for(make_plan(self.specs, found.sites, strict=self.strict), found, call)
        plan = guidance.plan
        if self.phases is not None and len(clocks(plan.sites)) > 1:
            raise SlothError("phases= needs one clock, and these specs follow both progress and sigma: use phases=None")

        rewriter = OwnerRewriter(found)
        done: dict[str, tuple[RewrittenOwner, list[PlannedVisit]]] = {}
        notes = dict(plan.notes)
        for path, plans in plan.by_owner().items():
            try:
                done[path] = rewriter.rewrite(path, plans)
            except SlothError as error:
                if self.strict or guidance.reason is not None:  # a negative text has to pass all sites, or none
                    raise SlothError(f"{path}: {error}") from error
                notes.update({each.site.name: str(error) for each in plans.values()})

        if found.latent is not None:  # a schedule of the caller's own may fail: better now
            patch.context.try_layouts(plan.sites, found.latent)

        perturbation = perturbation_for(model, self.specs, plan, found, call)

        patch.context.located_with(model, found.adapter, *call)
        keys = NegativeKeys(Original(found.skeleton), Arguments(found.skeleton.model, found.adapter))
        acting: dict[str, tuple[str, ...]] = {}
        for path, (owner, visits) in done.items():
            plans = plan.by_owner()[path]
            operators: dict[str, nn.Module] = {}
            for visit, rewritten in zip(visits, owner.rewritten, strict=True):
                for core, each in visit.plans.items():
                    made = make_operators(rewritten, each, visit.number)
                    operators |= made
                    patch.context.attach(each, list(made.values()))
                    guiding = [operator for operator in made.values() if isinstance(operator, GuidedAttention)]
                    keys.operators.update((guidance.numbers[each.site.name], operator) for operator in guiding)
                    for number in visit.served[core]:
                        name = plans[number].site.name
                        acting[name] = tuple(type(spec).__name__ for spec in each.specs)
                        remark = plans[number].remark + (f" ({guidance.reason})" if each.branching else "")
                        notes[name] = rewritten.done[core] + remark
                patch.graphs[path] = rewritten.graph
            bind(model.get_submodule(path), owner.forward, operators)
        if keys.operators:
            patch.context.guided_by(keys)
        branching = next((each for each in plan.sites if each.branching is not None), None)
        if branching is not None:
            branches = Branches(keys.original, keys.arguments)
            install(model, branches)
            reason = choose_way(model, branches, call)
            way = "what both texts have in common is computed once" if reason is None else f"two branches: {reason}"
            unchecked = why_not_checked(model, call, branching.site.q_tokens * keys.arguments.rows(*call))
            if unchecked is None:
                unchecked = check_guidance(model, call)
            if unchecked is not None:
                way += f", not tried beforehand: {unchecked}"
            notes.update((each.site.name, f"{notes[each.site.name]}; {way}") for each in plan.sites if each.branching)
            patch.context.attach(branching, [branches])
            patch.context.guided_by(branches)
        if perturbation is not None:
            ways = perturbation.install(model, patch.context, call)
            for site in found.sites:
                block, spec_name = block_of(site.path), type(perturbation.perturbed.spec).__name__
                if spec_name in acting.get(site.name, ()):
                    notes[site.name] += f"; {ways['']}"
                elif block in perturbation.skipped:
                    acting[site.name] = (*acting.get(site.name, ()), spec_name)
                    notes[site.name] = ways[block]
        if found.latent is not None:
            patch.context.resize(found.latent)
        sites = (SiteReport.of(site, acting.get(site.name, ()), notes.get(site.name, "")) for site in found.sites)
        patch.report = Report(type(model).__name__, tuple(sites))


def check_module(model: Any) -> None:
    """Raise :class:`SlothError` for what is no module."""
    if not isinstance(model, nn.Module):
        hint = "; pass its unet or transformer" if hasattr(model, "unet") or hasattr(model, "transformer") else ""
        raise SlothError(f"{type(model).__name__} is no torch.nn.Module{hint}")


def check_untouched(model: nn.Module) -> None:
    """Raise :class:`SlothError` for a model that is compiled or patched."""
    if any(hasattr(each, "_orig_mod") or each._compiled_call_impl is not None for each in model.modules()):
        raise SlothError(f"{type(model).__name__} is compiled already: transform first, then compile what it returns")
    if any(is_patched(module) for module in model.modules()):
        raise SlothError(
            f"{type(model).__name__} is patched already: give all specs in one call, to the original model"
        )


def check_whole(model: nn.Module) -> None:
    """Raise :class:`SlothError` for a model whose tokens are spread over several devices."""
    for path, module in model.named_modules():
        for holder in (module, getattr(module, "processor", None)):
            config = getattr(holder, "_parallel_config", None)
            if config is not None:
                raise SlothError(
                    f"{path or type(model).__name__}: its sequence is spread over several devices ({config!r:.80}), "
                    "and each has tokens in no order that is a grid: transform a model without enable_parallelism"
                )


def _may_compute_attention(module: nn.Module) -> bool:
    """Torch's own layers do not, but for these two families; what anybody else's do is only seen when they run."""
    kind = type(module)
    return not kind.__module__.startswith("torch.nn.") or kind.__name__.startswith(("Multihead", "Transformer"))


def _checked_specs(spec: Any) -> tuple[Spec, ...]:
    specs = tuple(spec) if isinstance(spec, (list, tuple)) else (spec,)
    kinds = get_args(Spec)
    if not specs or spec is None:
        raise SlothError(f"the spec is empty: give one of {', '.join(kind.__name__ for kind in kinds)}")
    for each in specs:
        if not isinstance(each, kinds):
            name = each.__name__ if isinstance(each, type) else type(each).__name__
            raise SlothError(f"{name} is no spec: give instances of {', '.join(kind.__name__ for kind in kinds)}")
    return specs


def _checked_phases(phases: Any) -> int | None:
    if phases is not None and (not isinstance(phases, int) or isinstance(phases, bool) or phases < 1):
        raise SlothError(f"phases={phases!r}: a number of phases from 1, or None for schedules that are exact in time")
    return phases
