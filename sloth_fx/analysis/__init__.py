"""What a graph of the whole model tells."""

from sloth_fx.analysis.whole import WholeGraph, whole_graph

__all__ = ["WholeGraph", "whole_graph"]
