"""A model-agnostic ``torch.fx`` rewriter for the attention of diffusion denoisers."""

from sloth_fx.capture.host_functions import register_attention_function
from sloth_fx.context import TimestepContext
from sloth_fx.errors import SlothError
from sloth_fx.guidance_specs import NAG, Sigma
from sloth_fx.inspection import context, graph, inspect, report
from sloth_fx.integrations import attach
from sloth_fx.model_adapters import ModelAdapter, register_adapter
from sloth_fx.operators import KeyLayout
from sloth_fx.perturbation_specs import PAG, SAG, SEG, SLG, TPG, Perturb
from sloth_fx.report import Report
from sloth_fx.saving import load, save
from sloth_fx.schedule import Constant, Moment, NoiseSchedule, PeakDecay, StepDecay
from sloth_fx.serialize import load_spec
from sloth_fx.site import AttentionSite, LatentSize
from sloth_fx.spec import (
    HyperTile,
    NearSightedAttention,
    NearSightedTile,
    Reduction,
    SlothfulAttention,
    TokenDownsample,
    TokenMerging,
)
from sloth_fx.transform import transform
from sloth_fx.warmup import warmup

__version__ = "0.1.0"

__all__ = [
    "NAG",
    "PAG",
    "SAG",
    "SEG",
    "SLG",
    "TPG",
    "AttentionSite",
    "Constant",
    "HyperTile",
    "KeyLayout",
    "LatentSize",
    "ModelAdapter",
    "Moment",
    "NearSightedAttention",
    "NearSightedTile",
    "NoiseSchedule",
    "PeakDecay",
    "Perturb",
    "Reduction",
    "Report",
    "Sigma",
    "SlothError",
    "SlothfulAttention",
    "StepDecay",
    "TimestepContext",
    "TokenDownsample",
    "TokenMerging",
    "attach",
    "context",
    "graph",
    "inspect",
    "load",
    "load_spec",
    "register_adapter",
    "register_attention_function",
    "report",
    "save",
    "transform",
    "warmup",
]
