"""What else runs within a model that gives two predictions in one call: ComfyUI's attention, and Python of others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from sloth_fx.branching import Rows, rows_in
from sloth_fx.perturbed import Perturbed

_OVERRIDE = "optimized_attention_override"


class Sharing:
    """Whether a call of ``model`` serves both of its branches, if it can: not where others' Python takes part, which
    works on tensors, and goes by the rows that ComfyUI knows of."""

    def __init__(self, model: nn.Module) -> None:
        self._perturbed = next((each for each in model.children() if isinstance(each, Perturbed)), None)
        self._can = self._perturbed is not None and self._perturbed.shares

    def decide(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """For a call with these options. Returns those to make it with."""
        if self._perturbed is None or not self._can:
            return dict(options)
        self._perturbed.shares = not _others_take_part(options)
        return {**options, _OVERRIDE: attend_rows} if self._perturbed.shares else dict(options)


def attend_rows(attend: Callable[..., Any], query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    """As ComfyUI has an attention overridden: its kernels are called with tensors, those of both branches at once."""
    given = (query, key, value, args, kwargs)
    first = next(rows_in(given), None)
    if first is None:
        return attend(query, key, value, *args, **kwargs)
    parted = any(each.parted for each in rows_in(given))

    def whole(each: Any) -> Any:
        if isinstance(each, Tensor) and each.shape[0] == first.count:
            each = Rows(each, first.groups)
        if isinstance(each, Rows) and each.axis != 0:
            raise TypeError(f"attention of rows along axis {each.axis} of {tuple(each.shape)}")
        return (each.stacked() if parted else each.tensor) if isinstance(each, Rows) else each

    query, key, value, *args = (whole(each) for each in (query, key, value, *args))  # type: ignore[assignment]
    found = attend(query, key, value, *args, **{name: whole(each) for name, each in kwargs.items()})
    return Rows(found, first.groups, 0, parted)


def _others_take_part(options: Mapping[str, Any]) -> bool:
    wrappers = (options.get("wrappers") or {}).get("diffusion_model") or {}
    return any(options.get(name) for name in ("patches", "patches_replace", _OVERRIDE)) or any(wrappers.values())
