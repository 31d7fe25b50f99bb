"""What peers.py measures besides time: how many keys the queries see, and the peak of memory."""

from __future__ import annotations

import gc
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from sloth_fx.report import SiteReport


class Keys(NamedTuple):
    """``keys``: how many a query sees at the shallowest level, text included. ``pairs``: of queries and keys, summed
    over all self-attentions and heads."""

    keys: float
    pairs: int


class Counter(TorchDispatchMode):
    """Counts pairs of queries and keys in the fused attention kernels, while one of the modules ``paths`` runs."""

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        super().__init__()
        self.path: str | None = None
        self.queries = dict.fromkeys(paths, 0)
        self.pairs = dict.fromkeys(paths, 0)
        self.handles = []
        for path in paths:
            module = model.get_submodule(path)
            self.handles.append(module.register_forward_pre_hook(lambda *_, path=path: self._enter(path)))
            self.handles.append(module.register_forward_hook(lambda *_: self._enter(None)))

    def _enter(self, path: str | None) -> None:
        self.path = path

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.path is not None and func.__name__.startswith("_scaled_dot_product"):
            query, key = args[:2]
            self.queries[self.path] += math.prod(query.shape[:3])
            self.pairs[self.path] += math.prod(query.shape[:3]) * key.shape[2]
        return func(*args, **(kwargs or {}))


def count_keys(model: nn.Module, run: Callable[[], Any], sites: Sequence[SiteReport], batch: int) -> Keys:
    """Run ``model`` once, by ``run``, without computing anything, and count."""
    counter = Counter(model, [site.path for site in sites])
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), counter:
            run()
    finally:
        for handle in counter.handles:
            handle.remove()
    shallowest = min(sites, key=lambda site: site.depth)
    # Two attentions whose results are merged see the same queries twice, and merged tokens are fewer queries.
    queries = min(counter.queries[shallowest.path], batch * shallowest.heads * shallowest.q_tokens)
    return Keys(counter.pairs[shallowest.path] / max(queries, 1), sum(counter.pairs.values()))


def peak_memory(run: Callable[[], Any], device: torch.device) -> int:
    """How many bytes of torch's allocator one call needs at its peak, besides what was there before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [event for event in events if event["name"] == "[memory]"]
    changes.sort(key=lambda event: event["ts"])
    return max(accumulate((event["args"]["Bytes"] for event in changes), initial=0))
