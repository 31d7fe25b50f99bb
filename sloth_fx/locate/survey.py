"""The trial runs of a model: one for its sites, and one at another size to tell what depends on size."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sloth_fx.capture.call import read_call
from sloth_fx.capture.capture import Call, fingerprint
from sloth_fx.capture.skeleton import Skeleton
from sloth_fx.errors import SlothError
from sloth_fx.locate.probe import Probe
from sloth_fx.locate.sites import locate
from sloth_fx.model_adapters import Arguments, ModelAdapter, latent_size
from sloth_fx.site import AttentionSite


@dataclass(frozen=True)
class Survey:
    """What the trial runs of a model told.

    By path of the owner, ``calls`` holds the arguments of its first call, and ``structure`` what it shares with the
    owners that take the same path through the same code. ``resized`` holds, for each such structure, a call at another
    size (none where the model does not run at another size).
    """

    skeleton: Skeleton
    sites: list[AttentionSite]
    calls: dict[str, Call]
    structure: dict[str, Hashable]
    resized: dict[Hashable, Call]
    latent: tuple[int, int] | None


def survey(model: nn.Module, adapter: ModelAdapter, call: Call) -> Survey:
    """Run a skeleton of ``model`` on (args, kwargs) ``call`` and at another size.

    Raises :class:`SlothError` when the model does not run on these inputs, or has no attention.
    """
    skeleton = Skeleton(model)
    args, kwargs = skeleton.fake_inputs(call)
    probe = Probe(skeleton, args, kwargs)
    if not probe.attentions:
        raise SlothError(f"{type(model).__name__} computes no attention: there is nothing to transform")
    latent = Arguments(model, adapter).latent(args, kwargs)
    size = latent_size(latent)
    sites = locate(probe, size)
    calls = _first_calls(probe)
    structure = {path: _structure(skeleton, path, first) for path, first in calls.items()}
    examples = {each: path for path, each in reversed(structure.items())}  # the first owner of each structure
    again = _first_calls(_probe_resized(skeleton, (args, kwargs), latent, examples.values()))
    resized = {each: again[path] for each, path in examples.items() if path in again}
    return Survey(skeleton, sites, calls, structure, resized, size)


def as_call(example_inputs: Any) -> Call:
    """``example_inputs`` as (args, kwargs): a mapping gives keyword arguments, a tuple or list positional ones."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    raise SlothError(
        f"example_inputs is a {type(example_inputs).__name__}: give a dict of keyword arguments or a tuple of "
        "positional ones, as for a call of the model"
    )


def _first_calls(probe: Probe | None) -> dict[str, Call]:
    events = probe.attentions if probe is not None else []
    calls: dict[str, Call] = {}
    for event in events:
        calls.setdefault(event.owner.path, (event.owner.args, event.owner.kwargs))
    return calls


def _structure(skeleton: Skeleton, path: str, call: Call) -> Hashable:
    pattern, tensors = read_call(*call)
    return fingerprint(skeleton.model.get_submodule(path)), repr(pattern), tuple(tensor.ndim for tensor in tensors)


def _probe_resized(skeleton: Skeleton, call: Call, latent: Any, until: Iterable[str]) -> Probe | None:
    """A run with one image more, twice the rows and three times the columns; ``None`` if the model refuses."""
    size = latent_size(latent)
    if size is None:
        return None
    batch = latent.shape[0]

    def resized(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            shape = list(value.shape)
            if shape and shape[0] == batch:
                shape[0] += 1
            if len(shape) >= 4 and tuple(shape[-2:]) == size:
                shape[-2:] = [2 * size[0], 3 * size[1]]
            return skeleton.fake(torch.empty(shape, dtype=value.dtype, device="meta"))
        if isinstance(value, (list, tuple)):
            return type(value)(map(resized, value))
        if isinstance(value, dict):
            return {name: resized(item) for name, item in value.items()}
        return value

    args, kwargs = resized(call)
    try:
        return Probe(skeleton, args, kwargs, until)
    except SlothError:
        return None
