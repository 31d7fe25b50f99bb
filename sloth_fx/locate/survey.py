"""The trial runs of a model: one for its sites, and one at another size to tell what depends on size."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, is_fake

from sloth_fx.capture.call import read_call, substitute
from sloth_fx.capture.capture import Call, fingerprint
from sloth_fx.capture.skeleton import Rehearsal, Skeleton
from sloth_fx.errors import RefusedInputsError, SlothError
from sloth_fx.locate.probe import Probe
from sloth_fx.locate.provenance import Packed
from sloth_fx.locate.resize import resized_calls
from sloth_fx.locate.sites import locate
from sloth_fx.locate.tokens import LATENT, Latent, guess_axes
from sloth_fx.model_adapters import Arguments, ModelAdapter
from sloth_fx.site import AttentionSite, LatentSize

_LARGEST_REAL = 2**16  # elements
_NO_FEATURES = ("mask", "ids", "indices", "index", "position", "pos", "rotary", "rope", "coords", "freqs", "time")


@dataclass(frozen=True)
class Visit:
    """One call of an owner, and how many attentions it computed."""

    call: Call
    attentions: int


@dataclass(frozen=True)
class Survey:
    """What the trial runs of a model told.

    By path of the owner, ``visits`` holds its calls in order, and ``structure`` what it shares with the owners that
    take the same path through the same code. ``resized`` holds, for each such structure, its calls at another size
    (none where the model does not run at another size). ``adapter`` is the model's, with the axes of its latent.
    """

    skeleton: Skeleton
    sites: list[AttentionSite]
    visits: dict[str, list[Visit]]
    structure: dict[str, Hashable]
    resized: dict[Hashable, list[Visit]]
    latent: LatentSize | None
    adapter: ModelAdapter


def survey(model: nn.Module, adapter: ModelAdapter, call: Call) -> Survey:
    """Run a skeleton of ``model`` on (args, kwargs) ``call`` and at another size.

    Raises :class:`SlothError` when the model does not run on these inputs, or has no attention.
    """
    skeleton = Skeleton(model)
    arguments = Arguments(model, adapter)
    size = arguments.size(*call)  # before the values of the arguments are gone
    packed = _packed(adapter, arguments, call, size)
    try:
        args, kwargs = _small_ones_real(skeleton, call)
        probe = Probe(skeleton, args, kwargs, _followed(arguments, args, kwargs), packed=packed)
    except RefusedInputsError as refusal:
        if not _steered_by_values(refusal):
            raise
        probe = _rehearsed(model, arguments, call, packed, refusal)
    if not probe.attentions:
        raise SlothError(f"{type(model).__name__} computes no attention: there is nothing to transform")
    axes = adapter.axes or _axes(probe)
    if adapter.axes is None and _tell_the_size(axes):
        adapter = replace(adapter, axes=axes)
        arguments = Arguments(model, adapter)
        size = arguments.size(*call)
    latent = Latent(axes, size, packed.start if packed is not None else 0)
    visits = _visits(skeleton, probe)
    structure = {path: _structure(skeleton, path, each) for path, each in visits.items()}
    examples = {each: path for path, each in reversed(structure.items())}  # the first owner of each structure
    until = {path: sum(visit.attentions for visit in visits[path]) for path in examples.values()}
    resized = _probe_resized(skeleton, adapter, arguments, _small_ones_real(skeleton, call), until, latent)
    text = frozenset(arguments.text(*call))
    again = _visits(skeleton, resized[0]) if resized is not None else {}
    sites = locate(probe, latent, text, resized if packed is None else None)
    if probe.read_values and any(site.key_place.from_end for site in sites):
        sites = _sites_in_order(skeleton, arguments, call, packed, latent, text, sites)
    return Survey(
        skeleton,
        sites,
        visits,
        structure,
        {each: again[path] for each, path in examples.items() if path in again},
        size,
        adapter,
    )


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


def _packed(adapter: ModelAdapter, arguments: Arguments, call: Call, size: LatentSize | None) -> Packed | None:
    """Which tokens of a packed latent are its own, where there are others."""
    latent = arguments.latent(*call)
    axes = adapter.axes or "bnc"
    if size is None or not isinstance(latent, torch.Tensor) or latent.ndim != len(axes) or "n" not in axes:
        return None
    axis = axes.index("n")
    start, count = arguments.first(*call), math.prod(size)
    return Packed(axis, start, start + count) if latent.shape[axis] > count else None


def _sites_in_order(
    skeleton: Skeleton,
    arguments: Arguments,
    call: Call,
    packed: Packed | None,
    latent: Latent,
    text: frozenset[str],
    sites: list[AttentionSite],
) -> list[AttentionSite]:
    """``sites``, of which those have no grid whose image tokens move when the samples have texts of different length:
    a host that reads masks may pack each sample on its own."""
    args, kwargs = _small_ones_real(skeleton, call)
    uneven = {
        name: _shortened(value) if "mask" in name and isinstance(value, torch.Tensor) and value.ndim == 2 else value
        for name, value in kwargs.items()
    }
    if all(uneven[name] is value for name, value in kwargs.items()):
        return sites
    try:
        probe = Probe(skeleton, args, uneven, _followed(arguments, args, uneven), packed=packed)
    except RefusedInputsError:
        return sites
    again = locate(probe, latent, text)
    if len(again) != len(sites):
        return sites
    return [
        replace(site, grid=None, divisors=None) if site.key_place.from_end and other.grid is None else site
        for site, other in zip(sites, again, strict=True)
    ]


def _shortened(mask: torch.Tensor) -> torch.Tensor:
    """A mask with half of the words of its first sample."""
    if is_fake(mask) or mask.shape[0] < 2 or mask.shape[1] < 2:
        return mask
    shortened = mask.clone()
    shortened[0, mask.shape[1] // 2 :] = 0
    return shortened


def _steered_by_values(refusal: SlothError) -> bool:
    return isinstance(refusal.__cause__, (DataDependentOutputException, DynamicOutputShapeException))


def _rehearsed(model: nn.Module, arguments: Arguments, call: Call, packed: Packed | None, refusal: SlothError) -> Probe:
    """A run of a copy of the model on real data, for hosts that steer by what they compute (a mixture of experts)."""
    tensors = [*model.parameters(), *model.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        raise refusal
    device = tensors[0].device if tensors else torch.device("cpu")

    def real(tensor: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(tensor, device=device) if tensor.is_meta else tensor.detach().to(device)

    args, kwargs = substitute(call, real)
    return Probe(Rehearsal(model), args, kwargs, _followed(arguments, args, kwargs), packed=packed)


def _small_ones_real(skeleton: Skeleton, value: Any) -> Any:
    """Arguments without data, except for small ones: hosts steer by lengths, masks, coordinates, empty embeddings."""

    def convert(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() <= _LARGEST_REAL and tensor.device.type != "meta" and not is_fake(tensor):
            return tensor.detach().to(skeleton.device)
        return skeleton.fake(tensor)

    return substitute(value, convert)


def _followed(arguments: Arguments, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The inputs that may become tokens: the latent, then text, then whatever else has tokens."""
    latent = arguments.latent(args, kwargs)
    found = {LATENT: latent} if isinstance(latent, torch.Tensor) else {}
    for value in (*args, *kwargs.values()):
        if isinstance(value, (list, tuple)) and value and value[0] is latent:  # one for each image
            found |= {f"{LATENT}[{index}]": item for index, item in enumerate(value[1:], start=1)}
    found |= arguments.text(args, kwargs)
    for name, tensor in _named_tensors("", kwargs, args):
        if tensor.ndim >= 3 and tensor.is_floating_point() and not any(word in name for word in _NO_FEATURES):
            found.setdefault(name, tensor)
    unique: dict[int, str] = {}
    for name, tensor in found.items():
        unique.setdefault(id(tensor), name)
    return {name: found[name] for name in unique.values() if found[name].numel() > 0}


