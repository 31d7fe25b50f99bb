"""Single attention sites: how near the operators come to what they have to compute and to move.

    python benchmarks/attention.py
    python benchmarks/attention.py --device cuda --compile

Per grid of tokens, with 8 heads of 40 channels (the shallowest level of SD1.5), keys and values reduced by 3 x 2, and
tiles of 32 x 32 with one global sample for two local keys:

    full                 attention over all keys
    keys                 attention over the keys that the reduction leaves, which are given
    keys, projected      their projections and the attention, from reduced tokens that are given
    reduced              reduction to averages, projections, attention; floor: keys, projected
    sample, average, max the reduction alone, to tokens that lie one after another
    copy                 a copy that moves as many bytes as `average` has to: the pace of the memory
    tiles                attention over tiles that are cut already, with their samples: the least it can cost
    near-sighted concat  cutting, joining, attention, pasting; floor: tiles
    near-sighted lse     two attentions, merged by their log-sum-exp; floor: tiles

GFLOP/s counts 4 operations per channel and pair of a query and its key, and 2 per weight and token of a projection.
GB/s counts what has to be read and written once. The time of the floor over that of the row would be 100 % if
nothing were lost.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from common import Table, in_mode, interleave, modes, parse, parser, publish
from torch import Tensor

from sloth_fx.operators import KeyLayout, Pooling, axis_strides, near_sighted_attention, reduce_tokens, tile_size

WINDOW = (3, 2)
SAMPLES_PER_TILE = 0.5
AVERAGE, MAXIMUM, SAMPLE = Pooling("avg", 1.0, 1.0), Pooling("max", 1.0, 1.0), Pooling()
attend = F.scaled_dot_product_attention


class Side(NamedTuple):
    call: Callable[..., object]
    tensors: tuple[Tensor, ...]
    flop: float = 0.0
    moved: float = 0.0  # bytes
    floor: str | None = None  # the side that is the least this one can cost


class Sites:
    """The sides at one grid of ``edge`` x ``edge`` tokens."""

    def __init__(self, edge: int, options: argparse.Namespace) -> None:
        self.options = options
        self.channels = options.heads * options.channels
        self.whole = KeyLayout((edge, edge))
        self.pooled = KeyLayout((edge, edge), window=WINDOW)
        tile = tile_size(edge, options.tile)
        samples = axis_strides((edge // tile) ** 2 / SAMPLES_PER_TILE, (edge, edge), "x")
        self.tiled = KeyLayout((edge, edge), tile=(tile, tile), samples=samples)
        self.tile_tokens = tile * tile

    def sides(self) -> dict[str, Side]:
        return {**self.reductions(), **self.near_sighted()}

    def reductions(self) -> dict[str, Side]:
        every, kept, batch = self.pooled.tokens, self.pooled.kv_tokens(), self.options.batch
        query, key, value = (self.split(self.random(batch, every)) for _ in range(3))
        tokens, few, few_k, few_v = (self.random(batch, count) for count in (every, kept, kept, kept))
        weights = tuple(self.random(1, self.channels)[0] * self.channels**-0.5 for _ in range(2))
        project = partial(self.project, weights)
        flop = self.flop(self.pooled) + 4.0 * batch * kept * self.channels**2
        moved = self.bytes(every + kept)
        return {
            "full": Side(attend, (query, key, value), self.flop(self.whole)),
            "keys": Side(attend, (query, self.split(few_k), self.split(few_v)), self.flop(self.pooled)),
            "keys, projected": Side(project, (query, few), flop),
            "reduced": Side(
                lambda q, x: project(q, self.reduce(AVERAGE, x)), (query, tokens), flop, 0, "keys, projected"
            ),
            "sample": Side(partial(self.reduce, SAMPLE), (tokens,), moved=self.bytes(2 * kept)),
            "average": Side(partial(self.reduce, AVERAGE), (tokens,), 0, moved, "copy"),
            "max": Side(partial(self.reduce, MAXIMUM), (tokens,), 0, moved, "copy"),
            "copy": Side(torch.clone, (self.random(batch, (every + kept) // 2),), moved=moved),
        }

    def near_sighted(self) -> dict[str, Side]:
        batch = self.options.batch
        rows = batch * self.tiled.tokens // self.tile_tokens
        tiles = [self.tile_tokens, self.tiled.kv_tokens(), self.tiled.kv_tokens()]
        inputs = tuple(self.split(self.random(batch, self.tiled.tokens)) for _ in range(3))

        def near(merge: str) -> Side:
            call = partial(near_sighted_attention, layout=self.tiled, gathered=False, merge=merge)
            return Side(call, inputs, self.flop(self.tiled), floor="tiles")

        return {
            "tiles": Side(attend, tuple(self.split(self.random(rows, n)) for n in tiles), self.flop(self.tiled)),
            "near-sighted concat": near("concat"),
            "near-sighted lse": near("lse"),
        }

    def reduce(self, pooling: Pooling, tokens: Tensor) -> Tensor:
        return reduce_tokens(tokens, self.pooled, pooling)[0].contiguous()

    def project(self, weights: tuple[Tensor, ...], queries: Tensor, tokens: Tensor) -> Tensor:
        key, value = (self.split(F.linear(tokens, weight)) for weight in weights)
        return attend(queries, key, value)

    def split(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.options.heads, -1)).transpose(1, 2)

    def random(self, batch: int, tokens: int) -> Tensor:
        return torch.randn(batch, tokens, self.channels, device=self.options.device).to(self.options.dtype)

    def flop(self, layout: KeyLayout) -> float:
        return 4.0 * self.options.batch * self.channels * layout.pairs()

    def bytes(self, tokens: int) -> float:
        return float(self.options.batch * tokens * self.channels * self.options.dtype.itemsize)


def arguments() -> argparse.Namespace:
    options = parser(__doc__, runs=25, sizes="edges of the grid, in tokens")
    options.add_argument("--heads", type=int, default=8)
    options.add_argument("--channels", type=int, default=40, help="of a head, default 40")
    options.add_argument("--tile", type=int, default=32, help="edge of a tile, in tokens; default 32")
    return parse(options, cpu={"sizes": [64, 128]}, gpu={"sizes": [64, 128, 256]})


def main() -> None:
    options = arguments()
    table = Table("tokens", "mode", "side", "ms (p20 to p80)", "of full", "GFLOP/s", "GB/s", "floor / this", "runs")
    for edge in [32] if options.tiny else options.sizes:
        sides = Sites(edge, options).sides()
        for mode in modes(options):
            torch.compiler.reset()
            calls = {name: partial(in_mode(side.call, mode), *side.tensors) for name, side in sides.items()}
            timing = interleave(calls, options, warmup=2, what=f"attention, {edge}x{edge} tokens, {mode}")
            for name, side in sides.items():
                seconds = timing.median(name)
                table.add(
                    *(f"{edge}x{edge}", mode, name, timing.ms(name), f"{timing.ratio(name, 'full').median:.3f}"),
                    f"{side.flop / seconds / 1e9:.0f}" if side.flop else "",
                    f"{side.moved / seconds / 1e9:.1f}" if side.moved else "",
                    f"{100 * timing.ratio(side.floor, name).median:.0f} % ({side.floor})" if side.floor else "",
                    str(timing.runs),
                )
    publish(options, "attention", table)


if __name__ == "__main__":
    main()
