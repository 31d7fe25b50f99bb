"""Near-sighted attention: one softmax over copied keys ("concat") against two merged by log-sum-exp ("lse").

    python benchmarks/lse_merge.py                                       # CPU, float32
    python benchmarks/lse_merge.py --device cuda --dtype bfloat16 --compile

Variants take turns, so that drift of the machine falls on all alike. Per variant: median and 20th and 80th percentile
of the time in milliseconds, time relative to concat, the largest difference from concat in float32.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sloth_fx.operators import KeyLayout, near_sighted_attention, tile_size


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--size", type=int, default=40, help="channels of a head")
    parser.add_argument("--grids", nargs="+", default=["64x64", "128x128"], metavar="ROWSxCOLUMNS")
    parser.add_argument("--tile", type=int, default=32)
    parser.add_argument("--samples", type=int, nargs=2, default=(2, 4), help="stride (rows, columns)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--full", action="store_true", help="also the attention over all tokens")
    return parser.parse_args()


def variants(layout: KeyLayout, options: argparse.Namespace) -> dict[str, Callable[..., Tensor]]:
    def near(merge: str) -> Callable[..., Tensor]:
        def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return near_sighted_attention(query, key, value, layout, gathered=False, merge=merge)

        return attention

    found = {"concat": near("concat"), "lse": near("lse")}
    if options.full:
        found["full"] = lambda query, key, value: F.scaled_dot_product_attention(query, key, value)
    if options.compile:
        found = {name: torch.compile(f, fullgraph=True, dynamic=False) for name, f in found.items()}
    return found


def measure(functions: dict[str, Callable[..., Tensor]], inputs: list[Tensor], rounds: int) -> dict[str, list[float]]:
    wait = torch.cuda.synchronize if inputs[0].is_cuda else lambda: None
    times: dict[str, list[float]] = {name: [] for name in functions}
    for lap in range(rounds + 2):
        for name, function in functions.items():
            wait()
            start = time.perf_counter()
            function(*inputs)
            wait()
            if lap >= 2:  # the first laps compile and allocate
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


@torch.no_grad()
def main() -> None:
    options = arguments()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(
        f"{chip}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}, Python {platform.python_version()}"
    )
    print(f"{vars(options)}\n")
    print("| grid | tiles | keys of a query | variant | median ms | p20 | p80 | of concat | difference |")
    print("|---|---|---|---|---|---|---|---|---|")
    for text in options.grids:
        rows, columns = (int(n) for n in text.split("x"))
        tile = tile_size(rows, options.tile), tile_size(columns, options.tile)
        layout = KeyLayout((rows, columns), tile=tile, samples=tuple(options.samples))
        torch.manual_seed(0)
        shape = options.batch, layout.tokens, options.heads, options.size
        inputs = [torch.randn(shape, device=device).to(dtype).transpose(1, 2) for _ in range(3)]
        exact = variants(layout, argparse.Namespace(full=False, compile=False))["concat"](*(x.float() for x in inputs))
        functions = variants(layout, options)
        times = measure(functions, inputs, options.rounds)
        base = statistics.median(times["concat"])
        tiles = sum(band.tiles * run.tiles for band, run in layout.groups())
        for name, spent in times.items():
            ordered, median = sorted(spent), statistics.median(spent)
            low, high = ordered[len(spent) // 5], ordered[len(spent) * 4 // 5]
            error = (functions[name](*inputs).float() - exact).abs().max().item()
            keys = layout.tokens if name == "full" else layout.kv_tokens()
            print(
                f"| {text} | {tiles} | {keys} | {name} | {median:.2f} | {low:.2f} | {high:.2f} "
                f"| {median / base:.2f} | {'' if name == 'full' else f'{error:.1e}'} |"
            )


if __name__ == "__main__":
    main()
