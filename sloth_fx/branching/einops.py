"""Values of two branches in einops, which asks of what library a tensor is, and takes no others.

It looks for backends among all subclasses of its own ones, so one that exists is known to it. einops is not imported
here: a host that has not done so does not call it.
"""

from __future__ import annotations

import sys
from typing import Any

from sloth_fx.branching.branched import Branched

_backend: Any = None


def tell_einops() -> None:
    """Let einops, if it is loaded, take values of two branches as it takes torch's tensors."""
    global _backend
    backends: Any = sys.modules.get("einops._backends")
    if backends is not None and _backend is None:
        _backend = type("BranchedBackend", (backends.TorchBackend,), _MEMBERS)


def _is_appropriate_type(self: Any, tensor: Any) -> bool:
    return isinstance(tensor, Branched)


_MEMBERS = {"framework_name": "sloth_fx", "is_appropriate_type": _is_appropriate_type}
