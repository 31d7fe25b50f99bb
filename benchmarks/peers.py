"""Every operator against its peers in one denoiser call: whether it pays.

    python benchmarks/peers.py
    python benchmarks/peers.py --models sd15 --sizes 512 768 --operators merging tiles
    python benchmarks/peers.py --device cuda --compile
    python benchmarks/peers.py --quick                          # tiny models: whether it all works

Sides, all over the same weights and in one interleaved run:
    unpatched   the model as it is
    sloth_fx    sloth_fx.transform(model, spec), driven, at progress 0.4, where its schedule peaks
    tomesd      the package from PyPI, with its defaults
    ToDo, HyperTile   as published, in attention processors; swap_size is 1 on both sides, so that no tile changes
    naive       the formulas of the nodes in attention processors (naive.py)
    limit       self-attention over one key (and text, where it is joint): no reduction of keys can save more

All that counts levels acts on the shallowest attention level. "key tokens" is how many keys a query sees there, "pairs"
the share of the pairs of query and key that is left in all self-attentions. "peak MB" is what one call needs besides
weights and inputs: on a CPU measured in a process of its own, eager only. "pays" holds where both the 20th and the 80th
percentile of the ratio agree.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import FEWEST_RUNS, Spread, Table, in_mode, interleave, modes, parse, parser, publish, sharing_copy, warmups
from naive import Node
from peer_algorithms import (
    NotApplicableError,
    OneKey,
    ToDo,
    grid_of,
    hyper_tiled,
    naive,
    tomesd_merged,
    with_algorithm,
)
from peer_measures import Keys, count_keys, peak_in_child, peak_of_process, peak_on_gpu
from peer_models import MODELS, arguments_for, call, denoiser
from torch import nn

import sloth_fx
from sloth_fx.report import SiteReport
from sloth_fx.spec import (
    HyperTile,
    NearSightedAttention,
    NearSightedTile,
    SlothfulAttention,
    Spec,
    TokenDownsample,
    TokenMerging,
)

PROGRESS = 0.4
UNPATCHED = "unpatched"
OPERATORS = {
    "pooling": ("sloth_fx", "naive"),
    "downsampling": ("sloth_fx", "ToDo"),
    "tiles": ("sloth_fx", "HyperTile"),
    "tiles and samples": ("sloth_fx", "naive"),
    "pooled tiles and samples": ("sloth_fx", "naive"),
    "merging": ("sloth_fx", "tomesd"),
    "one key": ("limit",),
}
NODES: dict[str, dict[str, Any]] = {
    "pooling": {},
    "tiles and samples": {"slothful": (0.0, 0.0), "tile": (32, 32), "global_ratio": (0.5, 0.5)},
    "pooled tiles and samples": {"tile": (24, 32), "global_ratio": (0.2, 0.8)},
}


@dataclass
class Case:
    """A model, pictures of a size, and its self-attentions."""

    name: str
    size: int
    model: nn.Module
    example: dict[str, Any]
    sites: Sequence[SiteReport] = field(init=False)

    def __post_init__(self) -> None:
        found = sloth_fx.inspect(self.model, example_inputs=self.example)
        self.sites = [site for site in found if site.kind in ("self", "joint")]

    @property
    def latent(self) -> tuple[int, int]:
        rows, columns = next(iter(self.example.values())).shape[-2:]
        return rows, columns

    @property
    def factor(self) -> int:
        """The published factor for downsampling, but at least 2."""
        shallowest = min(self.sites, key=lambda site: site.depth)
        per_token = self.size // grid_of(shallowest, self.latent)[0]
        return max(2, TokenDownsample.at_resolution(self.size, pixels_per_token=per_token).factor(0))

    def spec(self, operator: str) -> Spec:
        specs: dict[str, Callable[[], Spec]] = {
            "pooling": SlothfulAttention.from_node,
            "downsampling": lambda: TokenDownsample(factors=(self.factor,)),
            "tiles": lambda: HyperTile(swap_size=1),
            "tiles and samples": NearSightedTile.from_node,
            "pooled tiles and samples": NearSightedAttention.from_node,
            "merging": TokenMerging,
        }
        return specs[operator]()

    def side(self, operator: str, by: str, mode: str) -> nn.Module:
        """A model over the same weights. Raises for what one of them cannot do."""
        if by == "sloth_fx":
            patched = sloth_fx.transform(self.model, self.spec(operator), example_inputs=self.example)
            sloth_fx.context(patched).at(PROGRESS)
            return patched
        copy = sharing_copy(self.model)
        if by == "ToDo":
            return with_algorithm(copy, self.sites, lambda site: ToDo(grid_of(site, self.latent), self.factor))
        if by == "HyperTile":
            return hyper_tiled(copy, self.sites, self.latent)
        if by == "tomesd":
            return tomesd_merged(copy, self.sites, self.latent, mode)
        if by == "limit":
            return with_algorithm(copy, self.sites, lambda site: OneKey(), shallowest=False)
        if by == "naive":
            shallowest = min(self.sites, key=lambda site: site.depth)
            channels = shallowest.heads * shallowest.head_dim
            return naive(copy, self.sites, Node(self.latent, channels, PROGRESS, **NODES[operator]))
        return copy

    def sides(self, chosen: Sequence[str], mode: str) -> tuple[dict[tuple[str, str], nn.Module], dict[Any, str]]:
        """The sides by operator and author, and why others are missing."""
        found, missing = {("", UNPATCHED): self.side("", UNPATCHED, mode)}, {}
        for operator in chosen:
            for by in OPERATORS[operator]:
                try:
                    found[operator, by] = self.side(operator, by, mode)
                except (NotApplicableError, sloth_fx.SlothError) as error:
                    missing[operator, by] = str(error)
        return found, missing


def arguments() -> argparse.Namespace:
    options = parser(__doc__, runs=9)
    options.add_argument("--models", nargs="+", choices=MODELS, help="sd15 and pixart on a CPU, else all")
    options.add_argument("--operators", nargs="+", choices=tuple(OPERATORS), default=tuple(OPERATORS), metavar="NAME")
    options.add_argument("--layers", type=int, metavar="N", help="of transformers; 4 on a CPU, else (0) all")
    options.add_argument("--no-memory", action="store_true", help="leave the peak of memory out, which takes a while")
    options.add_argument("--quick", action="store_true", help="tiny models, one size, few runs: whether it all works")
    options.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    parsed = parse(
        options,
        cpu={"models": ["sd15", "pixart"], "sizes": [512, 768], "layers": 4},
        gpu={"models": list(MODELS), "sizes": [512, 1024], "layers": 0},
    )
    if parsed.quick:
        parsed.tiny, parsed.runs, parsed.sizes, parsed.layers = True, FEWEST_RUNS, parsed.sizes[:1], 2
    return parsed


def child(options: argparse.Namespace) -> None:
    """Print the peak of one call. Weights that nobody wrote take no memory, and their values do not matter."""
    name, size, operator, by = options.child
    model = denoiser(name, int(size), options, "meta").to_empty(device=options.device)
    case = Case(name, int(size), model, arguments_for(name, model, int(size), options))
    small = arguments_for(name, model, 64, options)
    call(model, small)  # what the first call of all loads is nobody's
    side = case.side(operator, by, "eager")
    print(json.dumps(peak_of_process(partial(call, side, case.example))))


def peak(options: argparse.Namespace, case: Case, key: tuple[str, str], run: Callable[[], Any], mode: str) -> str:
    if options.no_memory:
        return ""
    if options.device.type == "cuda":
        found: float | None = peak_on_gpu(run, options.device)
    elif mode == "eager":
        same = ["--device", "cpu", "--dtype", str(options.dtype).removeprefix("torch."), "--batch", str(options.batch)]
        same += ["--layers", str(options.layers), *(["--tiny"] if options.tiny else [])]
        found = peak_in_child(str(Path(__file__)), *same, "--child", case.name, str(case.size), *key)
    else:
        found = None
    return "" if found is None else f"{found / 1e6:.0f}"


def verdict(ratio: Spread, pairs: float) -> str:
    if pairs == 1:
        return "does nothing here"
    if ratio.high < 1:
        return f"yes, {100 * (1 - ratio.median):.0f} % less time"
    if ratio.low > 1:
        return f"no, {100 * (ratio.median - 1):.0f} % more time"
    return "no measurable difference"


def measure(case: Case, mode: str, options: argparse.Namespace, table: Table) -> None:
    torch.compiler.reset()
    models, missing = case.sides(options.operators, mode)
    counts: dict[tuple[str, str], Keys] = {}
    for key, model in models.items():  # before they are compiled
        counts[key] = count_keys(model, partial(call, model, case.example), case.sites, options.batch)
    runs = {key: partial(call, in_mode(model, mode), case.example) for key, model in models.items()}
    timing = interleave(
        {" by ".join(key): run for key, run in runs.items()},
        options,
        warmup=warmups(options, mode),
        what=f"peers, {case.name}, {case.size} pixels, {mode}",
    )
    base = " by ".join(("", UNPATCHED))
    whole = counts["", UNPATCHED]
    for key, run in runs.items():
        name = " by ".join(key)
        ratio, pairs = timing.ratio(name, base), counts[key].pairs / max(whole.pairs, 1)
        other = name != base
        table.add(
            *(case.name, str(case.size), mode, *key, f"{counts[key].keys:.0f}", f"{100 * pairs:.0f} %"),
            *(timing.ms(name), f"{ratio:.3f}" if other else "", peak(options, case, key, run, mode)),
            *(verdict(ratio, pairs) if other else "", str(timing.runs)),
        )
    for key, reason in missing.items():
        table.add(case.name, str(case.size), mode, *key, "", "", "", "", "", f"not there: {reason}", "")


def main() -> None:
    options = arguments()
    if options.child:
        child(options)
        return
    table = Table(
        *("model", "pixels", "mode", "operator", "by", "key tokens", "pairs", "ms (p20 to p80)"),
        *("times unpatched", "peak MB", "pays", "runs"),
    )
    for name in options.models:
        for size in options.sizes:
            model = denoiser(name, size, options)
            call(model, arguments_for(name, model, 64, options))  # the first call of all takes longer than any other
            case = Case(name, size, model, arguments_for(name, model, size, options))
            for mode in modes(options):
                measure(case, mode, options, table)
    publish(options, "peers", table)


if __name__ == "__main__":
    main()
