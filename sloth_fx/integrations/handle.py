"""What holds a pipeline's patched denoisers in place, and puts everything back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import MappingProxyType, TracebackType
from typing import Any

import torch
from torch import nn

from sloth_fx.context import TimestepContext
from sloth_fx.errors import SlothError
from sloth_fx.integrations.negative_prompt import PromptEncoder
from sloth_fx.integrations.offload import offload_paused, offloads
from sloth_fx.patch import patch_of
from sloth_fx.report import Report


class Handle:
    """An attached pipeline: leave its ``with`` block, or call :meth:`detach`, and the pipeline is as it was.

    Of a pipeline with several denoisers (Wan 2.2 has two) :attr:`model`, :attr:`report` and :attr:`context` are those
    of the first; :attr:`models` has all.
    """

    def __init__(
        self,
        pipe: Any,
        originals: Mapping[str, nn.Module],
        models: Mapping[str, nn.Module],
        undo: ExitStack,
        encoder: PromptEncoder | None,
    ) -> None:
        self._pipe: Any = pipe
        self._name = type(pipe).__name__
        self._originals = dict(originals)
        self._models = dict(models)
        self._undo = undo
        self._encoder = encoder

    @property
    def models(self) -> Mapping[str, nn.Module]:
        """The patched models by the name that the pipeline has for them. Raises :class:`SlothError` once detached."""
        if not self._models:
            raise SlothError(f"this {self._name} is detached: attach it again for a patched model")
        return MappingProxyType(self._models)

    @property
    def model(self) -> nn.Module:
        """The patched model that the pipeline runs. Raises :class:`SlothError` once detached."""
        return next(iter(self.models.values()))

    @property
    def report(self) -> Report:
        """What was done at each attention site of :attr:`model`."""
        return patch_of(self.model).report

    @property
    def context(self) -> TimestepContext:
        """The timestep context of :attr:`model`. It follows the scheduler unless you drive it; after that, until
        you call its ``auto()``."""
        return patch_of(self.model).context

    @property
    def negative_prompt(self) -> tuple[str, ...]:
        """The negative prompt of NAG: one for all images, or one for each. Empty if attached without one.

        Another one can be set, a string or a list, and serves from the next run on. Raises :class:`SlothError` for what
        is no text, and where the pipeline was attached without one.
        """
        return self._encoder.prompts if self._encoder is not None else ()

    @negative_prompt.setter
    def negative_prompt(self, prompt: str | Sequence[str]) -> None:
        if self._encoder is None or not self._encoder.negates:
            raise SlothError(f"this {self._name} was attached without negative_prompt: attach it with one")
        self._encoder.prompts = prompt

    def detach(self) -> None:
        """Give the pipeline its own denoisers back. Harmless when that has been done.

        If the pipeline was moved to another device meanwhile, its own denoisers follow it there.
        """
        if not self._models:
            return
        pipe, originals, models = self._pipe, self._originals, self._models
        self._pipe, self._originals, self._models = None, {}, {}
        offloaded = offloads(pipe)
        with offload_paused(pipe):
            self._undo.close()
        if not offloaded:
            for name, original in originals.items():
                _follow_device(original, models[name])

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def __repr__(self) -> str:
        state = ", ".join(f"{name}: {type(model).__name__}" for name, model in self._models.items())
        return f"Handle({self._name}, {state or 'detached'})"


def _follow_device(original: nn.Module, patched: nn.Module) -> None:
    here, there = _device_of(original), _device_of(patched)
    if here is not None and there is not None and here != there:
        original.to(there)


def _device_of(model: nn.Module) -> torch.device | None:
    """The device of all of a model; ``None`` if it has several, or hooks keep its weights elsewhere."""
    devices = {parameter.device for parameter in model.parameters()}
    device = devices.pop() if len(devices) == 1 else None
    return device if device is not None and device.type != "meta" else None
