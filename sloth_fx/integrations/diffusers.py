"""Operators for the length of a ``with`` block in a diffusers pipeline, or what is built like one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn

from sloth_fx.checks import between, require
from sloth_fx.errors import RefusedInputsError, SlothError
from sloth_fx.integrations.follow import Follower
from sloth_fx.integrations.handle import Handle
from sloth_fx.integrations.negative_prompt import PromptEncoder, checked
from sloth_fx.integrations.offload import offload_paused
from sloth_fx.patch import is_patched
from sloth_fx.perturbation_specs import PerturbationSpec
from sloth_fx.spec import NAG, Spec
from sloth_fx.transform import FIRST_CALL, transform

GUIDANCE_SCALE = between(1e-6, 1e6)
DENOISERS = ("unet", "transformer", "transformer_2")
"""The names that pipelines have for what denoises. Those of a pipeline that has several take turns over the run."""


def attach(
    pipe: Any,
    spec: Spec | Sequence[Spec],
    *,
    negative_prompt: str | Sequence[str] | None = None,
    example_inputs: Any = None,
    strict: bool = True,
    phases: int | None = None,
    guidance_scale: float | None = None,
) -> Handle:
    """Patch the denoiser of a pipeline, follow its scheduler, and put everything back at the end::

        with sloth_fx.attach(pipe, SlothfulAttention()) as handle:
            image = pipe("a sloth").images[0]

    or ``handle = attach(...)`` and later ``handle.detach()``. The pipeline's own model and scheduler are not changed:
    the pipeline gets a copy of the one, which shares its weights, and the other is only read. Each call of the model
    reads the scheduler that the pipeline has then: progress is 1 - t / 1000 of its timestep t, so a run that starts
    late (image to image) starts at a late progress; sigma is the scheduler's noise over signal.

    Args:
        pipe: has a ``unet`` or a ``transformer`` (and maybe a ``transformer_2``), neither compiled nor attached yet.
        spec, example_inputs, strict, phases: as for :func:`sloth_fx.transform`.
        negative_prompt: for NAG: one for all images, or one for each prompt. The pipeline's own text encoders encode it
            whenever they encode a prompt. Its rows in a batch with classifier-free guidance are found by themselves.
        guidance_scale: for guidance by perturbed attention (PAG and its kin) in pipelines that call the model once for
            each text and keep the scale of their classifier-free guidance to themselves; others tell it.

    Raises:
        SlothError: for anything that cannot be done as asked; the pipeline is then as it was.
    """
    denoisers = _denoisers_of(pipe)
    _check_negative(negative_prompt, spec)
    _check_scale(guidance_scale, spec)
    with ExitStack() as undo:
        with offload_paused(pipe):
            models = {
                name: _transformed(pipe, name, model, spec, example_inputs, strict, phases)
                for name, model in denoisers.items()
            }
            steers = _holds(spec, PerturbationSpec)
            encodes = negative_prompt is not None or (steers and hasattr(pipe, "encode_prompt"))
            encoder = PromptEncoder(pipe, negative_prompt) if encodes else None
            if encoder is not None:
                undo.callback(encoder.stop)
            for name, patched in models.items():
                undo.callback(setattr, pipe, name, denoisers[name])
                follower = Follower(pipe, patched, encoder, steers=steers, guidance_scale=guidance_scale)
                undo.callback(follower.stop)
                setattr(pipe, name, patched)
        return Handle(pipe, denoisers, models, undo.pop_all(), encoder)


def _check_negative(prompt: Any, spec: Any) -> None:
    if prompt is None:
        return
    if not _holds(spec, NAG):
        raise SlothError("negative_prompt is for NAG, which the spec does not hold; the pipeline's own is for guidance")
    checked(prompt)


def _check_scale(scale: Any, spec: Any) -> None:
    if scale is None:
        return
    if not _holds(spec, PerturbationSpec):
        raise SlothError("guidance_scale is for guidance by perturbed attention (PAG, SEG, SAG, ...): none is given")
    require("guidance_scale", scale, GUIDANCE_SCALE)


def _holds(spec: Any, kind: type[Any]) -> bool:
    return any(isinstance(each, kind) for each in (spec if isinstance(spec, (list, tuple)) else [spec]))


def _denoisers_of(pipe: Any) -> dict[str, nn.Module]:
    """The pipeline's denoisers by name. Raises :class:`SlothError` unless all can be patched."""
    kind = type(pipe).__name__
    found = {name: model for name in DENOISERS if (model := getattr(pipe, name, None)) is not None}
    if not found:
        hint = (
            "it is a model: sloth_fx.transform patches those"
            if isinstance(pipe, nn.Module)
            else "patch its denoiser with sloth_fx.transform, and assign what that returns"
        )
        raise SlothError(f"{kind} has no unet and no transformer to attach to; {hint}")
    for name, model in found.items():
        if not isinstance(model, nn.Module):
            raise SlothError(
                f"{kind}.{name} is a {type(model).__name__}, which is no torch.nn.Module: nothing to patch"
            )
        if any(is_patched(module) for module in model.modules()):
            raise SlothError(
                f"{kind}.{name} is patched already: give all specs in one call, attach(pipe, [first, second]), "
                "after detaching what is attached now"
            )
        if any(hasattr(each, "_orig_mod") or each._compiled_call_impl is not None for each in model.modules()):
            raise SlothError(
                f"{kind}.{name} is compiled already: attach to the pipeline first, and compile pipe.{name} while it is "
                "attached"
            )
    return found


def _transformed(
    pipe: Any, name: str, model: nn.Module, spec: Any, example_inputs: Any, strict: bool, phases: int | None
) -> nn.Module:
    try:
        try:
            return transform(model, spec, example_inputs=example_inputs, strict=strict, phases=phases)
        except RefusedInputsError:
            if example_inputs is not None:
                raise
            # It takes more than its config tells (an image prompt has been added to it), and the pipeline will give it.
            return transform(model, spec, example_inputs=FIRST_CALL, strict=strict, phases=phases)
    except SlothError as error:
        raise SlothError(f"{type(pipe).__name__}.{name}: {error}") from error
