"""A patched model that is made of the modules of the original, but for those that have to differ."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn


def rewritten_modules(patched: nn.Module, original: nn.Module) -> frozenset[str]:
    """The paths of the modules of ``original`` that run something else in ``patched``: those that got operators."""
    there = {path for path, _ in original.named_modules(remove_duplicate=False)}
    return frozenset(
        above
        for path, _ in patched.named_modules(remove_duplicate=False)
        if path not in there and (above := path.rpartition(".")[0]) in there
    )


def share_modules(patched: nn.Module, original: nn.Module, rewritten: Collection[str]) -> None:
    """Let ``patched`` consist of modules of ``original``, except for those at ``rewritten`` and above.

    ComfyUI keeps its state in modules: it exchanges parameters for those with a LoRA, moves some weights and lets
    others be cast when they are used, and does so by the name that a module has in whichever model is loaded. With the
    same modules in both models all of it holds in both. Where modules differ, their parameters are in one dictionary.
    """
    kept = _ancestors(rewritten) | set(rewritten)
    for path in sorted(kept):
        mine, theirs = patched.get_submodule(path), original.get_submodule(path)
        mine._parameters, mine._buffers = theirs._parameters, theirs._buffers
        for name, module in theirs._modules.items():
            if f"{path}.{name}".lstrip(".") not in kept:
                mine._modules[name] = module


def _ancestors(paths: Collection[str]) -> set[str]:
    """Of each path all that begin it, the empty one included."""
    split = [path.split(".") for path in paths]
    return {"", *(".".join(parts[:count]) for parts in split for count in range(1, len(parts)))}
