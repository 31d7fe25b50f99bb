"""How a host's attention function is called: layouts, and its arguments in the terms of attention.

A layout has one letter for each dimension: B samples, H heads, N tokens, D channels of a head, C all heads' channels.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from sloth_fx.errors import SlothError

LAYOUTS = ("BHND", "BNHD", "BNC", "NHD")


@dataclass(frozen=True)
class HostFunction:
    """How an attention function is called.

    ``parameters`` are the names of its parameters by position, query, key and value first. ``layout`` is that of the
    three, and of the result unless ``output_layout`` differs; both may depend on an option, such as
    ``{("skip_reshape", True): "BHND"}``. A tensor with one dimension less than its layout has no heads. ``mask``,
    ``causal`` and ``heads`` name the parameters that are these. ``refused`` gives, for options with which operators
    cannot work, the reason. ``inert`` options choose how attention is computed, and not what.
    """

    name: str
    layout: str
    parameters: tuple[str, ...] = ("query", "key", "value")
    output_layout: str | None = None
    layouts: Mapping[tuple[str, Any], str] = field(default_factory=dict)
    output_layouts: Mapping[tuple[str, Any], str] = field(default_factory=dict)
    mask: str | None = None
    causal: str | None = None
    heads: str | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    inert: tuple[str, ...] = ()

    def arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name."""
        return {**dict(zip(self.parameters, args, strict=False)), **kwargs}

    def layout_of(self, arguments: Mapping[str, Any]) -> tuple[str, str]:
        """The layout of query, key and value, and that of the result."""
        layout = _chosen(self.layouts, arguments, self.layout)
        return layout, _chosen(self.output_layouts, arguments, self.output_layout or layout)

    @property
    def of_form(self) -> frozenset[str]:
        """The options that do not change what is computed: those that are inert, and those of the layout."""
        layouts = {option for option, _ in (*self.layouts, *self.output_layouts)}
        return frozenset((*self.inert, *layouts, *([self.heads] if self.heads else [])))

    def refusal(self, arguments: Mapping[str, Any]) -> str | None:
        """Why operators cannot work on this call, if so."""
        if self.layout == "NHD":
            return f"{self.name} takes the tokens of all samples as one sequence"
        for option, reason in self.refused.items():
            given = arguments.get(option)
            off = type(given) in (bool, int, float, tuple) and given in (False, 0.0, (-1, -1))
            if given is not None and not off:
                return f"{self.name}: {reason}"
        mask = arguments.get(self.mask) if self.mask is not None else None
        if mask is not None and not isinstance(mask, Tensor):
            return f"{self.name}: its mask is a {type(mask).__name__}"
        return None

    def fits(self, function: Any) -> bool:
        """Whether ``function`` may be the one meant: another one of this name has other parameters."""
        if not callable(function) or isinstance(function, (type, nn.Module, ModuleType)):
            return False
        try:
            parameters = inspect.signature(function).parameters
        except (TypeError, ValueError):  # compiled functions may have none
            return True
        if any(each.kind is each.VAR_POSITIONAL for each in parameters.values()):
            return True
        needed = [*self.parameters[:3], *([self.heads] if self.heads else [])]
        return all(name in parameters for name in needed)


@dataclass(frozen=True)
class HostCall:
    """One call of a host's attention function.

    ``query``, ``key`` and ``value`` are views (B, H, N, D); without heads H is 1, and packed sequences are one sample.
    ``output_shape`` is that of the result, in the host's layout. ``causal`` and ``mask`` are as given, ``refusal`` says
    why operators cannot work here, if so.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    causal: bool
    output_shape: tuple[int, ...]
    refusal: str | None

    @classmethod
    def read(cls, entry: HostFunction, args: Sequence[Any], kwargs: Mapping[str, Any]) -> HostCall:
        """Raises :class:`SlothError` where the arguments are not those that the table tells of."""
        arguments = entry.arguments(args, kwargs)
        try:
            query, key, value = (arguments[name] for name in entry.parameters[:3])
            heads = arguments[entry.heads] if entry.heads is not None else None
        except KeyError as missing:
            raise SlothError(f"{entry.name} is called without {missing}; it takes {entry.parameters}") from None
        layout, output_layout = entry.layout_of(arguments)
        query_view, key_view, value_view = (with_heads(each, layout, heads) for each in (query, key, value))
        batch, count, tokens, _ = query_view.shape
        channels = value_view.shape[-1]
        sizes = {"B": batch, "H": count, "N": tokens, "D": channels, "C": count * channels}
        if query.ndim < len(layout):
            output_layout = output_layout.replace("H", "")
        return cls(
            query_view,
            key_view,
            value_view,
            mask=arguments.get(entry.mask) if entry.mask is not None else None,
            causal=bool(arguments.get(entry.causal, False)) if entry.causal is not None else False,
            output_shape=tuple(sizes[letter] for letter in output_layout),
            refusal=entry.refusal(arguments),
        )

    def empty(self) -> Tensor:
        """A result that has the shape, dtype and device of the real one."""
        return self.query.new_empty(self.output_shape)


def with_heads(tensor: Tensor, layout: str, heads: int | None) -> Tensor:
    """``tensor`` of ``layout`` as a view (B, H, N, D). Of BNC, some have their heads and channels apart already."""
    if layout == "BNC" and tensor.ndim == 4:
        return tensor.transpose(1, 2)
    if layout == "BNC" and tensor.ndim == 3:
        if heads is None or tensor.shape[-1] % heads:
            raise SlothError(f"{tensor.shape[-1]} channels are not {heads} heads")
        return torch.unflatten(tensor, 2, (heads, -1)).transpose(1, 2)
    if tensor.ndim == len(layout) - 1:
        layout = layout.replace("H", "")
    if tensor.ndim != len(layout):
        raise SlothError(f"a tensor of shape {tuple(tensor.shape)} has not the layout {layout}")
    order = [layout.index(letter) for letter in "BHND" if letter in layout]
    tensor = tensor.permute(order)
    if "H" not in layout:
        tensor = tensor.unsqueeze(1)
    return tensor if "B" in layout else tensor.unsqueeze(0)


def _chosen(choices: Mapping[tuple[str, Any], str], arguments: Mapping[str, Any], default: str) -> str:
    for (option, value), layout in choices.items():
        if arguments.get(option) == value:
            return layout
    return default
