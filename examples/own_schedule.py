"""A schedule of one's own: any object with ``clock`` and ``ratio(moment)``. Random weights.

This one spares the beginning, where the composition is decided, and the end, where the details are.
"""

import argparse
from dataclasses import dataclass

import torch
import unets

import sloth_fx


@dataclass(frozen=True)
class Between:
    """Full effect from ``start`` to ``stop`` of the run, none outside, and a ramp of ``ramp`` on either side."""

    start: float
    stop: float
    ramp: float = 0.15
    clock = "progress"

    def ratio(self, moment: sloth_fx.Moment) -> float:
        inside = min(moment.progress - self.start, self.stop - moment.progress)
        return min(max(1 + inside / self.ramp, 0.0), 1.0)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a tiny UNet: seconds on a CPU")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()

    unet = unets.sd15(tiny=options.tiny)
    patched = sloth_fx.transform(unet, sloth_fx.SlothfulAttention(schedule=Between(start=0.3, stop=0.7)))
    patched(timestep=500, **unets.inputs(unet))

    context = sloth_fx.context(patched)
    print("step  stride at the first site  keys kept, all sites")
    for i in range(options.steps):
        context.step(i, options.steps)
        layouts = context.layouts()
        rows, columns = layouts[0].window
        kept = sum(layout.kv_tokens() for layout in layouts) / sum(layout.tokens for layout in layouts)
        print(f"{i:4}  {f'{rows} x {columns}':>24}  {kept:>4.0%} {'#' * round(40 * kept)}")


if __name__ == "__main__":
    main()
