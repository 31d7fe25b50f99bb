"""What it costs to be patched: a transform whose parameters do nothing, against the UNet as it is.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --device cuda --compile

Sides: the UNet; a plain copy of it over the same weights, which shows the noise of the measurement; and the patched
UNet, once with the moment told by the caller ("driven") and once reading each call's own timestep ("auto"). Small
pictures show the cost of a call most clearly, because it does not grow with the picture. Compiled, only
512 pixels are measured (--all: every size).

Target: at most 1.02 times the UNet, at 512 pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

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
    unet,
    warmups,
)
from torch import nn

import sloth_fx


def neutral() -> sloth_fx.SlothfulAttention:
    """A reduction by 1, at every self-attention."""
    none = sloth_fx.Reduction(rate=1.0)
    return sloth_fx.SlothfulAttention(in_=none, out=none, keep_middle=False)


def sides_of(model: nn.Module, example: dict[str, Any], mode: str) -> dict[str, Callable[[], Any]]:
    patched = sloth_fx.transform(model, neutral(), example_inputs=example)
    moment, run = sloth_fx.context(patched), in_mode(patched, mode)

    def driven() -> Any:
        moment.at(0.4)
        return run(**example)

    def auto() -> Any:
        moment.auto()
        return run(**example)

    return {
        "UNet": partial(in_mode(sharing_copy(model), mode), **example),
        "copy of it": partial(in_mode(sharing_copy(model), mode), **example),
        "patched, driven": driven,
        "patched, auto": auto,
    }


def main() -> None:
    options = parse(
        model_parser(__doc__, runs=15),
        cpu={"sizes": [128, 512]},
        gpu={"sizes": [128, 512, 1024]},
    )
    columns = ("model", "pixels", "mode", "side", "ms (p20 to p80)", "added ms", "times the UNet", "difference", "runs")
    table = Table(*columns)
    compiled = 512 if 512 in options.sizes else options.sizes[-1]
    for name in options.models:
        model = unet(name, device=options.device, dtype=options.dtype, tiny=options.tiny)
        model(**inputs(model, 64, options))  # the first call of all takes longer than any other
        for size in options.sizes:
            example = inputs(model, size, options)
            for mode in modes(options) if size == compiled or options.all else ("eager",):
                torch.compiler.reset()
                sides = sides_of(model, example, mode)
                timing = interleave(
                    sides, options, warmup=warmups(options, mode), what=f"overhead, {name}, {size} pixels, {mode}"
                )
                for side in sides:
                    row = [name, str(size), mode, side, timing.ms(side)]
                    added = f"{1e3 * (timing.median(side) - timing.median('UNet')):.2f}"
                    same = difference(timing.results[side], timing.results["UNet"])
                    row += ["", "", ""] if side == "UNet" else [added, f"{timing.ratio(side, 'UNet'):.3f}", same]
                    table.add(*row, str(timing.runs))
    publish(options, "overhead", table)


if __name__ == "__main__":
    main()
