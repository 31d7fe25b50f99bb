"""Try a core's function on tensors of other sizes, without data: only then may operators call it on others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from sloth_fx.capture.skeleton import quiet
from sloth_fx.passes.core import Attend


def refusal_at_other_sizes(attend: Attend, tensors: Sequence[torch.Tensor], options: Mapping[str, Any]) -> str | None:
    """Why ``attend`` does not serve another batch and other numbers of tokens, if so. ``tensors``
    are its query, key and value, and fake."""
    query, key, value = tensors
    values: Any = fx.node.map_aggregate(options, lambda each: each.meta["hint"] if isinstance(each, fx.Node) else each)
    batch = query.shape[0]

    def like(tensor: torch.Tensor, more: int) -> torch.Tensor:
        samples = 2 * batch if tensor.shape[0] == batch else tensor.shape[0]
        return tensor.new_empty((samples, *tensor.shape[1:-2], tensor.shape[-2] + more, tensor.shape[-1]))

    others = like(query, 3), like(key, 5), like(value, 5)
    expected = (*others[0].shape[:-1], value.shape[-1])
    mode: Any = query.fake_mode  # type: ignore[attr-defined]
    try:
        with quiet(), mode, torch.no_grad():
            for masked in (False, True):
                mask = others[0].new_ones((query.shape[-2] + 3, key.shape[-2] + 5), dtype=torch.bool)
                shape = tuple(attend(*others, *((mask,) if masked else ()), **values).shape)
                if shape != expected:
                    return f"at another size it gives {shape}, not {expected}"
    except Exception as error:  # whatever the host's own code raises
        reason = str(error).strip().splitlines()
        return f"it cannot be computed at another size: {reason[0] if reason else type(error).__name__}"
    return None
