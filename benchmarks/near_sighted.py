"""Near-sighted Tile and Near-sighted Attention in one UNet call, with the defaults of their nodes.

    python benchmarks/near_sighted.py
    python benchmarks/near_sighted.py --device cuda --compile

Sides, all over the same weights:
    unpatched   the UNet as it is
    patched     sloth_fx.transform(unet, NearSightedTile.from_node() or NearSightedAttention.from_node()), driven
    naive       the same formula in an attention processor: the grid padded with zeros, which are attended to, and the
                global samples repeated for every tile, and projected there

Near-sighted Attention changes over the run: its reduction and its tiles are largest at progress 0.4. Where the tiles do
not divide the grid, patched and naive differ by the padding; "padded" says so. "pairs" is the share of the pairs of
query and key that are left, over all self-attentions.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from common import (
    Table,
    difference,
    in_mode,
    inputs,
    interleave,
    model_parser,
    modes,
    parse,
    publish,
    sharing_copy,
    slow,
    unet,
    warmups,
)
from naive import Naive, Node, first_channels, self_attentions, with_processors
from torch import nn

import sloth_fx

SPECS = {
    "Tile": sloth_fx.NearSightedTile.from_node(),
    "Attention": sloth_fx.NearSightedAttention.from_node(),
}
NODES: dict[str, dict[str, Any]] = {
    "Tile": {"slothful": (0.0, 0.0), "tile": (32, 32), "global_ratio": (0.5, 0.5)},
    "Attention": {"tile": (24, 32), "global_ratio": (0.2, 0.8)},
}


class Setting(NamedTuple):
    spec: str
    progress: float | None  # None: the same at every moment

    def __str__(self) -> str:
        return self.spec if self.progress is None else f"{self.spec} at {self.progress:g}"


def arguments() -> argparse.Namespace:
    options = model_parser(__doc__, runs=7)
    options.add_argument("--progress", type=float, nargs="+", default=[0.4, 0.8], help="of Attention; default 0.4 0.8")
    options.set_defaults(models=["sd15"])
    return parse(options, cpu={"sizes": [512, 1024]}, gpu={"sizes": [512, 1024, 2048]})


def settings(options: argparse.Namespace, size: int, mode: str) -> list[Setting]:
    if slow(options, size, mode):
        return [Setting("Attention", options.progress[0])]
    return [Setting("Tile", None), *(Setting("Attention", progress) for progress in options.progress)]


def sides_of(
    setting: Setting, model: nn.Module, patched: nn.Module, run: Callable[..., Any], example: dict[str, Any], mode: str
) -> dict[str, Callable[[], Any]]:
    moment, progress = sloth_fx.context(patched), setting.progress or 0.4

    def call_patched() -> Any:
        moment.at(progress)
        return run(**example)

    node = Node(latent=tuple(example["sample"].shape[-2:]), first_channels=first_channels(patched), progress=progress)
    for name, value in NODES[setting.spec].items():
        setattr(node, name, value)
    naive = in_mode(with_processors(sharing_copy(model), Naive, node), mode)
    return {f"patched {setting}": call_patched, f"naive {setting}": partial(naive, **example)}


def pairs(patched: nn.Module, setting: Setting, example: dict[str, Any]) -> tuple[float, bool]:
    """The share of the pairs of query and key that are left, and whether the naive way has to pad."""
    moment = sloth_fx.context(patched)
    moment.at(setting.progress or 0.4)
    layouts = moment.layouts()
    latent = tuple(example["sample"].shape[-2:])
    grids = [each.grid_at(latent) for each in self_attentions(patched)]
    full = sum((rows * columns) ** 2 for rows, columns in filter(None, grids))
    border = getattr(getattr(SPECS[setting.spec], "in_", None), "border", "keep")
    spared = sum(layout.tokens**2 - layout.pairs(border) for layout in layouts)
    axes = [axis for layout in layouts if layout.tile for axis in zip(layout.grid, layout.tile, strict=True)]
    return 1 - spared / full, any(length % part for length, part in axes)


def main() -> None:
    options = arguments()
    table = Table(
        *("model", "pixels", "mode", "spec", "pairs", "unpatched ms", "patched ms", "naive ms"),
        *("patched / unpatched", "naive / unpatched", "difference", "runs"),
    )
    for name in options.models:
        model = unet(name, device=options.device, dtype=options.dtype, tiny=options.tiny)
        model(**inputs(model, 64, options))  # the first call of all takes longer than any other
        for size in options.sizes:
            example = inputs(model, size, options)
            for mode in modes(options):
                torch.compiler.reset()
                patched = {
                    each: sloth_fx.transform(model, spec, example_inputs=example) for each, spec in SPECS.items()
                }
                runs = {each: in_mode(of, mode) for each, of in patched.items()}
                sides: dict[str, Callable[[], Any]] = {
                    "unpatched": partial(in_mode(sharing_copy(model), mode), **example)
                }
                chosen = settings(options, size, mode)
                for setting in chosen:
                    sides |= sides_of(setting, model, patched[setting.spec], runs[setting.spec], example, mode)
                timing = interleave(
                    sides, options, warmup=warmups(options, mode), what=f"near-sighted, {name}, {size} pixels, {mode}"
                )
                for setting in chosen:
                    ours, theirs = f"patched {setting}", f"naive {setting}"
                    left, padded = pairs(patched[setting.spec], setting, example)
                    table.add(
                        *(name, str(size), mode, str(setting), f"{100 * left:.0f} %"),
                        *(timing.ms(side) for side in ("unpatched", ours, theirs)),
                        f"{timing.ratio(ours, 'unpatched'):.3f}",
                        f"{timing.ratio(theirs, 'unpatched').median:.3f}",
                        difference(timing.results[ours], timing.results[theirs]) + (", padded" if padded else ""),
                        str(timing.runs),
                    )
    publish(options, "near_sighted", table)


if __name__ == "__main__":
    main()
