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
the share of the pairs of query and key that is left in all self-attentions. "peak MB" is what torch's allocator has
given out at most during a call, besides weights and inputs. "difference" is that from the result of the same operator
by sloth_fx; merging is seeded differently. "pays" says yes or no only where the 20th and the 80th percentile of the
ratio agree. Sides that a model has no place for are listed apart, with the reason.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from common import (
    FEWEST_RUNS,
    Spread,
    Table,
    difference,
    in_mode,
    interleave,
    modes,
    parse,
    parser,
    publish,
    sharing_copy,
    warmups,
)
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
from peer_measures import Keys, count_keys, peak_memory
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
    options.add_argument("--quick", action="store_true", help="tiny models, one size, few runs: whether it all works")
    parsed = parse(
        options,
        cpu={"models": ["sd15", "pixart"], "sizes": [512, 768], "layers": 4},
        gpu={"models": list(MODELS), "sizes": [512, 1024], "layers": 0},
    )
    if parsed.quick:
        parsed.tiny, parsed.runs, parsed.sizes, parsed.layers = True, FEWEST_RUNS, parsed.sizes[:1], 2
    return parsed


def verdict(ratio: Spread, pairs: float) -> str:
    if pairs == 1:
        return "does nothing here"
    if ratio.high < 1:
        return f"yes, {100 * (1 - ratio.median):.0f} % less time"
    if ratio.low > 1:
        return f"no, {100 * (ratio.median - 1):.0f} % more time"
    return "no measurable difference"


def measure(case: Case, mode: str, options: argparse.Namespace, table: Table, absent: Table) -> None:
    torch.compiler.reset()
    models, missing = case.sides(options.operators, mode)
    counts: dict[tuple[str, str], Keys] = {}
    for key, model in models.items():  # before they are compiled
        counts[key] = count_keys(model, partial(call, model, case.example), case.sites, options.batch)
    runs = {key: partial(call, compiled(model, mode), case.example) for key, model in models.items()}
    timing = interleave(
        {name(key): run for key, run in runs.items()},
        options,
        warmup=warmups(options, mode),
        what=f"peers, {case.name}, {case.size} pixels, {mode}",
    )
    unpatched = ("", UNPATCHED)
    for key in [unpatched, *((operator, by) for operator in options.operators for by in OPERATORS[operator])]:
        cells = [str(case.size), mode, *key]
        if key in missing:
            absent.add(*cells, missing[key])
            continue
        pairs = counts[key].pairs / counts[unpatched].pairs
        ratio = timing.ratio(name(key), name(unpatched))
        other, ours = key != unpatched, (key[0], "sloth_fx")
        table.add(
            *(*cells, f"{counts[key].keys:.0f}", f"{100 * pairs:.0f} %", timing.ms(name(key))),
            *(f"{ratio:.3f}" if other else "", f"{peak_memory(runs[key], options.device) / 1e6:.0f}"),
            difference(timing.results[name(key)], timing.results[name(ours)]) if ours in runs and ours != key else "",
            *(verdict(ratio, pairs) if other else "", str(timing.runs)),
        )


def compiled(model: Any, mode: str) -> Callable[..., Any]:
    """As :func:`common.in_mode`; diffusers has not said what the repeated blocks of PixArt are."""
    if mode == "compiled blocks" and not model._repeated_blocks:
        for block in model.transformer_blocks:
            block.compile(dynamic=False)
        return model
    return in_mode(model, mode)


def name(key: tuple[str, str]) -> str:
    return " by ".join(key)


def main() -> None:
    options = arguments()
    for each in options.models:
        table = Table(
            *("pixels", "mode", "operator", "by", "key tokens", "pairs", "ms (p20 to p80)", "times unpatched"),
            *("peak MB", "difference", "pays", "runs"),
        )
        absent = Table("pixels", "mode", "operator", "by", "not there, because")
        for size in options.sizes:
            model = denoiser(each, size, options)
            case = Case(each, size, model, arguments_for(each, model, size, options))
            for mode in modes(options):
                measure(case, mode, options, table, absent)
        publish(options, f"peers {each}", table, *([absent] if len(absent.rows) > 1 else []))


if __name__ == "__main__":
    main()
