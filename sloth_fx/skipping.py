"""Blocks of a model that are left out where it is asked once more, for guidance by skipped layers.

A block that is left out gives back what came in: each of its outputs is the residual stream that it continues.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, is_fake
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from sloth_fx.branching import Asks, apart, rows_in
from sloth_fx.branching.branched import name_of
from sloth_fx.capture.call import substitute
from sloth_fx.capture.capture import Call
from sloth_fx.capture.skeleton import Rehearsal, Skeleton
from sloth_fx.checks import unknown
from sloth_fx.errors import SlothError
from sloth_fx.operators import KeyLayout
from sloth_fx.perturbation_specs import SLG
from sloth_fx.planner import block_of
from sloth_fx.site import AttentionSite
from sloth_fx.where import matches

NAME = "sloth_skip"
_WHOLE = "_sloth_fx_whole_forward"
_CAST = frozenset({"to", "type", "type_as", "float", "half", "bfloat16"})
_COPIED = frozenset({"contiguous", "clone", "detach", "dropout", "clamp", "clip", "nan_to_num", "expand"})
_SHAPED = frozenset({"reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze"})
_MOVED = frozenset({"transpose", "permute", "movedim"})
_PARTS = frozenset({"split", "split_with_sizes", "getitem", "narrow"})
_KEPT = _CAST | _COPIED | _SHAPED | _MOVED | _PARTS | {"addcmul"}

Name = int | str
"""An argument of a block: its position, or its name."""

Streams = tuple[Name | None, ...] | Name
"""For each output of a block, or the only one, the argument that it continues; of several, some may be ``None``."""


class SkippedBlock(nn.Module):
    """Lets a block pass what comes in, in the perturbed branch. ``streams`` tells which input each output continues.

    ``asks`` is what the present call of the model is for: the prediction, the perturbed one, or both.
    """

    def __init__(self, streams: Streams, layout: KeyLayout) -> None:
        super().__init__()
        self.streams = streams
        self.layout = layout
        self.asks: Asks = "plain"

    def set_layout(self, layout: KeyLayout, halves: int) -> None:
        self.layout = layout

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.asks == "plain" or not self.layout.perturbed:
            return forward(*args, **kwargs)
        if self.asks == "perturbed":
            return self._passed(args, kwargs)
        if next(rows_in((args, kwargs)), None) is None:
            raise TypeError("a block that is left out is not reached by the latent")
        return apart(lambda args, kwargs: forward(*args, **kwargs), self._passed, args, kwargs)

    def _passed(self, args: Any, kwargs: Any) -> Any:
        def named(name: Name | None) -> Any:
            return None if name is None else args[name] if isinstance(name, int) else kwargs[name]

        return tuple(map(named, self.streams)) if isinstance(self.streams, tuple) else named(self.streams)


def skip(block: nn.Module, streams: Streams) -> SkippedBlock:
    """Let ``block`` be left out, in the perturbed branch."""
    skipped = SkippedBlock(streams, KeyLayout((1, 1)))
    block.add_module(NAME, skipped)
    slot = "_old_forward" if "_hf_hook" in block.__dict__ else "forward"  # accelerate's hook wraps what lies there
    block.__dict__[_WHOLE] = block.__dict__.get(slot)
    setattr(block, slot, types.MethodType(_forward, block))
    return skipped


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    skipped = self._modules[NAME]
    assert isinstance(skipped, SkippedBlock)
    own: Callable[..., Any] | None = self.__dict__[_WHOLE]
    return skipped.run(own if own is not None else functools.partial(type(self).forward, self), args, kwargs)


def skipped_blocks(spec: SLG, sites: Sequence[AttentionSite]) -> list[str]:
    """The paths of the blocks that ``spec`` names. Raises :class:`SlothError` for one that does not exist."""
    blocks = list(dict.fromkeys(block_of(site.path) for site in sites if matches(spec.where, site)))
    known = [block for block in blocks if block is not None]
    found = []
    for layer in spec.layers:
        if isinstance(layer, int) and layer >= len(known):
            there = f"it has blocks 0 to {len(known) - 1}" if known else "its attention lies in no list of blocks"
            raise SlothError(f"SLG: block {layer} does not exist: {there} ({', '.join(known[:1] + known[-1:])})")
        if isinstance(layer, str) and layer not in known:
            raise SlothError(f"SLG: block {unknown(layer, known)}")
        found.append(known[layer] if isinstance(layer, int) else layer)
    return list(dict.fromkeys(found))


def streams_of(model: nn.Module, skeleton: Skeleton, call: Call, paths: Sequence[str]) -> dict[str, Streams]:
    """What each output of the blocks at ``paths`` continues: seen in a run of the ``skeleton`` of ``model``, or, where
    the host is steered by what it computes, of a copy with data.

    Raises :class:`SlothError` where that is not clear.
    """
    try:
        return _seen(skeleton, skeleton.fake_inputs(call), paths)
    except SlothError as refusal:
        tensors = [*model.parameters(), *model.buffers()]
        given = [each for each in tree_leaves(call) if isinstance(each, Tensor)]
        steered = isinstance(refusal.__cause__, (DataDependentOutputException, DynamicOutputShapeException))
        if not steered or any(each.is_meta or is_fake(each) for each in (*tensors, *given)):
            raise
        real = substitute(call, lambda each: each.detach().to(tensors[0].device))
        return _seen(Rehearsal(model), real, paths)


def _seen(trial: Skeleton | Rehearsal, call: Call, paths: Sequence[str]) -> dict[str, Streams]:
    found: dict[str, Streams] = {}
    args, kwargs = call
    blocks = {path: trial.model.get_submodule(path) for path in paths}
    before = {path: block.__dict__.get("forward") for path, block in blocks.items()}
    for path, block in blocks.items():
        block.forward = _watched(path, block.forward, found)
    try:
        with trial.running():
            trial.model(*args, **kwargs)
    except SlothError:
        raise
    except Exception as error:
        raise SlothError(
            f"SLG: what the blocks of {type(trial.model).__name__} add to is seen on a copy of it, which does not run: "
            f"{type(error).__name__}: {str(error).strip():.200}"
        ) from error
    finally:
        for path, block in blocks.items():
            block.__dict__.pop("forward")
            block.__dict__.update({"forward": before[path]} if before[path] is not None else {})
    for path, block in blocks.items():
        if path not in found:
            raise SlothError(
                f"SLG: {path} cannot be left out, because it is never called: it is a {type(block).__name__}, whose "
                "parts the model calls one by one"
            )
    return found


def _watched(path: str, forward: Callable[..., Any], found: dict[str, Streams]) -> Callable[..., Any]:
    def watched(*args: Any, **kwargs: Any) -> Any:
        given: dict[Name, Any] = dict(enumerate(args))
        given.update(kwargs)
        names = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        with _Residuals(names) as residuals:
            out = forward(*args, **kwargs)
        outputs = out if isinstance(out, tuple) else (out,)
        streams: list[Name | None] = []
        for number, each in enumerate(outputs):
            name = residuals.stream_of(each)
            if isinstance(out, tuple) and each is None:  # a text that ends here
                streams.append(None)
            elif name is not None and each.shape == names[name].shape:
                streams.append(name)
            else:
                raise SlothError(
                    f"SLG: which input of {path} its output {number} continues is not clear, so it cannot be left out: "
                    "its blocks have to add to what comes in"
                )
        now: Any = tuple(streams) if isinstance(out, tuple) else streams[0]
        if found.setdefault(path, now) != now:
            raise SlothError(f"SLG: {path} is called in several ways, and cannot be left out")
        return out

    return watched


class _Joined(tuple[Any, ...]):
    """Streams one after another along an axis: (axis, (stream, size), ...)."""


class _Residuals(TorchFunctionMode):
    """Follows the tensors ``names`` through additions, and through what moves them."""

    def __init__(self, names: dict[Name, Tensor]) -> None:
        super().__init__()
        self._streams: dict[int, Any] = {id(value): name for name, value in names.items()}
        self._kept: list[Any] = list(names.values())  # or their ids might be those of others

    def stream_of(self, value: Any) -> Name | None:
        stream = self._streams.get(id(value))
        return None if isinstance(stream, _Joined) else stream

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        stream = self._after(name_of(function), args, kwargs or {})
        if isinstance(found, Tensor):
            self._note(found, self._cut(name_of(function), stream, found, args))
        elif isinstance(found, (tuple, list)) and isinstance(stream, _Joined):
            axis, *parts = stream
            sizes = [each.shape[axis % each.ndim] for each in found if isinstance(each, Tensor)]
            if sizes == [size for _, size in parts]:
                for each, (name, _) in zip(found, parts, strict=True):
                    self._note(each, name)
        return found

    def _note(self, value: Any, stream: Any) -> None:
        if stream is None:
            self._streams.pop(id(value), None)
        else:
            self._streams[id(value)] = stream
        self._kept.append(value)

    def _after(self, name: str, args: Any, kwargs: Any) -> Any:
        """The stream that a result continues, of all of it or of its parts."""
        if name in ("add", "iadd", "radd", "sub", "isub"):
            given = [self._streams.get(id(each)) for each in (*args, *kwargs.values())]
            streams = [each for each in given[: 1 if "sub" in name else 2] if each is not None]
            return streams[0] if len(streams) == 1 else None
        if name in ("cat", "concat"):
            values = args[0] if args else kwargs["tensors"]
            axis = kwargs.get("dim", args[1] if len(args) > 1 else 0) - 0
            axis = axis % values[0].ndim - values[0].ndim
            return _Joined((axis, *((self._streams.get(id(each)), each.shape[axis]) for each in values)))
        if name in ("div", "truediv", "mul"):  # by one: a factor that a host has and does not use
            by_one = len(args) == 2 and isinstance(args[1], (int, float)) and args[1] == 1
            return self._streams.get(id(args[0])) if by_one else None
        if name in _KEPT:
            return self._streams.get(id(args[0])) if args else None
        return None

    def _cut(self, name: str, stream: Any, found: Tensor, args: Any) -> Any:
        """The stream of a part of several."""
        if name not in ("getitem", "narrow"):
            return stream
        if not isinstance(stream, _Joined):
            return stream if found.shape == args[0].shape else None
        axis, *parts = stream
        start = 0
        for own, size in parts:
            if found.shape[axis] == size and found.ndim == args[0].ndim and _begins(name, args, axis) == start:
                return own
            start += size
        return None


def _begins(name: str, args: Any, axis: int) -> int | None:
    """Where a part begins along ``axis``, counted from the end; ``None`` where that is not clear."""
    ndim, total = args[0].ndim, args[0].shape[axis]
    if name == "narrow":
        return args[2] if args[1] % ndim == axis % ndim else None
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    if ... in index:
        place = index.index(...)
        index = (*index[:place], *(slice(None),) * (ndim - len(index) + 1), *index[place + 1 :])
    own = index[axis % ndim] if axis % ndim < len(index) else None
    return own.indices(total)[0] if isinstance(own, slice) and own.step in (None, 1) else None
