"""How a negative text passes a model that has two branches, tried at the transform: as values that hold both texts, or
in rows of its own."""

from __future__ import annotations

import traceback

import torch
from torch import nn

from sloth_fx.branches import Branches, branches_of, check_rows, count_tokens, share
from sloth_fx.branching import NoImageError, TellImages, UnwritableError, run_apart
from sloth_fx.capture.capture import Call
from sloth_fx.capture.skeleton import Rehearsal, Skeleton, with_data
from sloth_fx.errors import SlothError
from sloth_fx.layouts import has_layouts, set_layouts
from sloth_fx.model_adapters import Arguments
from sloth_fx.negative import Original, batch_of


def check_widens(original: Original, arguments: Arguments, call: Call) -> None:
    """Raise :class:`SlothError` for a model that does not take more rows than those of a ``call``."""
    check_rows(arguments, call)
    skeleton = original.skeleton
    branches = Branches(original, arguments)
    branches.batch = batch_of(arguments, call, 1)
    args, kwargs = skeleton.fake_inputs(call)
    with skeleton.running():
        try:
            skeleton.model(*args, **kwargs)
        except Exception:
            return  # it runs on real data alone, and what it does there is seen there
        args, kwargs = branches.widened(args, kwargs)
        try:
            skeleton.model(*args, **kwargs)
        except Exception as error:
            raise SlothError(
                "the negative text needs rows of its own in the batch, and with more rows "
                f"{type(skeleton.model).__name__} does not run: {type(error).__name__}: {str(error).strip():.200}"
            ) from error


def choose_way(model: nn.Module, branches: Branches, call: Call) -> str | None:
    """Let ``model``, which has ``branches``, compute once what both texts have in common; or say why its calls are
    widened. Raises :class:`SlothError` where neither is possible."""
    texts = [id(each) for each in branches.arguments.text(*call).values()]
    labelled = branches.original.labelled(call)
    for name, each in labelled.items():
        if id(each) in texts and each.ndim < 2:
            raise SlothError(
                f"the text {name} has shape {tuple(each.shape)}, and no rows that a negative text could have beside "
                "it: NAG takes texts (B, N, C), or (N, C) in a list"
            )
    branches.located = {name: count_tokens(each) for name, each in labelled.items() if id(each) in texts}
    reason = why_not_shared(model, call)
    if reason is None:
        share(model)
        return None
    try:
        check_widens(branches.original, branches.arguments, call)
    except SlothError as error:
        raise SlothError(f"{error}; and what both texts have in common cannot be computed once ({reason})") from error
    return reason


def why_not_shared(model: nn.Module, call: Call) -> str | None:
    """Why calls of ``model``, patched and with branches, cannot compute once what both texts have in common: tried on a
    copy without data, and where the host is steered by what it computes, on real data."""
    skeleton = Skeleton(model)
    reason, by_data = _why_not(skeleton, skeleton.fake_inputs(call))
    tensors = [*model.parameters(), *model.buffers()]
    if not by_data or any(each.is_meta for each in tensors):
        return reason
    device = tensors[0].device if tensors else torch.device("cpu")
    trial = Rehearsal(model)
    reason, _ = _why_not(trial, with_data(call, device))
    if reason is None:
        branches_of(model).reads = True
        branches_of(model).apart = branches_of(trial.model).apart
    return reason


def _why_not(trial: Skeleton | Rehearsal, call: Call) -> tuple[str | None, bool]:
    """What is raised where ``trial`` runs on a call in two branches, and whether that is for want of data."""
    share(trial.model)
    set_layouts(trial.model, guided=True)
    branches = branches_of(trial.model)
    branches.reads = isinstance(trial, Rehearsal)
    text = [id(each) for each in branches.arguments.text(*call).values()]
    labelled = branches.original.labelled(call)
    branches.negative = {
        name: each.roll(1, -1) for name, each in labelled.items() if id(each) in text or "pooled" in name
    }
    while True:
        try:
            with trial.running(), TellImages(trial.model):
                trial.model(*call[0], **call[1])
            return _mistaken(trial, call), False
        except Exception as error:  # whatever the host's Python does with what stands for a tensor
            cause = _cause(error)
            apart = _innermost(trial.model, cause) if branches.reads else None
            if apart is None or apart in branches.apart:
                reason = str(cause).strip().splitlines()
                for_want = not branches.reads and not isinstance(cause, (TypeError, UnwritableError))
                return f"{type(cause).__name__}: {reason[0] if reason else 'no message'}", for_want
            branches.apart.append(apart)
            run_apart(trial.model.get_submodule(apart))


def _mistaken(trial: Skeleton | Rehearsal, call: Call) -> str | None:
    """What is taken for the image and is not, where all differs that a negative text may consist of: masks too."""
    branches = branches_of(trial.model)
    kept = [id(each) for each in (branches.arguments.latent(*call), branches.arguments.timestep(*call))]
    labelled = branches.original.labelled(call)
    others = {name: each.clone() for name, each in labelled.items() if id(each) not in kept}
    branches.negative = {**others, **branches.negative}
    try:
        with trial.running(), TellImages(trial.model):
            trial.model(*call[0], **call[1])
    except Exception as error:  # not all of it can differ
        cause = _cause(error)
        return f"{type(cause).__name__}: {cause}" if isinstance(cause, NoImageError) else None
    return None


def _cause(error: Exception) -> BaseException:
    """What was raised in the host's Python; users are told of it in other words."""
    return error.__cause__ or error


def _innermost(model: nn.Module, error: BaseException) -> str | None:
    """The innermost module that raised an error, of those in which nothing is done: no image reads text there."""
    names = {id(module): name for name, module in model.named_modules() if not has_layouts(module)}
    frames = (frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__))
    found = [names[id(each)] for each in frames if id(each) in names]
    return found[-1] if found else None
