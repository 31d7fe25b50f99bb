"""Keys and values of cross-attention that depend on the text alone.

Where that is so they are the same at every step of a sampling run, and a slice of the model gives them from the text:
it need not run again, and another text's keys and values are to be had without the rest of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from sloth_fx.analysis.dependencies import Dependencies, is_blank, is_property
from sloth_fx.analysis.whole import WholeGraph
from sloth_fx.capture.generate import generate
from sloth_fx.errors import SlothError
from sloth_fx.passes.core import attention_cores


@dataclass(frozen=True)
class TextKeyValues:
    """The slice of a model from its text to keys and values.

    ``cores`` are the attentions of the whole graph (by their order) for which the slice gives these; ``reasons`` says
    for each of the others why it does not. ``text`` are the names of the inputs that it takes. Sizes that the model
    reads from other inputs are those of the example; ``shapes`` are then the only shapes of text that the slice serves.
    ``values`` are what the host's Python has read in the text, and has to find again. What it decided by shapes of the
    text is as for the example: a slice of other shapes is the same if ``code`` and ``steered_by`` are.
    """

    function: Callable[..., Any]
    text: tuple[str, ...]
    cores: tuple[int, ...]
    reasons: dict[int, str]
    shapes: tuple[torch.Size, ...] | None
    values: dict[str, Tensor]
    code: str
    steered_by: list[tuple[int, ...]]

    def __call__(self, model: nn.Module, *text: Tensor) -> dict[int, tuple[Tensor, Tensor, Tensor | None]]:
        """Key (B, H, M, D), value (B, H, M, Dv) and mask, if there is one, by core, from the tensors that are named in
        ``text``."""
        if len(text) != len(self.text):
            raise SlothError(f"{len(text)} tensors are given for {', '.join(self.text)}")
        shapes = tuple(each.shape for each in text)
        if self.shapes is not None and shapes != self.shapes:
            raise SlothError(f"text of shapes {shapes} is given; the slice was captured for {self.shapes}")
        if not self.steered_alike(dict(zip(self.text, text, strict=True))):
            raise SlothError(f"the slice was captured for another {', '.join(self.values)}, by which the model goes")
        return self.function(model, *text)  # type: ignore[no-any-return]

    def steered_alike(self, text: Mapping[str, Tensor]) -> bool:
        """Whether what the host's Python reads in a ``text`` is what it has read."""
        return all(
            name in text and text[name].shape == value.shape and torch.equal(text[name].to(value.device), value)
            for name, value in self.values.items()
        )


def text_kv(whole: WholeGraph, text: Iterable[str]) -> TextKeyValues:
    """Slice ``whole`` (canonical) from the inputs named in ``text`` to keys, values and masks that need nothing else.

    Raises :class:`SlothError` for names that are no inputs.
    """
    names = tuple(text)
    unknown = [name for name in names if name not in whole.inputs]
    if unknown:
        raise SlothError(f"{', '.join(unknown)}: no inputs of the model; it takes {', '.join(whole.inputs)}")
    placeholders = [whole.inputs[name] for name in names]
    dependencies = Dependencies(whole.graph)
    reasons: dict[int, str] = {}
    found: dict[int, tuple[fx.Node | None, ...]] = {}
    labels = list(whole.inputs)
    steering = {whole.inputs[labels[index]] for index in whole.values}  # their values are part of the graph
    for index, core in enumerate(attention_cores(whole.graph)):
        needed = dependencies.placeholders(core.key) | dependencies.placeholders(core.value)
        needed |= dependencies.placeholders(core.mask) if core.mask is not None else frozenset()
        needed = needed | steering if needed else needed
        others = needed.difference(placeholders)
        if others:
            reasons[index] = f"keys or values depend on {', '.join(_names(whole, others))}"
        elif not needed:
            reasons[index] = "keys and values depend on no input"
        else:
            found[index] = core.key, core.value, core.mask
    slice_ = _Slice(whole.graph, dependencies, placeholders, found)
    shapes = tuple(each.meta["hint"].shape for each in placeholders)
    return TextKeyValues(
        function=generate(slice_.graph, "text_kv"),
        text=names,
        cores=tuple(found),
        reasons=reasons,
        shapes=shapes if slice_.baked else None,
        values={labels[index]: value for index, value in whole.values.items() if found and labels[index] in names},
        code=slice_.graph.python_code("self").src,
        steered_by=whole.steered_by,
    )


def _names(whole: WholeGraph, placeholders: Iterable[fx.Node]) -> list[str]:
    return sorted(name for name, node in whole.inputs.items() if node in placeholders)


class _Slice:
    """The graph from ``text`` to keys and values. ``baked`` tells that it holds sizes of other tensors."""

    def __init__(
        self,
        whole: fx.Graph,
        dependencies: Dependencies,
        text: list[fx.Node],
        outputs: dict[int, tuple[fx.Node | None, ...]],
    ) -> None:
        self.graph = fx.Graph()
        self.baked = False
        self.text = text
        self.copies: dict[fx.Node, Any] = {node: self.graph.placeholder(str(node.target)) for node in text}
        needed = dependencies.needed(node for each in outputs.values() for node in each if node is not None)
        for node in whole.nodes:
            if node in needed and node not in self.copies:
                asks = is_property(node) or is_blank(node)
                self.copies[node] = self._asked(node) if asks else self._copy(node)
        found: Any = {
            index: tuple(self.copies[each] if each is not None else None for each in nodes)
            for index, nodes in outputs.items()
        }
        self.graph.output(found)
        self.graph.lint()

    def _blank(self, node: fx.Node, hint: torch.Tensor) -> fx.Node:
        """A tensor like one that the slice does not have, made like the text."""
        values = list(node.args[1:])
        name = str(getattr(node.target, "__name__", node.target))
        if name.endswith("_like"):
            name, values, self.baked = f"new_{name.removesuffix('_like')}", [tuple(hint.shape), *values], True
        args = fx.node.map_arg(tuple(values), lambda each: self.copies[each])
        kwargs = {**fx.node.map_arg(node.kwargs, lambda each: self.copies[each]), "dtype": hint.dtype}
        return self.graph.call_method(name, (self.copies[self.text[0]], *args), kwargs)

    def _copy(self, node: fx.Node) -> Any:
        return self.graph.node_copy(node, lambda each: self.copies[each])

    def _asked(self, node: fx.Node) -> Any:
        """What is read from a tensor of the slice is read there; else it is the text's, or the example's."""
        if node.args[0] in self.copies:
            return self._copy(node)
        hint = node.meta["hint"]
        if is_blank(node):
            return self._blank(node, hint)
        for text in self.text if isinstance(hint, (torch.dtype, torch.device)) else ():
            if getattr(text.meta["hint"], str(node.args[1])) == hint:
                return self.graph.call_function(getattr, (self.copies[text], node.args[1]))
        self.baked = self.baked or not isinstance(hint, (torch.dtype, torch.device))
        return tuple(hint) if isinstance(hint, torch.Size) else hint
