"""Model offloading: hooks that know each other's models, and have to learn of another one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def offload_paused(pipe: Any) -> Iterator[None]:
    """Take the hooks of ``enable_model_cpu_offload`` off, and put them back on whatever the pipeline has afterwards.

    Each hook names the model that it sends off the device before its own runs, so an exchanged model needs new ones
    (the pipeline itself renews them after every run). Nothing happens where there are none.
    """
    if not offloads(pipe):
        yield
        return
    pipe.remove_all_hooks()
    try:
        yield
    finally:
        pipe.enable_model_cpu_offload(device=pipe._offload_device)


def offloads(pipe: Any) -> bool:
    """Whether ``enable_model_cpu_offload`` is on."""
    return bool(getattr(pipe, "_all_hooks", None)) and hasattr(pipe, "_offload_device")
