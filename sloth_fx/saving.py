"""A patched model in one file: its weights, and the specs that patched it.

The file is an ordinary safetensors file with the keys of the original model, so that anything that reads weights reads
it. What else there is to know lies in its metadata, as JSON: nothing is pickled, and nothing that is read is executed.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sloth_fx.checks import FLAG, require
from sloth_fx.errors import SlothError
from sloth_fx.patch import patch_of
from sloth_fx.serialize import load_spec
from sloth_fx.spec import Spec
from sloth_fx.transform import check_module, check_untouched, transform

METADATA = "sloth_fx"
VERSION = 1
"""Version of the JSON under that key; the specs in it have their own."""

_NAMED = 3  # how many keys an error names


def save(patched: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the weights of ``patched`` and the specs that it was transformed with to one safetensors file.

    The keys are those of the original model's ``state_dict``, also where the model or parts of it are compiled. Tied
    weights are written once for each of their keys. A transform that waits for its first call is written as well. Not
    in the file: non-persistent buffers, which a model makes anew, and the state of the context, which belongs to a run.

    Args:
        patched: what :func:`sloth_fx.transform` or :func:`sloth_fx.load` returned, with its weights in memory.
        path: the file, ``.safetensors`` by custom. One that exists is replaced, once the new one is complete.

    Raises:
        SlothError: for a model that is not patched, a spec without a JSON form (a function as ``where``, a schedule of
            your own), weights on ``meta``, quantised or otherwise no plain tensors, and a path that cannot be written.
    """
    patch = patch_of(patched)
    file = _file(path)
    if not file.parent.is_dir():
        raise SlothError(f"cannot write {str(file)!r}: there is no folder {str(file.parent)!r}")
    try:
        specs = [spec.to_dict() for spec in patch.specs]
    except SlothError as error:
        raise SlothError(
            f"cannot save this {patch.report.model} with its specs: {error}. Without them, "
            "safetensors.torch.save_file(patched.state_dict(), path) writes its weights"
        ) from None
    about = {
        "version": VERSION,
        "model": patch.report.model,
        "specs": specs,
        "strict": patch.strict,
        "phases": patch.phases,
    }
    _write(file, _weights(patched), {"format": "pt", METADATA: json.dumps(about)})


def load(model: nn.Module, path: str | os.PathLike[str], *, example_inputs: Any = None) -> nn.Module:
    """Load a file of :func:`save` into ``model``, and transform it with the specs of that file.

    Args:
        model: an unpatched model of the same architecture, dtypes and ties. Its weights are replaced in place, and
            what is returned shares them, as after a transform; otherwise it is not changed.
        path: the file.
        example_inputs: as in :func:`sloth_fx.transform`.

    Returns:
        The patched model, on the devices of ``model``.

    Raises:
        SlothError: for a file that is missing, damaged, of a newer version or not written by :func:`save`; for keys,
            shapes or dtypes that are not those of ``model``; for a ``model`` that is patched, compiled or on ``meta``;
            and where the transform fails. The model is then as it was: its weights are replaced last.
    """
    check_module(model)
    check_untouched(model)
    file = _file(path)
    contents = _read(file)
    _check_same(model, contents, f"{str(file)!r} does not fit this {type(model).__name__}")
    patched = transform(
        model, contents.specs, example_inputs=example_inputs, strict=contents.strict, phases=contents.phases
    )
    try:
        model.load_state_dict(contents.weights)  # in place, hence in the patched model too
    except RuntimeError as error:
        raise SlothError(f"{type(model).__name__} refuses the weights of {str(file)!r}: {error}") from error
    return patched


class _Contents(NamedTuple):
    """What a file holds; the weights stay on disk until they are copied."""

    weights: dict[str, Tensor]
    model: str
    specs: list[Spec]
    strict: bool
    phases: int | None


def _file(path: Any) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise SlothError(f"{path!r:.80} is not a path")
    file = Path(path)
    if file.is_dir():
        raise SlothError(f"{str(file)!r} is a folder: name a file, such as {str(file / 'model.safetensors')!r}")
    return file


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """The state of ``model`` as tensors that share nothing and have no gaps: safetensors takes no others."""
    weights: dict[str, Tensor] = {}
    storages: set[int] = set()
    for key, tensor in model.state_dict().items():
        _check_plain(key, tensor)
        storage = tensor.untyped_storage().data_ptr()
        if storage in storages or not tensor.is_contiguous():
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        storages.add(storage)
        weights[key.replace("_orig_mod.", "")] = tensor  # torch.compile's name for the module that it wraps
    return weights


