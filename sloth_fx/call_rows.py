"""The rows of the batch in all that a call is given, and in what it gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sloth_fx.branching import Groups, picked_groups
from sloth_fx.capture.capture import Call
from sloth_fx.capture.objects import HandedOn


def picked(value: Any, groups: Groups, batch: int) -> Any:
    """The rows of some ``groups`` of the batch: of a tensor that has a row for each, and of options that say how."""
    if isinstance(value, HandedOn) and value.of_groups is not None:
        return value.of_groups(groups)
    if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] != batch or all(groups):
        return value
    return picked_groups(value, groups)


def can_be_picked(call: Call, latent: Tensor) -> bool:
    """Whether rows can be picked of all that a call has, because each tensor plainly has a row for each of the
    ``latent``, or one for all. Otherwise the model is asked about all rows once more, which is as right.

    Not where the rows may lie along another axis, or something else counts as many, or there is something for each row
    that is no tensor (a list of sizes). Not with masks: of fewer texts the longest may be a shorter one, and a host
    that packs them lays its tokens in another order. And not where options of a host may go by the groups of the batch.
    """
    args, kwargs = call
    given = [*(("", each) for each in args), *kwargs.items()]
    return all(value is latent or _is_by_row(name, value, len(latent)) for name, value in given)


def _is_by_row(name: str, value: Any, batch: int) -> bool:
    if isinstance(value, Tensor):
        counts = (not value.is_floating_point() and "timestep" not in name) or "mask" in name
        return value.numel() == 1 or (value.shape[0] in (1, batch) and batch not in value.shape[1:] and not counts)
    if isinstance(value, HandedOn):
        return value.of_groups is not None
    if isinstance(value, dict):
        return all(_is_by_row(*each, batch) for each in value.items())
    if isinstance(value, (list, tuple)):  # of feature maps, and not of samples
        maps = [each for each in value if each is not None]
        return len(value) != batch and all(_has_rows(each, batch) for each in maps)
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device))


def _has_rows(value: Any, batch: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 2 and value.shape[0] == batch and batch not in value.shape[1:]


def has_batch(result: Any, batch: int) -> bool:
    """Whether a result is a prediction for each row of the batch."""
    if not isinstance(result, Tensor) or result.ndim == 0:
        return False
    return result.shape[0] == batch and result.dtype.is_floating_point
