"""Products of two tensors, whatever function computes them, with a letter for each dimension.

torch.bmm(a, b)                            "znd", "zdm" -> "znm"
torch.einsum("b i d, b j d -> b i j", a, b)    "bid", "bjd" -> "bij"
"""

from __future__ import annotations

import operator
import string
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

_MATMUL = (operator.matmul, torch.matmul, torch.bmm, "matmul", "bmm", "__matmul__")
_ADDED = (torch.baddbmm, "baddbmm")
_SECOND = ("other", "mat2")


@dataclass(frozen=True)
class Product:
    """``node`` is the product of ``left`` and ``right``, summed over the letters that ``out`` lacks.

    ``added`` is the tensor that it is added to, where it is, and counts.
    """

    node: fx.Node
    left: fx.Node
    right: fx.Node
    left_letters: str
    right_letters: str
    out: str
    added: fx.Node | None = None

    def side(self, letter: str) -> tuple[fx.Node, str, fx.Node, str] | None:
        """The factor that alone has ``letter`` and its letters, then the other one; ``None`` if both have it."""
        left, right = letter in self.left_letters, letter in self.right_letters
        if left == right:
            return None
        sides = (self.left, self.left_letters), (self.right, self.right_letters)
        mine, other = sides if left else sides[::-1]
        return *mine, *other


def product(node: fx.Node) -> Product | None:
    """``node`` as a product of two tensors, if it is one."""
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target in _MATMUL:
        return _matmul(node, [*node.args, *(node.kwargs[name] for name in ("input", *_SECOND) if name in node.kwargs)])
    if node.target in _ADDED:
        factors = [*node.args, *(node.kwargs[n] for n in ("input", "batch1", "batch2") if n in node.kwargs)]
        return _matmul(node, factors[1:3], None if node.kwargs.get("beta", 1) == 0 else factors[0])
    if node.target is torch.einsum:
        return _einsum(node)
    return None


def _matmul(node: fx.Node, factors: list[Any], added: Any = None) -> Product | None:
    if len(factors) != 2 or not all(isinstance(each, fx.Node) and dimensions(each) >= 2 for each in factors):
        return None
    left, right = factors
    batch = string.ascii_uppercase[: max(dimensions(left), dimensions(right)) - 2]

    def letters(factor: fx.Node, matrix: str) -> str:
        return batch[len(batch) - dimensions(factor) + 2 :] + matrix

    return Product(node, left, right, letters(left, "nd"), letters(right, "dm"), batch + "nm", added)


def _einsum(node: fx.Node) -> Product | None:
    equation, *factors = node.args
    if len(factors) == 1 and isinstance(factors[0], (list, tuple)):
        factors = list(factors[0])
    if not isinstance(equation, str) or "->" not in equation or not all(isinstance(each, fx.Node) for each in factors):
        return None
    inputs, out = equation.replace(" ", "").split("->")
    letters = inputs.split(",")
    if len(letters) != 2 or len(factors) != 2:
        return None
    left, right = factors
    spare = [letter for letter in string.ascii_uppercase if letter not in equation]
    dots = [dimensions(factor) - len(each) + 3 for factor, each in zip((left, right), letters, strict=True)]
    widest = max([count for count, each in zip(dots, letters, strict=True) if "..." in each], default=0)
    expanded = [
        each.replace("...", "".join(spare[widest - count : widest])) for count, each in zip(dots, letters, strict=True)
    ]
    out = out.replace("...", "".join(spare[:widest]))
    if any(len(set(each)) < len(each) for each in (*expanded, out)):  # a diagonal
        return None
    return Product(node, left, right, expanded[0], expanded[1], out)  # type: ignore[arg-type]


def dimensions(node: Any) -> int:
    """How many dimensions the tensor of a node has; none if it is no tensor."""
    hint = node.meta.get("hint") if isinstance(node, fx.Node) else None
    return hint.ndim if isinstance(hint, torch.Tensor) else 0
