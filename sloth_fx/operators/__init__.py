"""Pure tensor functions: no graph, no model, no state."""

from sloth_fx.operators.guidance import normalized_guidance
from sloth_fx.operators.layout import KeyLayout, Pooling
from sloth_fx.operators.lse import attention_with_lse, merge_attention
from sloth_fx.operators.masks import both_masks, causal_mask, reduce_mask
from sloth_fx.operators.near_sighted import Attend, near_sighted_attention
from sloth_fx.operators.pooling import axis_strides, flat_stride, reduce_tokens
from sloth_fx.operators.sequence import join_image, split_image
from sloth_fx.operators.tiling import Run, runs, tile_size

__all__ = [
    "Attend",
    "KeyLayout",
    "Pooling",
    "Run",
    "attention_with_lse",
    "axis_strides",
    "both_masks",
    "causal_mask",
    "flat_stride",
    "join_image",
    "merge_attention",
    "near_sighted_attention",
    "normalized_guidance",
    "reduce_mask",
    "reduce_tokens",
    "runs",
    "split_image",
    "tile_size",
]
