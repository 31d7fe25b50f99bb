"""The ``transformer_options`` of a call, as the modules of its model hand them to each other."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from sloth_fx.branching import Groups
from sloth_fx.capture.objects import HandedOn

_WRAPPERS = "diffusion_model"  # around the forward of the model


class Handing:
    """Makes options that are no part of a call of those that ComfyUI gives."""

    def __init__(self) -> None:
        self._adapted: dict[Callable[..., Any], Callable[..., Any]] = {}  # of the last call; another one is a new graph

    def options(self, given: Mapping[str, Any]) -> HandedOn:
        """What ``given`` holds. Wrappers around the forward of the model, which may ask for a ``dict``, get one."""
        wrappers = given.get("wrappers") or {}
        if wrappers.get(_WRAPPERS):
            known, self._adapted = self._adapted, {}
            mine = {key: [self._with_dicts(each, known) for each in some] for key, some in wrappers[_WRAPPERS].items()}
            given = {**given, "wrappers": {**wrappers, _WRAPPERS: mine}}
        return _handed(given)

    def _with_dicts(self, wrapper: Callable[..., Any], known: Mapping[Any, Any]) -> Callable[..., Any]:
        try:
            found = known.get(wrapper)
        except TypeError:  # it cannot be remembered
            return functools.partial(_call_with_dicts, wrapper)
        self._adapted[wrapper] = found if found is not None else functools.partial(_call_with_dicts, wrapper)
        return self._adapted[wrapper]


def _handed(options: Mapping[str, Any]) -> HandedOn:
    handed = HandedOn(options)
    others = [
        uuid.uuid5(each, "perturbed") for each in options.get("uuids") or ()
    ]  # now, for within a graph it is a break
    handed.of_groups = functools.partial(_of_groups, dict(options), others)
    return handed


def _of_groups(options: Mapping[str, Any], uuids: Sequence[Any], groups: Groups) -> HandedOn:
    """The options of a further call, of some groups of the batch: IP-Adapter and its like find the rows of the positive
    by ``cond_or_uncond``. Caches keep what was predicted for each of ``uuids``, so these are others."""
    there = [index for index, asked in enumerate(groups) if asked]
    kept: dict[str, Any] = {}
    if len(options.get("cond_or_uncond") or ()) == len(groups):
        kept["cond_or_uncond"] = [options["cond_or_uncond"][index] for index in there]
    if len(uuids) == len(groups):
        kept["uuids"] = [uuids[index] for index in there]
    return HandedOn({**options, **kept})


def _call_with_dicts(wrapper: Callable[..., Any], executor: Any, *args: Any, **kwargs: Any) -> Any:
    handed = [each for each in (*args, *kwargs.values()) if isinstance(each, HandedOn)]

    def plain(each: Any) -> Any:
        return each.data if isinstance(each, HandedOn) else each

    latent, *others = args
    latent = latent.clone() if isinstance(latent, Tensor) else latent  # caches write into it, and a second call has it
    args, kwargs = (latent, *map(plain, others)), {name: plain(each) for name, each in kwargs.items()}
    return wrapper(_Executor(executor, handed), *args, **kwargs)


class _Executor:
    """What a wrapper calls to go on: the options that it passes are handed on again."""

    def __init__(self, executor: Any, handed: list[HandedOn]) -> None:
        self._executor = executor
        self._handed = handed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = tuple(map(self._back, args)), {name: self._back(each) for name, each in kwargs.items()}
        return self._executor(*args, **kwargs)

    def _back(self, value: Any) -> Any:
        found = next((each for each in self._handed if each.data is value), None)
        if found is None and isinstance(value, dict) and "cond_or_uncond" in value:  # a changed copy
            return _handed(value)
        return value if found is None else found
