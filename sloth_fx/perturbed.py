"""Calls of a model whose attention is perturbed besides: what the model says then is steered away from.

Both predictions come from one call, in which rows of the batch pass in two branches from the first perturbed site on
(:mod:`sloth_fx.branching.rows`). Where a host does not take such values, the model is called a second time.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sloth_fx.branching import Asks, Rows, UnwritableError, rows_in, tell_einops, together
from sloth_fx.call_rows import can_be_picked, has_batch, picked
from sloth_fx.capture.capture import Call
from sloth_fx.capture.skeleton import Skeleton
from sloth_fx.errors import SlothError
from sloth_fx.layouts import set_layouts
from sloth_fx.model_adapters import Arguments
from sloth_fx.nested import copied, leaves, mapped
from sloth_fx.operators import KeyLayout
from sloth_fx.operators.perturbation import guided, share_of
from sloth_fx.perturbation_specs import PerturbationSpec
from sloth_fx.schedule import Moment

NAME = "sloth_perturbed"
_UNPERTURBED = "_sloth_fx_unperturbed_forward"


class Perturbed(nn.Module):
    """Runs the calls of a model in two branches while ``spec`` acts, and puts both predictions together.

    ``latent`` is the argument that has the rows of the batch: its name and its position. With ``shares`` one call
    serves both branches, unless a negative text has branches of its own in it.
    """

    def __init__(self, spec: PerturbationSpec, latent: tuple[str, int]) -> None:
        super().__init__()
        self.spec = spec
        self.latent = latent
        self.layout = KeyLayout((1, 1))
        self.rows: tuple[bool, ...] = (True,)
        self.halves = 1
        self.shares = False
        self.scale = torch.tensor(0.0, dtype=torch.float64)  # not a number: another one is no new graph
        self.share = torch.tensor(1.0, dtype=torch.float64)
        self.spreads = True  # what a group is guided by, to the others

    def set_layout(self, layout: KeyLayout, halves: int) -> None:
        self.layout, self.halves = layout, halves

    def set_rows(self, rows: tuple[bool, ...]) -> None:
        self.rows = rows

    def set_moment(self, moment: Moment, guidance_scale: float | None) -> None:
        """``guidance_scale`` is that of classifier-free guidance which takes what the model returns."""
        self.scale.fill_(self.spec.scale_at(moment))
        self.share.fill_(share_of(guidance_scale))
        self.spreads = guidance_scale is None

    @property
    def acts(self) -> bool:
        return self.layout.perturbed and any(self.rows)

    def run(self, model: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The guided result of ``forward``, that of ``model``."""
        check_no_cache(model, self.spec)
        latent = self.latent_of(args, kwargs)
        batch = self._checked_batch(latent)
        if self.shares and not self.layout.guided:
            with _asking(model, "both"):
                return self._run_shared(model, forward, args, kwargs)
        result = forward(*copied(args), **copied(kwargs))
        alone = not all(self.rows) and can_be_picked((args, kwargs), latent)
        if alone or all(self.rows):  # of options, it takes those of another call in any case
            args, kwargs = (mapped(lambda each: picked(each, self.rows, batch), given) for given in (args, kwargs))
        with _asking(model, "perturbed", alone=alone):
            perturbed = forward(*args, **kwargs)
        if not alone:
            perturbed = mapped(lambda each: picked(each, self.rows, batch), perturbed)
        if not any(has_batch(each, batch) for each in leaves(result)):
            raise SlothError(
                f"{type(self.spec).__name__} guides the rows of a batch, and nothing that {type(model).__name__} gives "
                f"has {batch} of them along axis 0"
            )
        return mapped(functools.partial(self._both, batch=batch), result, perturbed)

    def _run_shared(self, model: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        name, position = self.latent
        rows = Rows(self.latent_of(args, kwargs), self.rows)
        if name in kwargs:
            kwargs = {**kwargs, name: rows}
        else:
            args = (*args[:position], rows, *args[position + 1 :])
        try:
            return self._together(forward(*args, **kwargs))
        except (TypeError, UnwritableError) as error:
            raise SlothError(
                f"{type(model).__name__} with {type(self.spec).__name__}: this call, with a latent "
                f"{tuple(rows.shape)}, cannot serve both branches: {error}; transform with example_inputs like those "
                "of this call"
            ) from error

    def latent_of(self, args: Any, kwargs: Any) -> Any:
        name, position = self.latent
        return kwargs[name] if name in kwargs else args[position]

    def _checked_batch(self, latent: Any) -> int:
        batch = len(latent)
        if self.halves != len(self.rows):
            raise SlothError(
                f"the batch holds {self.halves} groups of conditioning, and rows names {len(self.rows)}: say what they "
                'are with rows of the context, as in ("uncond", "cond")'
            )
        if batch % len(self.rows):
            raise SlothError(
                f"a batch of {batch} rows cannot be divided into {len(self.rows)} groups of conditioning: say which "
                'there are with rows of the context, as in ("uncond", "cond")'
            )
        return batch

    def _together(self, result: Any) -> Any:
        if not any(each.parted for each in rows_in(list(result.values()) if isinstance(result, dict) else result)):
            raise TypeError("what is perturbed does not reach the result")
        return together(result, self._guided_rows)

    def _guided_rows(self, result: Rows) -> Tensor:
        if not result.parted or not result.dtype.is_floating_point:
            return result.positive
        if result.axis != 0:
            raise TypeError(
                f"a result whose rows lie along axis {result.axis}: {type(self.spec).__name__} needs axis 0"
            )
        return self._guided(result.positive, result.negative)

    def _guided(self, prediction: Tensor, perturbed: Tensor) -> Tensor:
        precision = torch.promote_types(prediction.dtype, torch.float32)
        numbers: Any = self.scale.to(precision), self.share.to(precision)
        scale, share = numbers
        how: Any = {"rescale": self.spec.rescale, "share": share, "spread": self.spreads}
        return guided(prediction, perturbed, self.rows, scale=scale, **how)

    def _both(self, result: Any, perturbed: Any, *, batch: int) -> Any:
        if not has_batch(result, batch):
            return result
        expected = (batch // len(self.rows) * sum(self.rows), *result.shape[1:])
        if tuple(perturbed.shape) != expected:
            raise SlothError(f"the perturbed call gives {tuple(perturbed.shape)}, where {expected} was expected")
        return self._guided(result, perturbed)

    def extra_repr(self) -> str:
        return str(self.spec)


@contextmanager
def _asking(model: nn.Module, asks: Asks, *, alone: bool = False) -> Iterator[None]:
    """While it is entered, the operators of ``model`` know what its calls are for; ``alone`` tells that these have no
    rows but those that are guided."""
    _set(model, asks=asks, alone=alone)
    try:
        yield
    finally:
        _set(model, asks="plain", alone=False)


def _set(model: nn.Module, **values: Any) -> None:
    for module in model.modules():
        if isinstance(getattr(module, "layout", None), KeyLayout):  # it is ours
            for name, value in values.items():
                if hasattr(module, name):
                    setattr(module, name, value)


def check_no_cache(model: nn.Module, spec: PerturbationSpec) -> None:
    """Raise :class:`SlothError` for a model that reuses what its blocks gave in an earlier call: the second prediction
    of a step would be made of the first."""
    if getattr(model, "is_cache_enabled", False):
        raise SlothError(
            f"{type(spec).__name__} asks the model twice in a step, and its cache would answer with what it found "
            "before: disable_cache() of the model first"
        )


def latent_argument(spec: PerturbationSpec, model: nn.Module, arguments: Arguments, call: Call) -> tuple[str, int]:
    """Name and position of the latent. Raises :class:`SlothError` where a ``call`` has none with rows."""
    args, kwargs = call
    latent = arguments.latent(args, kwargs)
    names = list(inspect.signature(model.forward).parameters)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    name = next((name for name, value in given.items() if value is latent), None)
    if not isinstance(latent, Tensor) or name is None:
        raise SlothError(
            f"{type(spec).__name__} guides the rows of a batch, and {type(model).__name__} takes no latent that is one "
            "tensor with a row for each image"
        )
    return name, names.index(name) if name in names else len(args)


def why_not_shared(model: nn.Module, call: Call) -> str | None:
    """Why one call of ``model``, patched and perturbed, cannot serve both branches: tried on a copy without data.

    Raises :class:`SlothError` where the sites cannot be perturbed as asked: two calls could not either.
    """
    skeleton = Skeleton(model)
    args, kwargs = skeleton.fake_inputs(call)
    set_layouts(skeleton.model, perturbed=True)
    share(skeleton.model)
    with skeleton.running():
        try:
            skeleton.model(*args, **kwargs)
        except SlothError as error:
            if not isinstance(error.__cause__, (TypeError, UnwritableError)):
                raise
            return f"{type(error.__cause__).__name__}: {error.__cause__}"
        except Exception as error:  # whatever the host's Python does with what stands for a tensor
            reason = str(error).strip().splitlines()
            return f"{type(error).__name__}: {reason[0] if reason else 'no message'}"
    return None


def share(model: nn.Module) -> None:
    """From now on one call of ``model`` serves both branches."""
    perturbed = model._modules[NAME]
    assert isinstance(perturbed, Perturbed)
    perturbed.shares = True
    tell_einops()


def install(model: nn.Module, perturbed: Perturbed) -> None:
    """Let ``model`` run its calls through ``perturbed``."""
    model.add_module(NAME, perturbed)
    slot = "_old_forward" if "_hf_hook" in model.__dict__ else "forward"  # accelerate's hook wraps what lies there
    model.__dict__[_UNPERTURBED] = model.__dict__.get(slot)
    setattr(model, slot, types.MethodType(_forward_like(model.forward), model))


def is_perturbed(model: nn.Module) -> bool:
    return _UNPERTURBED in model.__dict__


def _forward_like(original: Callable[..., Any]) -> Callable[..., Any]:
    """A forward with the parameters that ``original`` has, for whoever asks for their names."""

    @functools.wraps(getattr(original, "__func__", original))
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _forward(self, *args, **kwargs)

    return forward


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    perturbed = self._modules[NAME]
    assert isinstance(perturbed, Perturbed)
    own: Callable[..., Any] | None = self.__dict__[_UNPERTURBED]
    forward = own if own is not None else functools.partial(type(self).forward, self)
    return perturbed.run(self, forward, args, kwargs) if perturbed.acts else forward(*args, **kwargs)
