"""What a patched model carries with it: its context, its report and graphs, and the hook that keeps them current."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from sloth_fx.bind import is_bound
from sloth_fx.branches import is_branched
from sloth_fx.capture.capture import Call
from sloth_fx.context import TimestepContext
from sloth_fx.dynamo import get_eval_frame_callback, never_compile, outside_graphs
from sloth_fx.errors import SlothError
from sloth_fx.perturbed import is_perturbed
from sloth_fx.report import Report
from sloth_fx.spec import Spec

ATTRIBUTE = "_sloth_fx"


@dataclass(eq=False)
class Patch:
    """``specs``, ``strict`` and ``phases`` are what the transform was asked for.

    ``pending`` is a transform that nothing told the inputs of: it happens at the first call, with that call's.
    Torch looks the forward of a module up before its hooks run, so that call finds ``stand_in``. It stands in
    for ``forward``, if the model had one of its own, and calls ``rewritten`` once, if the model itself is an owner.
    """

    context: TimestepContext
    report: Report
    specs: tuple[Spec, ...]
    strict: bool
    phases: int | None
    graphs: dict[str, fx.Graph] = field(default_factory=dict)
    pending: Callable[[nn.Module, Patch, Call], None] | None = None
    forward: Callable[..., Any] | None = field(default=None, init=False)
    stand_in: Callable[..., Any] | None = field(default=None, init=False)
    rewritten: Callable[..., Any] | None = field(default=None, init=False)
    prepare: Callable[..., None] = field(init=False)

    def install(self, model: nn.Module) -> None:
        """Make ``model`` carry this patch (outside its parameters, buffers and children)."""
        never_compile(Patch.before_forward)
        self.prepare = outside_graphs(_prepare)
        setattr(model, ATTRIBUTE, self)
        if self.pending is not None:
            self.forward = model.__dict__.get("forward")
            self.stand_in = _stand_in(model.forward)
            model.forward = types.MethodType(self.stand_in, model)
        model.register_forward_pre_hook(self.before_forward, with_kwargs=True)

    def before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: finish what is pending, and set the operators for this call."""
        compiled = torch.compiler.is_compiling()
        if compiled and self.pending is None and self.context.ready(args, kwargs):
            return  # inlined into the graph of a larger function, and nothing to do
        compiled = compiled or callable(get_eval_frame_callback())  # or called between the graphs of a compiled module
        self.prepare(self, model, args, kwargs, compiled)


def _prepare(patch: Patch, model: nn.Module, args: Any, kwargs: Any, compiled: bool) -> None:
    if patch.pending is not None:
        found = model.__dict__.get("forward")
        late = getattr(found, "__func__", None) is patch.stand_in  # else hooks that came meanwhile call it
        if late:
            model.__dict__.pop("forward")
            model.__dict__ |= {"forward": patch.forward} if patch.forward is not None else {}
        try:
            patch.pending(model, patch, (args, kwargs))
        except BaseException:
            model.__dict__ |= {"forward": found} if late else {}
            raise
        patch.pending = None
        if late and (is_bound(model) or is_branched(model) or is_perturbed(model)):
            patch.rewritten = model.__dict__["forward"]
    patch.context.observe(model, args, kwargs, compiled=compiled)


def _stand_in(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(getattr(forward, "__func__", forward))
    def stand_in(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        patch = self.__dict__.get(ATTRIBUTE)
        call: Callable[..., Any] = functools.partial(type(self).forward, self)
        if isinstance(patch, Patch):
            call, patch.rewritten = patch.rewritten or patch.forward or call, None
        return call(*args, **kwargs)

    return stand_in


def is_patched(module: nn.Module) -> bool:
    return ATTRIBUTE in module.__dict__


def patch_of(model: nn.Module) -> Patch:
    """The patch of a model that ``transform`` returned (or of what ``torch.compile`` made of it)."""
    patch = getattr(model, ATTRIBUTE, None)
    if not isinstance(patch, Patch):
        raise SlothError(f"{type(model).__name__} is no patched model: pass what sloth_fx.transform returned")
    return patch
