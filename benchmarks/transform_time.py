"""What it takes to transform: seconds, and memory.

    python benchmarks/transform_time.py
    python benchmarks/transform_time.py --device cuda

Seconds: full-size UNets with their weights on `meta`, so no device and no dtype. "cold" is the first transform of a
process, for which torch and diffusers are imported and the model is there: importing sloth_fx counts. "warm" are the
others. Target: SDXL in at most 3 s.

Memory: SD1.5 with real weights on --device. "storage" is what tensors of the clone do not share with the original,
"process" how much more memory the process (on a GPU: torch's allocator) holds afterwards. Target: below 1 % of the
weights.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Spread, Table, interleave, parse, parser, publish, unet
from torch import nn

SPECS = ("SlothfulAttention", "NearSightedAttention")


def arguments() -> argparse.Namespace:
    options = parser(__doc__, runs=5)
    options.add_argument("--models", nargs="+", default=["sd15", "sdxl"], choices=["sd15", "sdxl"])
    options.add_argument("--child", help=argparse.SUPPRESS)
    return parse(options, cpu={}, gpu={})


def cold(model: nn.Module) -> dict[str, float]:
    """Seconds of the import and of the first transform in this process."""
    start = time.perf_counter()
    import sloth_fx

    imported = time.perf_counter()
    sloth_fx.transform(model, sloth_fx.SlothfulAttention())
    return {"import": imported - start, "transform": time.perf_counter() - imported}


def cold_in_child(name: str, options: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", name, "--device", "cpu", *(["--tiny"] if options.tiny else [])]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return found


def warm(models: dict[str, nn.Module]) -> dict[str, Callable[[], Any]]:
    import sloth_fx

    found: dict[str, Callable[[], Any]] = {}
    for name, model in models.items():
        found[f"{name} inspect"] = partial(sloth_fx.inspect, model)
        for spec in SPECS:
            found[f"{name} transform, {spec}"] = partial(sloth_fx.transform, model, getattr(sloth_fx, spec)())
    return found


def storages(model: nn.Module) -> dict[int, int]:
    """Bytes of every storage of a model, by address."""
    tensors = [*model.parameters(), *model.buffers()]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def held(device: torch.device) -> int | None:
    """Bytes that the process holds; None where the system does not tell."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS")), None)


def memory(options: argparse.Namespace) -> Table:
    import sloth_fx

    model = unet("sd15", device=options.device, dtype=options.dtype, tiny=options.tiny)
    weights = sum(storages(model).values())
    keep = [sloth_fx.transform(model, sloth_fx.SlothfulAttention())]  # what the first one imports and caches stays out
    before = held(options.device)
    keep.append(sloth_fx.transform(model, sloth_fx.SlothfulAttention()))
    after = held(options.device)
    own = sum(size for address, size in storages(keep[-1]).items() if address not in storages(model))
    table = Table("memory of a clone, sd15", "MB", "of the weights")
    table.add("weights", f"{weights / 1e6:.0f}", "")
    table.add("storage of its own", f"{own / 1e6:.2f}", f"{100 * own / weights:.2f} %")
    if before is not None and after is not None:
        table.add("process", f"{(after - before) / 1e6:.2f}", f"{100 * (after - before) / weights:.2f} %")
    return table


def main() -> None:
    options = arguments()
    if options.child:
        model = unet(options.child, device="meta", dtype=torch.float32, tiny=options.tiny)
        print(json.dumps(cold(model)))
        return
    table = Table("model", "what", "seconds (p20 to p80)", "runs")
    first: dict[str, list[dict[str, float]]] = {name: [] for name in options.models}
    for _ in range(min(options.runs, 3)):
        for name in options.models:
            first[name].append(cold_in_child(name, options))
    models = {name: unet(name, device="meta", dtype=torch.float32, tiny=options.tiny) for name in options.models}
    timing = interleave(warm(models), options, what="transform")
    for name in options.models:
        laps = first[name]
        table.add(name, "cold: import sloth_fx", f"{Spread.of(lap['import'] for lap in laps):.2f}", str(len(laps)))
        table.add(name, "cold: transform", f"{Spread.of(lap['transform'] for lap in laps):.2f}", str(len(laps)))
        table.add(name, "cold: both", f"{Spread.of(sum(lap.values()) for lap in laps):.2f}", str(len(laps)))
        for side, seconds in timing.seconds.items():
            if side.startswith(name):
                what = f"warm: {side.removeprefix(name).strip()}"
                table.add(name, what, f"{Spread.of(seconds):.2f}", str(timing.runs))
    publish(options, "transform_time", table, memory(options))


if __name__ == "__main__":
    main()
