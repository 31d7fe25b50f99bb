"""Specs on a ``ModelPatcher`` of ComfyUI: one transform for each model and set of specs."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sloth_fx.capture.call import substitute
from sloth_fx.capture.objects import HandedOn
from sloth_fx.dynamo import outside_graphs
from sloth_fx.errors import RefusedInputsError, SlothError
from sloth_fx.integrations.comfy.collisions import check_before_loading, check_not_compiled, check_object_patches
from sloth_fx.integrations.comfy.sharing import rewritten_modules, share_modules
from sloth_fx.integrations.comfy.source import KEY, Source, note_conditionings, note_guidance
from sloth_fx.integrations.comfy.steering import Driver
from sloth_fx.integrations.comfy.trial import trial_inputs
from sloth_fx.model_adapters import ModelAdapter, assumed
from sloth_fx.patch import patch_of
from sloth_fx.perturbation_specs import PerturbationSpec
from sloth_fx.report import Report
from sloth_fx.spec import NAG, Spec
from sloth_fx.transform import FIRST_CALL, check_untouched, transform

NAME = "diffusion_model"
_KEPT = 12  # transforms of one model: a chain of nodes has one for each node, with those before it


@dataclass(frozen=True)
class Request:
    """What the nodes in front of a sampler ask for together."""

    specs: tuple[Spec, ...]
    phases: int | None = None


# By original: its transforms, the latest last. By patched model: what it was made of.
_made: weakref.WeakKeyDictionary[nn.Module, list[tuple[Request, nn.Module]]] = weakref.WeakKeyDictionary()
_origins: weakref.WeakKeyDictionary[nn.Module, tuple[Callable[[], Any], Request]] = weakref.WeakKeyDictionary()


def patch_model(
    patcher: Any, specs: Sequence[Spec] = (), *, negative: Sequence[Any] | None = None, phases: int | None = None
) -> Any:
    """A clone of ``patcher`` whose model does what ``specs`` say, besides what it did before; ``patcher`` is unchanged.

    Args:
        patcher: a ``ModelPatcher``, perhaps one that this function returned: then all specs are applied together, to
            the original model.
        negative: a CONDITIONING for :class:`sloth_fx.NAG`; default: that of the patcher.
        phases: as for :func:`sloth_fx.transform`; default: that of the patcher.

    A model is transformed once for the same specs, however often it is asked for. Raises :class:`SlothError` for what
    cannot be done as asked.
    """
    clone = patcher.clone()
    check_not_compiled(clone)
    check_object_patches(clone)
    original, before = _original_of(clone)
    request = Request((*before.specs, *specs), phases if phases is not None else before.phases)
    options = clone.model_options["transformer_options"]
    source = options.get(KEY)
    negative = negative if negative is not None else getattr(source, "negative", None)
    guides = any(isinstance(each, NAG) for each in request.specs)
    if guides and negative is None:
        raise SlothError("NAG has no negative: connect a CONDITIONING (of CLIP Text Encode) to it")
    if negative is not None and not guides:
        raise SlothError("a negative is connected, and the specs have no NAG that would read it: leave it out")
    if negative is not None and len(negative) != 1:
        raise SlothError(f"the negative of NAG has {len(negative)} parts: give that of one prompt, not combined ones")
    if request.specs:
        clone.add_object_patch(NAME, _patched(original, request))
    elif request.phases is not None:
        raise SlothError("phases is for the schedules of other nodes: put it after them")
    perturbs = any(isinstance(each, PerturbationSpec) for each in request.specs)
    options[KEY] = Source(clone.model, negative, guides=guides or perturbs, perturbs=perturbs)
    wrappers = options.setdefault("wrappers", {})
    wrappers.setdefault("prepare_sampling", {})[KEY] = [check_before_loading]
    wrappers.setdefault("outer_sample", {})[KEY] = [note_guidance]
    wrappers.setdefault("calc_cond_batch", {})[KEY] = [note_conditionings]
    return clone


def report_of(patcher: Any) -> Report:
    """What was done at each attention site of a patcher's model. Raises :class:`SlothError` if nothing was."""
    model = patcher.object_patches.get(NAME)
    if model is None or model not in _origins:
        raise SlothError("no node of Sloth FX is in front of this one: there is nothing to report")
    deferred = model.__dict__.get("forward")
    if not isinstance(deferred, _Deferred):
        return patch_of(model).report
    if deferred.patched is None:
        return Report(type(model).__name__, (), "located at the first call: sample once, then report again")
    return patch_of(deferred.patched).report


