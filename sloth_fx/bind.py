"""Step four: a clone of the model that shares its weights, in which rewritten owners run the generated function."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sloth_fx.branching import calls_of, comparable
from sloth_fx.capture.call import read_call
from sloth_fx.capture.capture import Call
from sloth_fx.copying import copy_module
from sloth_fx.dynamo import get_eval_frame_callback, outside_graphs
from sloth_fx.errors import SlothError

_ORIGINAL = "_sloth_fx_original_forward"


def clone(model: nn.Module) -> nn.Module:
    """A copy of ``model`` over the same storage.

    Parameters and buffers are new tensor objects (one per distinct tensor, so ties survive): moving or casting the
    copy leaves the original as it is. Everything else (processors, bound methods, hooks) is copied.
    """
    try:
        return copy_module(model, _alias)
    except Exception as error:
        raise SlothError(f"{type(model).__name__} cannot be copied: {type(error).__name__}: {error}") from error


def _alias(tensor: Tensor) -> Tensor:
    alias: Tensor = tensor.detach()
    if isinstance(tensor, nn.Parameter):
        with torch.inference_mode(tensor.is_inference()):  # elsewhere, parameters of such tensors cannot have gradients
            alias = nn.Parameter(alias, requires_grad=tensor.requires_grad)
        alias.__dict__.update(tensor.__dict__)
    return alias


Form = tuple[tuple[Any, ...], tuple[int, ...]]
"""The pattern of a call, and how many dimensions each of its tensors has."""


def read_form(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Form, list[Tensor]]:
    """The form of a call, comparable with ``==``, and its tensors in order."""
    pattern, tensors = read_call(args, kwargs)
    return (pattern, tuple(tensor.ndim for tensor in tensors)), tensors


@dataclass(frozen=True)
class TokenTest:
    """Whether tensor number ``index`` of a call has as many elements along ``axis`` as the grid of an operator."""

    index: int
    axis: int
    operator: str

    def holds(self, owner: nn.Module, tensors: list[Tensor]) -> bool:
        layout = owner._modules[self.operator].layout  # type: ignore[union-attr]
        tokens: int = layout.tokens  # type: ignore[union-attr,assignment]
        tensor = tensors[self.index] if self.index < len(tensors) else None
        return tensor is not None and self.axis < tensor.ndim and tensor.shape[self.axis] == tokens


@dataclass(frozen=True)
class Variant:
    """One generated function and the calls it serves, of one form.

    ``sizes``, ``types`` and ``training`` are ``None`` where the capture follows what arrives, else what it was made
    for. ``tokens`` tells its calls from others of the same form, for which there is nothing to do. While the operators
    named in ``neutral_is_original`` do nothing, the host's own forward runs: the function is not the same to the bit.
    ``values`` are what some tensors held when the host's Python read them, and have to hold again.
    """

    form: Form
    function: Callable[..., Any]
    sizes: list[torch.Size] | None = None
    types: list[tuple[torch.dtype, torch.device]] | None = None
    training: bool | None = None
    tokens: TokenTest | None = None
    neutral_is_original: tuple[str, ...] = ()
    values: Mapping[int, Tensor] = field(default_factory=dict)

    def serves(self, owner: nn.Module, form: Form, tensors: list[Tensor]) -> bool:
        if self.form != form or self.training not in (None, owner.training):
            return False
        if self.tokens is not None and not self.tokens.holds(owner, tensors):
            return False
        if self.sizes is not None and self.sizes != sizes_of(tensors):
            return False
        if self.types is not None and self.types != [(tensor.dtype, tensor.device) for tensor in tensors]:
            return False
        return all(_equal(tensors[index], value) for index, value in self.values.items())

    def idle(self, owner: nn.Module) -> bool:
        """Whether the host's own forward does the same, and to the bit."""
        names = self.neutral_is_original
        return bool(names) and all(_idle(owner._modules[name].layout) for name in names)  # type: ignore[union-attr]


def sizes_of(tensors: list[Tensor]) -> list[torch.Size]:
    """The shapes of the tensors of a call, comparable with ``==``; they may differ between the branches of a text."""
    return [comparable(tensor.shape) for tensor in tensors]


def _idle(layout: Any) -> bool:
    return layout.neutral and not layout.guided and not layout.perturbed


def _equal(tensor: Tensor, value: Tensor) -> bool:
    if tensor.shape != value.shape or tensor.dtype != value.dtype:
        return False
    return torch.equal(tensor, value.to(tensor.device))


