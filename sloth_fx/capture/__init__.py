"""Step two: an owner module's forward as a ``torch.fx.Graph``, its children left as leaves."""

from sloth_fx.capture.capture import Capture, capture, fingerprint
from sloth_fx.capture.skeleton import Skeleton

__all__ = ["Capture", "Skeleton", "capture", "fingerprint"]
