"""A copy of a model that has every shape and no data.

The skeleton is what ``locate`` runs and ``capture`` traces: same classes, same Python state, fake tensors for
parameters and buffers. It costs milliseconds and no memory whatever the size of the model, works for weights on
``meta`` or offloaded ones, and whatever happens to it, the model itself is not touched.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, is_fake

from sloth_fx.capture.call import substitute
from sloth_fx.copying import copy_module

_LARGEST_REAL = 2**16  # elements


class Skeleton:
    """``model`` with fake tensors of one ``FakeTensorMode``, free of hooks, all on one device.

    That device is the model's (the first that is not ``meta``, which offloaded and unloaded weights report).
    """

    def __init__(self, model: nn.Module, device: torch.device | None = None) -> None:
        tensors = [*model.parameters(), *model.buffers()]
        devices = (tensor.device for tensor in tensors if tensor.device.type != "meta")
        self.device = device or next(devices, torch.device("cpu"))
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.model: nn.Module = copy_module(model, self.fake)
        for module in self.model.modules():
            _without_hooks(module)

    def fake(self, tensor: torch.Tensor) -> torch.Tensor:
        """A fake tensor like ``tensor``; a parameter stays one."""
        with self.mode:
            like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self.device)
        return nn.Parameter(like, requires_grad=False) if isinstance(tensor, nn.Parameter) else like

    def fake_inputs(self, inputs: Any) -> Any:
        """``inputs`` (nested tuples, lists, dicts, objects) with every tensor made fake: one that occurs twice, once.

        Small tensors of whole numbers and masks keep their values: hosts steer by them.
        """
        made: dict[int, torch.Tensor] = {}

        def fake(tensor: torch.Tensor) -> torch.Tensor:
            if isinstance(tensor, FakeTensor) and tensor.fake_mode is self.mode:
                return tensor
            if id(tensor) not in made:
                made[id(tensor)] = tensor.detach().to(self.device) if _may_steer(tensor) else self.fake(tensor)
            return made[id(tensor)]

        return substitute(inputs, fake)

    @contextmanager
    def running(self) -> Iterator[None]:
        with quiet(), self.mode, torch.no_grad():
            yield


class Rehearsal:
    """A copy of ``model`` over the same weights, free of hooks, to be run on real data."""

    def __init__(self, model: nn.Module) -> None:
        self.model: nn.Module = copy_module(model, torch.Tensor.detach)
        for module in self.model.modules():
            _without_hooks(module)

    @contextmanager
    def running(self) -> Iterator[None]:
        with quiet(), torch.no_grad():
            yield


def with_data(call: Any, device: torch.device) -> Any:
    """A copy of a call on ``device``, with noise for what is on ``meta``, and zeros for whole numbers there."""
    noise = torch.Generator().manual_seed(0)

    def real(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_meta:
            return tensor.detach().to(device, copy=True)
        if not tensor.is_floating_point():
            return torch.zeros_like(tensor, device=device)
        return torch.randn(tensor.shape, generator=noise).to(device, tensor.dtype)

    return substitute(call, real)


@contextmanager
def quiet() -> Iterator[None]:
    """Without torch's log of what failed on fake tensors: whoever tries says so better, or tries something else."""
    thread = threading.get_ident()
    mine = lambda record: record.thread != thread  # noqa: E731 - other threads may have something to say
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.addFilter(mine)
    try:
        yield
    finally:
        logger.removeFilter(mine)


def _may_steer(tensor: torch.Tensor) -> bool:
    whole = not tensor.is_floating_point() and not tensor.is_complex()
    return whole and tensor.numel() <= _LARGEST_REAL and not tensor.is_meta and not is_fake(tensor)


def _without_hooks(module: nn.Module) -> None:
    """Hooks move weights, print and count: none of that is a shape."""
    module._forward_hooks.clear()
    module._forward_pre_hooks.clear()
    if "_old_forward" in module.__dict__:  # accelerate keeps the forward that its hook wraps under this name
        module.forward = module.__dict__.pop("_old_forward")
        module.__dict__.pop("_hf_hook", None)