@dataclass(eq=False)
class Variants:
    """What structurally identical owners share: their variants, and how to make one for a call not seen before.

    ``held`` names the objects that the host's forward worked with when it was captured, such as an attention
    processor, and their types: with others the capture is no longer what the host would do. ``untouched`` are the
    forms of calls for which there is nothing to do.
    """

    known: list[Variant]
    held: tuple[tuple[str, type], ...]
    recapture: Callable[[nn.Module, list[Call]], Variant | None]
    untouched: tuple[Form, ...] = ()

    def check(self, owner: nn.Module) -> None:
        for name, kind in self.held:
            now = type(getattr(owner, name, None))
            if now is not kind:
                raise SlothError(
                    f"the {name} of this {type(owner).__name__} was a {kind.__name__} when it was captured and "
                    f"is a {now.__name__} now: change the original, and transform it again"
                )

    def others(self, owner: nn.Module, form: Form, tensors: list[Tensor]) -> bool:
        """Whether a call is one of those that the host makes for other tokens, and that stay as they were."""
        if form in self.untouched:
            return True
        alike = [variant for variant in self.known if variant.form == form] or self.known
        return all(each.tokens is not None and not each.tokens.holds(owner, tensors) for each in alike)

    def add(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Variant:
        """Capture a call that no variant serves, in each branch of a text, and remember it. Raises :class:`SlothError`
        where the graph would not be the same in both."""
        if torch.compiler.is_compiling():
            raise SlothError(
                f"{type(owner).__name__} is called in a way that its capture does not cover; run the patched model "
                "once with these arguments before compiling it"
            )
        between_graphs = callable(get_eval_frame_callback())  # of a compiled model: a capture shall not be compiled
        recapture = outside_graphs(self.recapture) if between_graphs else self.recapture
        calls = calls_of(args, kwargs)
        variant = recapture(owner, calls)
        assert variant is not None  # or it would be one of the others
        if len(calls) > 1:
            form, tensors = read_form(args, kwargs)
            variant = replace(variant, form=form, sizes=sizes_of(tensors))
        self.known.append(variant)
        return variant


def make_forward(variants: Variants) -> Callable[..., Any]:
    """The forward of owners that share ``variants``: one function object, so that compiled blocks can be reused."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        variants.check(self)
        form, tensors = read_form(args, kwargs)
        for variant in variants.known:
            if variant.serves(self, form, tensors):
                if variant.idle(self):
                    return original(self, *args, **kwargs)
                return variant.function(self, *tensors)
        if variants.others(self, form, tensors):
            return original(self, *args, **kwargs)
        return variants.add(self, args, kwargs).function(self, *tensors)

    return forward


def original(owner: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward that ``owner`` had before :func:`bind`."""
    forward = owner.__dict__.get(_ORIGINAL)
    return forward(*args, **kwargs) if forward is not None else type(owner).forward(owner, *args, **kwargs)


def bind(owner: nn.Module, forward: Callable[..., Any], operators: Mapping[str, nn.Module]) -> None:
    """Give ``owner`` the generated forward and its operators (parameter-free children, so ``state_dict`` stays)."""
    for name, operator in operators.items():
        owner.add_module(name, operator)
    slot = "_old_forward" if "_hf_hook" in owner.__dict__ else "forward"  # accelerate's hook wraps what lies there
    owner.__dict__[_ORIGINAL] = owner.__dict__.get(slot)
    setattr(owner, slot, types.MethodType(forward, owner))


def is_bound(owner: nn.Module) -> bool:
    """Whether :func:`bind` has given ``owner`` a forward."""
    return _ORIGINAL in owner.__dict__


def held_objects(owner: nn.Module) -> tuple[tuple[str, type], ...]:
    """The attributes of a module that are objects of the host: no numbers, containers, tensors, modules, functions."""
    return tuple(
        (name, type(value))
        for name, value in vars(owner).items()
        if not name.startswith("_")
        and type(value).__module__ != "builtins"
        and not isinstance(value, (Tensor, nn.Module, torch.dtype, torch.device, types.FunctionType, types.MethodType))
    )


def unbound(owner: nn.Module) -> nn.Module:
    """``owner`` (of a skeleton) with the forward it had before :func:`bind`."""
    original = owner.__dict__.pop(_ORIGINAL, None)
    owner.__dict__.pop("forward", None)
    if original is not None:
        owner.forward = original
    return owner
