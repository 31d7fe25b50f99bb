"""Pure tensor functions: no graph, no model, no state."""

from sloth_fx.operators.layout import KeyLayout, Pooling
from sloth_fx.operators.lse import attention_with_lse, merge_attention
from sloth_fx.operators.near_sighted import Attend, near_sighted_attention
from sloth_fx.operators.pooling import axis_strides, flat_stride, reduce_tokens
from sloth_fx.operators.tiling import Run, runs, tile_size

__all__ = [
    "Attend",
    "KeyLayout",
    "Pooling",
    "Run",
    "attention_with_lse",
    "axis_strides",
    "flat_stride",
    "merge_attention",
    "near_sighted_attention",
    "reduce_tokens",
    "runs",
    "tile_size",
]
