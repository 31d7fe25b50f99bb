"""What it costs to be patched: a transform whose parameters do nothing, against the UNet as it is.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --device cuda --compile

Sides: the UNet; a plain copy of it over the same weights, which shows the noise of the measurement; and the patched
UNet, once with the moment told by the caller ("driven") and once reading each call's own timestep ("auto"). Small
pictures show the cost of a call most clearly, because it does not grow with the picture.

Target: at most 1.02 times the UNet, at 512 pixels.
"""

from __future__ import annotations

import torch
from common import Table, difference, in_mode, inputs, interleave, model_parser, modes, parse, publish, sharing_copy, unet

import sloth_fx


def neutral() -> sloth_fx.SlothfulAttention:
    """A reduction by 1, at every self-attention."""
    none = sloth_fx.Reduction(rate=1.0)
    return sloth_fx.SlothfulAttention(in_=none, out=none, keep_middle=False)


def main() -> None:
    options = parse(
        model_parser(__doc__, runs=15),
        cpu={"sizes": [128, 512]},
        gpu={"sizes": [128, 512, 1024]},
    )
    table = Table("model", "pixels", "mode", "side", "ms (p20 to p80)", "added ms", "times the UNet", "difference", "runs")
    for name in options.models:
        model = unet(name, device=options.device, dtype=options.dtype, tiny=options.tiny)
        for size in options.sizes:
            arguments = inputs(model, size, options)
            for mode in modes(options):
                torch.compiler.reset()
                patched = sloth_fx.transform(model, neutral(), example_inputs=arguments)
                run = {
                    "UNet": in_mode(model, mode),
                    "copy of it": in_mode(sharing_copy(model), mode),
                    "patched": in_mode(patched, mode),
                }
                moment = sloth_fx.context(patched)

                def driven(run=run["patched"], moment=moment, arguments=arguments):  # type: ignore[no-untyped-def]
                    moment.at(0.4)
                    return run(**arguments)

                def auto(run=run["patched"], moment=moment, arguments=arguments):  # type: ignore[no-untyped-def]
                    moment.auto()
                    return run(**arguments)

                sides = {
                    "UNet": lambda run=run["UNet"], arguments=arguments: run(**arguments),
                    "copy of it": lambda run=run["copy of it"], arguments=arguments: run(**arguments),
                    "patched, driven": driven,
                    "patched, auto": auto,
                }
                timing = interleave(sides, options, what=f"overhead, {name}, {size} pixels, {mode}")
                for side in sides:
                    same = difference(timing.results[side], timing.results["UNet"])
                    added = 1e3 * (timing.median(side) - timing.median("UNet"))
                    extra = ("", "", "") if side == "UNet" else (f"{added:.2f}", f"{timing.ratio(side, 'UNet'):.3f}", same)
                    table.add(name, str(size), mode, side, timing.ms(side), *extra, str(timing.runs))
    publish(options, "overhead", table)


if __name__ == "__main__":
    main()
