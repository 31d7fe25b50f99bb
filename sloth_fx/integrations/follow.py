"""Tells the context of an attached model where its pipeline is, before each call."""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from sloth_fx.capture.call import labelled_tensors
from sloth_fx.dynamo import never_compile, outside_graphs
from sloth_fx.errors import SlothError
from sloth_fx.integrations.guidance import GroupCounter, guidance_scale_of
from sloth_fx.integrations.negative_prompt import PromptEncoder
from sloth_fx.integrations.passes import name_passes, named_pass, unname_passes
from sloth_fx.integrations.scheduler import SchedulerReader, prediction_of
from sloth_fx.model_adapters import Arguments, adapter_for
from sloth_fx.patch import patch_of


class Follower:
    """Drives the context of ``model`` by the scheduler that ``pipe`` has at each call.

    Who drives the context otherwise, with ``at`` or ``step``, keeps it until ``auto()``; so does who sets ``halves``,
    until it is set back, and who sets ``rows``, ``prediction`` or ``guidance_scale``. A copy of the model has a
    follower of its own, of the same pipeline.

    ``steers`` tells that predictions are steered: then the context is told as well what each row is, and what guidance
    comes after; ``guidance_scale`` is what the caller knows of that.
    """

    def __init__(
        self,
        pipe: Any,
        model: nn.Module,
        encoder: PromptEncoder | None = None,
        *,
        steers: bool = False,
        guidance_scale: float | None = None,
    ) -> None:
        adapter = adapter_for(model)
        self._pipe = weakref.ref(pipe)
        self._model = weakref.ref(model)
        self._context = patch_of(model).context
        self._arguments = Arguments(model, adapter)
        self._scheduler = SchedulerReader(adapter)
        self._groups = GroupCounter(adapter.axes)
        self._moment = self._context.moment
        self._halves = self._context.halves
        self._encoder = encoder
        self._encoded = 0
        self._told: Any = WeakIdKeyDictionary()  # by text tensor, which groups are the prompt's
        self._steers = steers
        self._guidance_scale = guidance_scale
        self._set: dict[str, Any] = {"rows": self._context.rows, "prediction": None, "guidance_scale": None}
        self._before = {**self._set, "halves": self._halves}
        self._names = list(inspect.signature(model.forward).parameters)
        self._outside = outside_graphs(_follow)
        never_compile(Follower.before_forward)
        if steers:
            name_passes(model)
        # Before the hook of the patch, which sets the operators.
        self._hook = model.register_forward_pre_hook(self.before_forward, with_kwargs=True, prepend=True)

    def stop(self) -> None:
        """Leave the model, which may live on in another pipeline, to its own timesteps, and told nothing of a call."""
        self._hook.remove()
        if self._steers and (model := self._model()) is not None:
            unname_passes(model)
        context = self._context
        if self._drives():
            context.auto()
        counted = context.halves == self._halves and context.rows == self._set["rows"]
        groups = self._before["halves"] if counted else context.halves
        for name, told in self._set.items():
            if getattr(context, name) == told:
                setattr(context, name, self._before[name])
        context.halves = groups

    def before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook. Inlined into a larger graph it is a break: a graph cannot ask a scheduler."""
        if not torch.compiler.is_exporting():
            self._outside(self, model, args, kwargs)

    def follow(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Set the context for a call with these arguments."""
        pipe = self._pipe()
        context = self._context
        moment = self._scheduler.moment(getattr(pipe, "scheduler", None), self._arguments.timestep(args, kwargs))
        if self._drives():
            if moment is not None:
                context.at(*moment)
            elif context.driven:
                context.auto()
            self._moment = context.moment
        if context.halves == self._halves:
            latent = self._arguments.latent(args, kwargs)
            self._halves = self._groups.count(pipe, latent, self._scheduler.runs)
            if context.halves != self._halves:
                context.halves = self._halves
        if self._steers:
            self._steer(pipe, model, args, kwargs)
        elif self._encoder is not None:
            self._tell("rows", self._rows(self._encoder, args, kwargs))

    def _steer(self, pipe: Any, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tell the context what the rows of this call are, and what the pipeline makes of the result."""
        groups = self._context.halves
        rows: tuple[str, ...] | None = None
        if groups == 1 and (name := named_pass(model)) is not None:
            rows = (name,)
        if self._encoder is not None and (rows is None or self._encoder.negates):
            told = self._rows(self._encoder, args, kwargs)
            rows = rows or told
        scale = guidance_scale_of(pipe, model, self._guidance_scale) if groups == 1 else None
        if rows is None and (groups > 1 or scale is not None) and self._context.rows == self._set["rows"]:
            raise SlothError(
                f"{type(pipe).__name__} guides, and which rows of a call of its model ({groups} groups) are "
                'conditional is not known: say so with rows of the handle\'s context, as in ("uncond", "cond")'
            )
        if rows == ("uncond",) and scale is None:
            raise SlothError(
                f"{type(pipe).__name__} calls its model once for each text, and with which scale it guides is not "
                "known: attach with guidance_scale=..., that of its classifier-free guidance"
            )
        self._tell("rows", rows or ("cond",))
        self._tell("guidance_scale", scale)
        self._tell("prediction", prediction_of(getattr(pipe, "scheduler", None)))

    def _tell(self, name: str, value: Any) -> None:
        """Unless somebody else told the context."""
        if getattr(self._context, name) == self._set[name] != value:
            setattr(self._context, name, value)
            self._set[name] = value

    def _rows(self, encoder: PromptEncoder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
        """Which rows of this call are the prompt's: none, where a pipeline calls the model once for each conditioning.
        The context is told the negative text of this run."""
        if encoder.runs != self._encoded:
            self._told, self._encoded = WeakIdKeyDictionary(), encoder.runs
        texts = [each for each in self._arguments.text(args, kwargs).values() if isinstance(each, Tensor)]
        known = next((self._told[each] for each in texts if each in self._told), None)
        if known is None:
            known = self._compared(encoder, args, kwargs)
            self._told.update((each, known) for each in texts)
        return tuple(known)

    def _compared(self, encoder: PromptEncoder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        tensors = {name: each for name, each in labelled_tensors(_nothing, (), given) if isinstance(each, Tensor)}
        latent = self._arguments.latent(args, kwargs)
        groups = self._context.halves
        found, place = encoder.read(tensors, groups, len(latent) if isinstance(latent, Tensor) else 0)
        if place is not None and encoder.negates:  # or else the caller may have told the context
            self._context.take_negative(found)
        return tuple("cond" if group == place else "uncond" for group in range(groups))

    def _drives(self) -> bool:
        return not self._context.driven or self._context.moment is self._moment


def _nothing() -> None:
    """Has no parameters."""


def _follow(follower: Follower, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    follower.follow(model, args, kwargs)
