"""Patches of other node packs: which of them an operator works with, and which not."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from sloth_fx.errors import SlothError

_COMPILED = "torch.compile"  # the key under which ComfyUI wraps a compiled model
_IN_UNET = re.compile(
    r"(?P<stage>input|middle|output)_blocks?(?:(?<=s)\.(?P<block>\d+))?\.\d+"
    r"\.transformer_blocks\.(?P<index>\d+)\.(?P<attention>attn[12])"
)
Options = Mapping[str, Any]


def check_not_compiled(patcher: Any) -> None:
    """Raise :class:`SlothError` for a patcher that runs a compiled model in the place of whichever it has."""
    wrappers = getattr(patcher, "wrappers", {}).get("apply_model", {})
    if wrappers.get(_COMPILED):
        raise SlothError("this model is compiled already: put TorchCompileModel after the nodes of Sloth FX")


def check_object_patches(patcher: Any) -> None:
    """Raise :class:`SlothError` for a patcher that exchanges modules within its model, too: ComfyUI puts such modules
    back into whichever model is there then."""
    inner = [name for name in patcher.object_patches if name.startswith("diffusion_model.")]
    if inner:
        raise SlothError(
            f"another node has exchanged {', '.join(inner):.200} of this model: Sloth FX would exchange the same "
            "module; leave one of them out"
        )


def check_before_loading(executor: Callable[..., Any], patcher: Any, *args: Any, **kwargs: Any) -> Any:
    """A wrapper for ComfyUI's ``prepare_sampling``: what later nodes have done is known then, and nothing is loaded."""
    check_object_patches(patcher)
    return executor(patcher, *args, **kwargs)


def replaced(options: Options, name: str) -> dict[Any, Any]:
    """What the patches that ``options`` hold replace of all blocks, ``name`` being that of an attention or a block."""
    found: dict[Any, Any] = (options.get("patches_replace") or {}).get(name) or {}
    return found


def check_patches(options: Options, acted: Collection[str]) -> None:
    """Raise :class:`SlothError` for patches in ``options`` that act where operators do: at the paths ``acted``.

    In a UNet the patches of attention act around its module, or replace it at some blocks. In other models they
    would act within what has been rewritten.
    """
    patches = options.get("patches") or {}
    blocks = {block for path in acted for block in _blocks(path)}
    named = bool(blocks) or not acted
    for attention in ("attn1", "attn2"):
        there = replaced(options, attention)
        for block, function in there.items():
            if not named or (attention, *_as_tuple(block)) in blocks:
                raise SlothError(
                    f"{describe(function)} replaces {attention} at block {block}, and so does Sloth FX: leave one of "
                    "them out, or give the nodes of Sloth FX other layers with where"
                )
        inside = [
            each for name in (f"{attention}_patch", f"{attention}_output_patch") for each in patches.get(name, ())
        ]
        if inside and not named:
            raise SlothError(
                f"{describe(inside[0])} patches {attention} of this model, where Sloth FX works: leave one out"
            )


def _blocks(path: str) -> list[tuple[Any, ...]]:
    """(attention, block) as patches of a UNet have it, for a whole block and for one of its transformers."""
    found = _IN_UNET.fullmatch(path)
    if found is None:
        return []
    block = (found["stage"], int(found["block"] or 0))
    return [(found["attention"], *block), (found["attention"], *block, int(found["index"]))]


def _as_tuple(block: Any) -> tuple[Any, ...]:
    return tuple(block) if isinstance(block, (tuple, list)) else (block,)


def guarded(options: Options, kinds: Iterable[str]) -> dict[str, Any]:
    """``options`` with patches of self-attention that raise :class:`SlothError` if they change the number of tokens."""
    patches = options.get("patches") or {}
    if "self" not in kinds or not patches.get("attn1_patch"):
        return dict(options)
    return {**options, "patches": {**patches, "attn1_patch": [_guarded(each) for each in patches["attn1_patch"]]}}


def _guarded(patch: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(patch, updated=())
    def same_tokens(query: Tensor, key: Tensor, value: Tensor, extra: Any) -> Any:
        tokens = query.shape[1]
        result = patch(query, key, value, extra)
        now = [each.shape[1] for each in result]
        if now != [tokens] * 3:
            raise SlothError(
                f"{describe(patch)} changes the tokens of attn1 at block {extra.get('block')} from {tokens} to {now} "
                "(of queries, keys and values), and Sloth FX works on all of them: leave one of the nodes out"
            )
        return result

    return same_tokens


def check_modules(model: nn.Module, expected: Mapping[str, tuple[nn.Module, Any]]) -> None:
    """Raise :class:`SlothError` where the owner of an attention is no longer the one that was rewritten."""
    for path, (owner, function) in expected.items():
        now = model
        for name in path.split(".") if path else ():
            now = getattr(now, "_modules", {}).get(name)  # type: ignore[assignment]
        if now is not owner or function_of(owner) is not function:
            raise SlothError(
                f"another node has exchanged {path} of this model after Sloth FX had rewritten it (to compile some of "
                "its blocks, perhaps): leave that node out, or use TorchCompileModel, which compiles the whole model"
            )


def function_of(owner: nn.Module) -> Any:
    """What a module runs in the place of the forward of its class; ``None`` if it runs that."""
    return getattr(owner.__dict__.get("forward"), "__func__", None)


def describe(function: Any) -> str:
    """A patch, by the module that it comes from: usually the name of a node pack."""
    kind = function if hasattr(function, "__qualname__") else type(function)
    return f"the patch {kind.__qualname__} of {kind.__module__}"
