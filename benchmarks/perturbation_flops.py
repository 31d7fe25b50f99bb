"""What guidance by perturbed attention adds to a step with classifier-free guidance, counted on models of full size
(full_size.py), without weights.

    python benchmarks/perturbation_flops.py
    python benchmarks/perturbation_flops.py --models sdxl sd15

The step is one call with two rows, without and with the text. Another call with one row more would add half of it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import Table, publish
from full_size import MODELS, built, counted, twice

import sloth_fx
from sloth_fx import PAG, SAG, SEG, SLG, TPG
from sloth_fx.perturbation_specs import PerturbationSpec

UNETS = ("sd15", "sdxl")
DEFAULT = [*UNETS, "pixart-sigma", "sd3-medium", "sd3.5-large"]


def specs(name: str) -> dict[str, PerturbationSpec]:
    found: dict[str, PerturbationSpec] = {"PAG": PAG(), "SEG": SEG(), "SAG": SAG(), "TPG": TPG()}
    if name not in UNETS:
        found["SLG(layers=(7, 8, 9))"] = SLG(layers=(7, 8, 9), start=0.0, stop=1.0)
    return found


def rows(name: str) -> list[tuple[str, ...]]:
    model, call = built(name)
    call = twice(call)
    plain = counted(model, call)
    found = [(name, "none", f"{plain / 1e12:.2f}", "")]
    for label, spec in specs(name).items():
        patched = sloth_fx.transform(model, spec, example_inputs=call)
        context = sloth_fx.context(patched)
        context.rows = ("uncond", "cond")
        context.prediction = "epsilon"
        context.at(0.0, sigma=1.0)
        flops = counted(patched, call)
        found.append((name, label, f"{flops / 1e12:.2f}", f"{100 * (flops / plain - 1):.1f} %"))
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--models", nargs="+", choices=MODELS, default=DEFAULT)
    options.add_argument("--markdown", type=Path, metavar="FILE", help="write the table into FILE, between its markers")
    options.set_defaults(device=torch.device("meta"), dtype=torch.float32, batch=2, tiny=False)
    given = options.parse_args()
    table = Table("model", "spec", "TFLOP of a step", "more")
    for name in given.models:
        for row in rows(name):
            table.add(*row)
    publish(given, "perturbation_flops", table)


if __name__ == "__main__":
    main()