def _check_plain(key: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise SlothError(f"{key} is a {type(tensor).__name__} and no tensor: a safetensors file cannot hold it")
    if tensor.is_meta:
        raise SlothError(f"{key} is on meta, without data: make the model on a device, or undo its offloading")
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
        kind = type(tensor).__name__ if tensor.layout is torch.strided else tensor.layout
        raise SlothError(f"{key} is a {kind} and no plain tensor: save and load first, then quantise or shard")


def _write(file: Path, weights: dict[str, Tensor], metadata: dict[str, str]) -> None:
    draft = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        save_file(weights, draft, metadata)
        draft.replace(file)
    except (SafetensorError, OSError, ValueError, RuntimeError, LookupError, TypeError) as error:
        raise SlothError(f"cannot write {str(file)!r}: {type(error).__name__}: {error}") from error
    finally:
        draft.unlink(missing_ok=True)


def _read(file: Path) -> _Contents:
    try:
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata() or {}
            weights = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 - it is no dict
    except OSError as error:
        raise SlothError(f"cannot read {str(file)!r}: {error}") from None
    except SafetensorError as error:
        raise SlothError(f"{str(file)!r} is no safetensors file, or not the whole of one: {error}") from None
    if METADATA not in metadata:
        raise SlothError(
            f"{str(file)!r} holds weights and no spec, so sloth_fx.save did not write it: load the weights with "
            "model.load_state_dict(safetensors.torch.load_file(path)), then call sloth_fx.transform(model, spec)"
        )
    try:
        return _Contents(weights, *_parsed(metadata[METADATA]))
    except SlothError as error:
        raise SlothError(f"{str(file)!r}: {error}") from None


def _parsed(text: str) -> tuple[str, list[Spec], bool, int | None]:
    try:
        about = json.loads(text)
        version = about["version"]
        if isinstance(version, int) and version > VERSION:
            raise SlothError(f"it is of version {version}, newer than what this sloth_fx reads, {VERSION}")
        model, specs, strict, phases = (about[key] for key in ("model", "specs", "strict", "phases"))
    except (RecursionError, LookupError, TypeError, json.JSONDecodeError) as error:
        raise SlothError(f"what its metadata says under {METADATA} is damaged: {error!r:.80}") from None
    require("strict", strict, FLAG)
    loaded = load_spec(specs)
    return str(model), loaded if isinstance(loaded, list) else [loaded], strict, phases


def _check_same(model: nn.Module, contents: _Contents, title: str) -> None:
    """Raise :class:`SlothError` unless every key of the model is in the file, and like it, and no other."""
    own: dict[str, Any] = model.state_dict()
    for key, tensor in own.items():
        _check_plain(key, tensor)
    weights = contents.weights
    missing, foreign = ([key for key in one if key not in other] for one, other in ((own, weights), (weights, own)))
    if missing or foreign:
        words = [f"{len(foreign)} keys only it has: {_nearest(foreign, own)}"] if foreign else []
        words += [f"{len(missing)} keys only the model has: {_nearest(missing, weights)}"] if missing else []
        raise SlothError(f"{title}: {'; '.join(words)} (it was saved from a {contents.model})")
    _check_like(own, weights, title, "shape", lambda tensor: tuple(tensor.shape))
    _check_like(own, weights, title, "dtype", lambda tensor: tensor.dtype)
    _check_ties(own, weights, title)


def _nearest(keys: list[str], others: Iterable[str]) -> str:
    """The first few keys, each with the most similar one of the others."""
    names = list(others)
    near = [(key, difflib.get_close_matches(key, names, n=1)) for key in keys[:_NAMED]]
    words = [f"{key} (nearest: {found[0]})" if found else key for key, found in near]
    return ", ".join(words) + (", ..." if len(keys) > _NAMED else "")


def _check_like(
    own: Mapping[str, Tensor], weights: Mapping[str, Tensor], title: str, what: str, of: Callable[[Tensor], Any]
) -> None:
    unlike = [key for key in own if of(own[key]) != of(weights[key])]
    if unlike:
        named = ", ".join(f"{key}: {of(weights[key])} there, {of(own[key])} here" for key in unlike[:_NAMED])
        hint = ": cast the model first, with model.to(dtype)" if what == "dtype" else ""
        raise SlothError(f"{title}: {len(unlike)} weights of another {what} ({named}){hint}")


def _check_ties(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], title: str) -> None:
    """Keys of one tensor would get the value of the last of them, whatever the others are."""
    first: dict[Any, str] = {}
    for key, tensor in own.items():
        other = first.setdefault((tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()), key)
        if other != key and not torch.equal(_bits(weights[other]), _bits(weights[key])):
            raise SlothError(f"{title}: {other} and {key} are one tensor in the model, and differ in the file")


def _bits(tensor: Tensor) -> Tensor:
    return tensor.flatten().view(torch.uint8)
