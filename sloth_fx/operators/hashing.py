"""Numbers that look random, and are the same on every device and in every graph."""

from __future__ import annotations

from torch import Tensor

_MASK = 0xFFFFFFFF


def hashed(number: Tensor, seed: int | Tensor) -> Tensor:
    """Integers below 2 ** 32 that look random, of integers: a multiplicative hash with shifts.

    ``seed`` is an int, or a tensor of one integer, so that another seed is no new graph.
    """
    mixed = (number * 0x9E3779B1 + (seed + 1) * 0x85EBCA77) & _MASK
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & _MASK
    return mixed ^ (mixed >> 15)
