"""What the graph of a model cannot tell: which argument is the latent, and what inputs to try it with."""

from sloth_fx.model_adapters.adapter import Inputs, ModelAdapter
from sloth_fx.model_adapters.arguments import Arguments
from sloth_fx.model_adapters.registry import adapter_for, assumed, is_known, register_adapter, trial_call

__all__ = [
    "Arguments",
    "Inputs",
    "ModelAdapter",
    "adapter_for",
    "assumed",
    "is_known",
    "register_adapter",
    "trial_call",
]