def _original_of(patcher: Any) -> tuple[nn.Module, Request]:
    """The model that nothing was done to, and what the patcher asks for already."""
    model = patcher.get_model_object(NAME)
    if not isinstance(model, nn.Module):
        raise SlothError(f"the {NAME} of this model is a {type(model).__name__}, which is no torch.nn.Module")
    if model not in _origins:
        check_untouched(model)
        return model, Request(())
    original, request = _origins[model]
    return original(), request


def _patched(original: nn.Module, request: Request) -> nn.Module:
    """``original``, transformed; the same module for the same request."""
    known = _made.setdefault(original, [])
    found = next((each for each in known if each[0] == request), None)
    if found is None:
        found = request, _transformed(original, request)
        _origins[found[1]] = weakref.ref(original), request
    known[:] = [*(each for each in known if each is not found), found][-_KEPT:]
    return found[1]


def _transformed(original: nn.Module, request: Request) -> nn.Module:
    with torch.inference_mode(
        False
    ):  # ComfyUI executes its nodes in that mode, in which less can be seen of a trial run
        return _located(original, request)


def _located(original: nn.Module, request: Request) -> nn.Module:
    inputs = trial_inputs(original)
    if inputs is not None:
        with suppress(RefusedInputsError):
            return _steered(original, request, inputs)
    _tried(original, request, FIRST_CALL)  # for the errors known by now
    return _deferring(original, request)


def _steered(original: nn.Module, request: Request, inputs: Any) -> nn.Module:
    patched = _tried(original, request, inputs)
    rewritten = rewritten_modules(patched, original)
    share_modules(patched, original, rewritten)
    Driver(patched, rewritten)
    return patched


def _tried(original: nn.Module, request: Request, inputs: Any) -> nn.Module:
    with assumed(original, ModelAdapter(latent=next(iter(_parameters(original))))):
        return transform(original, request.specs, example_inputs=inputs, phases=request.phases)


def _by_name(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {**dict(zip(_parameters(model), args, strict=False)), **kwargs}


def _parameters(model: nn.Module) -> Iterable[str]:
    return inspect.signature(model.forward).parameters


class _Deferred:
    """The forward of a model that is located with the arguments of its first call."""

    def __init__(self, original: nn.Module, request: Request) -> None:
        self._original = weakref.ref(original)
        self._request = request
        self._outside = outside_graphs(self._locate)
        self.patched: nn.Module | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.patched is None:
            self.patched = self._outside(args, kwargs)
        return self.patched(*args, **kwargs)

    def _locate(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> nn.Module:
        original = self._original()
        assert original is not None  # or there would be nobody to call it
        options = HandedOn(kwargs.get("transformer_options") or {})
        with torch.inference_mode(False):
            given = _by_name(original, args, {**kwargs, "transformer_options": options})
            inputs = substitute(given, torch.clone)  # made in inference mode, they hide what becomes of them
            return _steered(original, self._request, inputs)


def _deferring(original: nn.Module, request: Request) -> nn.Module:
    """A module of the same class, made of the same modules, that runs a :class:`_Deferred`."""
    made = copy.copy(original)
    for name in ("_forward_hooks", "_forward_pre_hooks"):
        made.__dict__[name] = made.__dict__[name].copy()
    made.__dict__["forward"] = _Deferred(original, request)
    return made
