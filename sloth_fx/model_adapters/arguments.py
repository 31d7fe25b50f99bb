"""Reads a call of a model: its latent, that latent's size, its text and its timestep."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, takewhile
from math import isclose, prod
from operator import itemgetter
from typing import Any, TypeAlias

import torch
from torch import nn
from torch._subclasses.fake_tensor import is_fake
from torch.utils.weak import WeakIdKeyDictionary

from sloth_fx.checks import unknown
from sloth_fx.errors import SlothError
from sloth_fx.model_adapters.adapter import ModelAdapter
from sloth_fx.site import LatentSize

_AXES = {3: "bnc", 4: "bchw", 5: "bcthw"}

NOT_TEXT = (
    *("image", "img", "pixel", "video", "audio", "clip", "pose", "face", "motion", "camera", "plucker", "sample"),
    *("latent", "history", "control", "cond", "ref", "residual", "effnet", "prior", "hint", "noise"),
    *("mask", "ids", "indices", "index", "position", "pos", "rotary", "rope", "coords", "grid", "size", "freqs"),
    *("time", "sigma", "pooled", "global", "guidance", "label", "cache"),
)
"""A tensor argument is text unless one of the words of its name (between underscores) begins with one of these."""


_Found: TypeAlias = tuple[int, LatentSize]  # the first token, and the size


class Arguments:
    """Reads the arguments of calls of ``model``, as ``adapter`` says. Asked before every forward, so it is quick."""

    def __init__(self, model: nn.Module, adapter: ModelAdapter) -> None:
        self._adapter = adapter
        parameters = inspect.signature(model.forward).parameters
        self._positions = {name: index for index, name in enumerate(parameters)}
        self._takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())

    def latent(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The latent; of a list of latents, the first. ``None`` if there is none."""
        name = self._latent_name(args, kwargs)
        value = self._named(name, args, kwargs) if name is not None else None
        while isinstance(value, (list, tuple)):
            value = value[0] if value else None
        return value

    def rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """The rows of the batch: those of the latent, or as many as a list has latents. 0 if there is none."""
        name = self._latent_name(args, kwargs)
        value = self._named(name, args, kwargs) if name is not None else None
        if isinstance(value, torch.Tensor) and value.ndim > 0:
            return int(value.shape[0])
        return len(value) if isinstance(value, (list, tuple)) else 0

    def timestep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The timestep (a number, or a tensor of them), or ``None``."""
        name = self._adapter.timestep
        return self._named(name, args, kwargs) if name is not None else None

    def text(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The text, by name of parameter; the tensors of a list are called name[0], name[1], ..."""
        if (names := self._adapter.text) is not None:
            given = ((name, self._named(name, args, kwargs)) for name in names)
            return {label: tensor for name, value in given for label, tensor in _tensors(name, value)}
        latent = self._latent_name(args, kwargs)
        return {
            name: value
            for name, value in self._given(args, kwargs)
            if name != latent and _is_feature(value) and _may_be_text(name)
        }

    def check_names(self, names: Iterable[str]) -> None:
        """Raise :class:`SlothError` for names that are no parameters of the model's forward."""
        for name in names:
            if name not in self._positions and not self._takes_any:
                raise SlothError(f"argument {unknown(name, self._positions)}")

    def size(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LatentSize | None:
        """The latent's size in its own units: pixels of the latent, or tokens where it is packed. ``None`` where that
        is not said, or where ids have no values (on ``meta``, or fake)."""
        found = self._found(args, kwargs)
        return found[1] if found is not None else None

    def first(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Which token of a packed latent is its first, where a host packs text or other images in front of it."""
        found = self._found(args, kwargs)
        return found[0] if found is not None else 0

    def around(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
        """How many other tokens a packed latent holds before and after its own."""
        axes, latent = self._adapter.axes or "", self.latent(args, kwargs)
        found = self._found(args, kwargs)
        if found is None or "n" not in axes or not isinstance(latent, torch.Tensor) or latent.ndim != len(axes):
            return 0, 0
        first, size = found
        return first, int(latent.shape[axes.index("n")]) - first - prod(size)

    def _found(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Found | None:
        adapter = self._adapter
        if adapter.ids is not None:
            rows = self._named(adapter.id_rows, args, kwargs) if adapter.id_rows is not None else None
            return _found_in_ids(self._named(adapter.ids, args, kwargs), adapter.id_axes, rows)
        if adapter.shapes is not None:
            return _found_in_shapes(self._named(adapter.shapes, args, kwargs), adapter.target)
        if adapter.sizes is not None:
            size = _size_of_numbers([self._named(name, args, kwargs) for name in adapter.sizes])
        else:
            size = _size_of_latent(self.latent(args, kwargs), adapter.axes)
        return (0, size) if size is not None else None

    def _latent_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        if self._adapter.latent is not None:
            return self._adapter.latent
        return next((name for name, value in self._given(args, kwargs) if _is_feature(value)), None)

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        """What was given, by name, in the order of forward's parameters (any others last)."""
        for name, index in self._positions.items():
            if index < len(args):
                yield name, args[index]
            elif name in kwargs:
                yield name, kwargs[name]
        yield from ((str(index), args[index]) for index in range(len(self._positions), len(args)))
        yield from ((name, value) for name, value in kwargs.items() if name not in self._positions)

    def _named(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in kwargs:
            return kwargs[name]
        position = self._positions.get(name, len(args))
        return args[position] if position < len(args) else None


def _is_feature(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim >= 3 and value.is_floating_point()


def _may_be_text(name: str) -> bool:
    return not any(word.startswith(NOT_TEXT) for word in name.split("_"))


def _tensors(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _tensors(f"{name}[{index}]", item)


def _size_of_latent(latent: Any, axes: str | None) -> LatentSize | None:
    if not isinstance(latent, torch.Tensor):
        return None
    axes = axes or _AXES.get(latent.ndim, "")
    if len(axes) != latent.ndim or "n" in axes or "w" not in axes:
        return None
    found = dict(zip(axes, latent.shape, strict=True))
    return LatentSize(int(found.get("t", 1)), int(found.get("h", 1)), int(found["w"]))


def _size_of_numbers(numbers: Sequence[Any]) -> LatentSize | None:
    if any(number is None for number in numbers):
        return None
    frames, rows, columns = (1, 1, *map(int, numbers))[-3:]
    return LatentSize(frames, rows, columns)


def _found_in_shapes(shapes: Any, target: int) -> _Found | None:
    """Of (frames, rows, columns), of a list of such, or of such a list for each image of the batch."""
    depth, inner = 0, shapes
    while isinstance(inner, (list, tuple)) and inner:
        depth, inner = depth + 1, inner[0]
    if not 1 <= depth <= 3 or isinstance(inner, (list, tuple)):
        return None
    of_image = shapes[0] if depth == 3 else shapes
    before: Sequence[Any] = ()
    if depth > 1:
        # One list for each image names its references too; a plain list has one entry for each image.
        index = target if depth == 3 else 0
        if not -len(of_image) <= index < len(of_image):
            return None
        before, of_image = of_image[: index % len(of_image)], of_image[index]
    size = _size_of_numbers(of_image)
    return (sum(prod(map(int, each)) for each in before), size) if size is not None else None


_seen: Any = WeakIdKeyDictionary()
"""Sizes that were read from tensors of ids, so that a sampling run reads them once: reading waits for the device."""


def _found_in_ids(ids: Any, id_axes: str, rows: Any) -> _Found | None:
    if not isinstance(ids, torch.Tensor) or not _has_values(ids) or (rows is not None and not _has_values(rows)):
        return None
    version = 0 if ids.is_inference() else ids._version
    known = _seen.get(ids)
    if known is None or known[:2] != (version, id_axes):
        known = version, id_axes, _read_ids(ids, id_axes, rows)
        _seen[ids] = known
    found: _Found | None = known[2]
    return found


def _has_values(tensor: torch.Tensor) -> bool:
    """Whether a tensor can be read here and now; within a graph that torch.compile makes it cannot."""
    return not torch.compiler.is_compiling() and tensor.device.type != "meta" and not is_fake(tensor)


def _read_ids(ids: torch.Tensor, id_axes: str, rows: Any) -> _Found | None:
    """Where the latent begins, and its size: that of the first image of which the tokens span a grid; text, which hosts
    put in front of it with coordinates of its own, does not."""
    coordinates = ids.detach().cpu().reshape(-1, *ids.shape[-2:])[0]
    if coordinates.shape[-1] < len(id_axes):
        return None
    if rows is not None:
        coordinates = coordinates[rows.detach().cpu().reshape(-1)]
    columns = [id_axes.find(letter) for letter in "tfhw"]
    tokens = [tuple(token[column] if column >= 0 else 0 for column in columns) for token in coordinates.tolist()]
    first = 0
    for _, group in groupby(tokens, key=itemgetter(0)):
        image = list(group)
        frames = [_grid(frame) for _, frame in groupby(image, key=itemgetter(1))]
        if frames[0] != (1, 1):
            alike = takewhile(lambda grid, first=frames[0]: grid == first, frames)  # type: ignore[misc]
            return first, LatentSize(len(list(alike)), *frames[0])
        first += len(image)
    return (0, LatentSize(1, 1, 1)) if tokens else None


def _grid(tokens: Iterable[tuple[Any, ...]]) -> tuple[int, int]:
    """(rows, columns) of (_, _, row, column) that come row by row. What follows at another offset is no part of it."""
    lines = [(row, {token[3] for token in line}) for row, line in groupby(tokens, key=itemgetter(2))]
    first, columns = lines[0]
    step = lines[1][0] - first if len(lines) > 1 else 0
    rows = 1
    while rows < len(lines) and step > 0 and isclose(lines[rows][0], first + rows * step) and lines[rows][1] == columns:
        rows += 1
    return rows, len(columns)