def _named_tensors(prefix: str, kwargs: Mapping[str, Any], args: tuple[Any, ...] = ()) -> Iterator[tuple[str, Any]]:
    for name, value in (*((str(index), value) for index, value in enumerate(args)), *kwargs.items()):
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, Mapping):
            yield from _named_tensors(f"{prefix}{name}.", value)
        elif isinstance(value, (list, tuple)):
            yield from _named_tensors(f"{prefix}{name}.", {}, tuple(value))


def _axes(probe: Probe) -> str:
    """The axes of the latent, from those along which the first attention finds its tokens."""
    if not probe.sources or probe.sources[0].name != LATENT:
        return ""
    latent = probe.sources[0]
    for event in probe.attentions:
        if event.query is not None and latent.holds(event.query).any():
            return guess_axes(event.query, latent)
    return "b" + "_" * (len(latent.shape) - 1)


def _tell_the_size(axes: str) -> bool:
    """Whether these are the axes of a map, or of a sequence with channels first; tokens first may be a packed map."""
    return "w" in axes and "c" in axes and ("h" in axes or axes.index("c") < axes.index("w"))


def _visits(skeleton: Skeleton, probe: Probe) -> dict[str, list[Visit]]:
    """The calls of each owner, in order."""
    calls = {id(event.owner): event.owner for event in probe.attentions}
    visits: dict[str, list[Visit]] = {}
    for owner in calls.values():
        visits.setdefault(owner.path, []).append(
            Visit(_without_data(skeleton, (owner.args, owner.kwargs)), len(owner.attentions))
        )
    return visits


def _without_data(skeleton: Skeleton, value: Any) -> Any:
    """Arguments of an owner, of which whole numbers and masks keep their values."""

    def convert(tensor: torch.Tensor) -> torch.Tensor:
        return skeleton.fake_inputs(tensor) if tensor.is_floating_point() or tensor.is_complex() else tensor

    return substitute(value, convert)


def _structure(skeleton: Skeleton, path: str, visits: list[Visit]) -> Hashable:
    calls = []
    for visit in visits:
        pattern, tensors = read_call(*visit.call)
        calls.append((_comparable(pattern), tuple(tensor.ndim for tensor in tensors), visit.attentions))
    return fingerprint(skeleton.model.get_submodule(path)), tuple(calls)


def _comparable(pattern: Any) -> Hashable:
    if isinstance(pattern, tuple):
        return tuple(map(_comparable, pattern))
    plain = pattern is None or pattern is ... or isinstance(pattern, (bool, int, float, str))
    return pattern if plain else cast(Hashable, type(pattern))


def _probe_resized(
    skeleton: Skeleton,
    adapter: ModelAdapter,
    arguments: Arguments,
    fake_call: Call,
    until: Mapping[str, int],
    latent: Latent,
) -> tuple[Probe, Latent] | None:
    """A run at another size; ``None`` if the model takes none."""
    for call, size in resized_calls(adapter, arguments, fake_call, latent.size, skeleton.fake):
        try:
            probe = Probe(skeleton, *call, _followed(arguments, *call), until)
        except RefusedInputsError:
            continue
        return probe, Latent(latent.axes, size)
    return None
