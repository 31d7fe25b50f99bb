"""Libraries that run denoisers, met by what their objects can do: none of them is imported."""

from sloth_fx.integrations.diffusers import attach
from sloth_fx.integrations.handle import Handle

__all__ = ["Handle", "attach"]
