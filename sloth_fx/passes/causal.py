"""Whether an attention core is causal: an argument that goes by another name in ``scaled_dot_product_attention``."""

from __future__ import annotations

import torch.nn.functional as F
from torch import fx

from sloth_fx.passes.core import Attend, AttentionCore


def causal_name(attend: Attend) -> str:
    """The keyword with which ``attend`` is told to hide later keys."""
    return "is_causal" if attend is F.scaled_dot_product_attention else "causal"


def causal_of(core: AttentionCore) -> bool | fx.Node:
    """What the core is told: a constant of the host, or a node of ours."""
    name, position = causal_name(core.attend), _position(core)
    told = core.node.args[position] if len(core.node.args) > position else core.node.kwargs.get(name, False)
    return told if isinstance(told, fx.Node) else bool(told)


def tell_causal(core: AttentionCore, causal: fx.Node) -> None:
    if len(core.node.args) > _position(core):
        core.node.update_arg(_position(core), causal)
    else:
        core.node.update_kwarg(causal_name(core.attend), causal)


def _position(core: AttentionCore) -> int:
    return 5 if core.attend is F.scaled_dot_product_attention else 4
