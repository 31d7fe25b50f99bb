"""What a negative text costs at each step, counted on models of full size (full_size.py), without weights.

    python benchmarks/guidance_flops.py
    python benchmarks/guidance_flops.py --models flux sd3.5-large

Sides as in guidance.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import Table, publish
from full_size import MODELS, TEXT, built, counted, twice

import sloth_fx

DEFAULT = ["sdxl", "pixart-sigma", "wan2.1-1.3b", "sd3.5-large", "flux"]


def rows(name: str) -> list[tuple[str, ...]]:
    model, call = built(name)
    patched = sloth_fx.transform(model, sloth_fx.NAG(), example_inputs=call)
    context = sloth_fx.context(patched)
    context.at(0.0)
    context.set_negative(**{TEXT: torch.zeros_like(call[TEXT])})
    with torch.no_grad():
        patched(**call)  # keys at hand are computed once for each prompt
    plain = counted(model, call)
    found = {"unguided": plain, "NAG": counted(patched, call), "two branches": counted(model, twice(call))}
    return [(name, side, f"{flops / 1e12:.2f}", f"{flops / plain:.3f}") for side, flops in found.items()]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--models", nargs="+", choices=MODELS, default=DEFAULT)
    options.add_argument("--markdown", type=Path, metavar="FILE", help="write the table into FILE, between its markers")
    options.set_defaults(device=torch.device("meta"), dtype=torch.float32, batch=1, tiny=False)
    given = options.parse_args()
    table = Table("model", "side", "TFLOP", "times unguided")
    for name in given.models:
        for row in rows(name):
            table.add(*row)
    publish(given, "guidance_flops", table)


if __name__ == "__main__":
    main()
