"""The graph of a whole model, with nothing but modules of ``torch.nn`` as leaves.

Nothing is rewritten in it: modules in between carry other people's hooks. It serves to see what depends on what.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from sloth_fx.capture.call import labelled_tensors, read_call
from sloth_fx.capture.capture import Call
from sloth_fx.capture.generate import generate
from sloth_fx.capture.recorder import Recorder
from sloth_fx.capture.skeleton import Skeleton, quiet
from sloth_fx.errors import SlothError
from sloth_fx.passes.canonicalise import canonicalise


@dataclass(frozen=True)
class WholeGraph:
    """A model's forward as one graph, for one pattern of call.

    ``inputs`` are the placeholders by the names of the arguments whose tensors they stand for. ``function(model,
    *tensors)`` runs the graph. Sizes, dtypes and devices are those of the example wherever they decided a branch, and
    ``values`` those of the inputs (by number) that Python has read. ``steered_by`` are, for each decision of the host's
    Python, the integers that it was made from.
    """

    graph: fx.Graph
    function: Callable[..., Any]
    inputs: dict[str, fx.Node]
    pattern: tuple[Any, ...]
    values: dict[int, torch.Tensor]
    steered_by: list[tuple[int, ...]]

    def __call__(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What ``model(*args, **kwargs)`` returns. Raises :class:`SlothError` for another pattern of call, or other
        values of what the model steers by."""
        pattern, tensors = read_call(args, kwargs)
        if pattern != self.pattern:
            raise SlothError(
                f"the graph of {type(model).__name__} was captured for another kind of call: {self.pattern}"
            )
        for index, value in self.values.items():
            if not torch.equal(tensors[index].to(value.device), value):
                name = list(self.inputs)[index]
                raise SlothError(f"the graph of {type(model).__name__} was captured for another {name}: {value}")
        return self.function(model, *tensors)


def whole_graph(model: nn.Module, *args: Any, canonical: bool = True, **kwargs: Any) -> WholeGraph:
    """Capture ``model(*args, **kwargs)``, of which only shapes matter, as one graph.

    ``canonical`` makes every attention in it a core. Raises :class:`SlothError` with the reason where the model cannot
    be captured.
    """
    return capture_whole(Skeleton(model), (args, kwargs), canonical=canonical)


def capture_whole(skeleton: Skeleton, call: Call, *, canonical: bool = True) -> WholeGraph:
    """As :func:`whole_graph`, of a model that is a skeleton already."""
    kind = type(skeleton.model).__name__
    fake_call = skeleton.fake_inputs(call)
    try:
        with quiet():
            recorder = _record(skeleton, fake_call)
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise SlothError(
            f"{kind} cannot be captured as a whole: {type(error).__name__}: {reason[0] if reason else 'no message'}"
        ) from error
    graph = recorder.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    names = [name for name, _ in labelled_tensors(skeleton.model.forward, *fake_call)]
    if canonical:
        canonicalise(graph)
    return WholeGraph(
        graph=graph,
        function=generate(graph, kind),
        inputs=dict(zip(names, placeholders, strict=True)),
        pattern=read_call(*call)[0],
        values={
            index: tensor.clone()
            for index, (node, tensor) in enumerate(zip(placeholders, read_call(*fake_call)[1], strict=True))
            if node in recorder.read
        },
        steered_by=recorder.steered_by,
    )


def _record(skeleton: Skeleton, call: tuple[Any, Any]) -> Recorder:
    for follow_types in (True, False):
        recorder = Recorder(skeleton, skeleton.model, follow_types=follow_types, is_leaf=_is_leaf, reads_values=True)
        try:
            recorder.record(*call)
            break
        except Exception:  # perhaps a proxy where only a real dtype or device will do
            if not follow_types:
                raise
    return recorder


def _is_leaf(module: nn.Module) -> bool:
    """Linear layers of whatever make, such as LoRA's, and modules of torch that contain no others: what
    ``nn.Sequential`` and ``nn.MultiheadAttention`` do matters."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return True
    return type(module).__module__.startswith("torch.nn.") and not any(True for _ in module.children())
