"""What a graph of the whole model tells."""

from sloth_fx.analysis.text_kv import TextKeyValues, text_kv
from sloth_fx.analysis.whole import WholeGraph, whole_graph

__all__ = ["TextKeyValues", "WholeGraph", "text_kv", "whole_graph"]
