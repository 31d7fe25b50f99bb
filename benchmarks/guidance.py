"""What a negative text costs at each step: NAG against the denoiser as it is.

    python benchmarks/guidance.py
    python benchmarks/guidance.py --models sdxl pixart --sizes 1024
    python benchmarks/guidance.py --models flux --layers 1      # full_size.py's, at its size
    python benchmarks/guidance.py --device cuda --compile blocks

Sides, over the same weights and in one interleaved run:
    unguided         the model as it is
    NAG              the negative keys and values are computed before the first lap, as they are once for each prompt
    NAG, at its end  the same model past its stop
    two branches     the model at twice the batch, which is what classifier-free guidance costs

Targets: at most 3 % more where keys are at hand (SDXL, PixArt-Sigma, Wan), 13 % in SD3.5's joint attention, 20 % in
Flux's. Transformers are cut to --layers; the share that guidance adds does not depend on their number.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import full_size
import torch
from common import Table, in_mode, interleave, modes, parse, parser, publish, sharing_copy, warmups
from peer_models import MODELS, arguments_for, call, denoiser
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import sloth_fx

TEXT = "encoder_hidden_states"
STOP = 0.5
SIDES = ("unguided", "NAG", "NAG, at its end", "two branches")
FULL_SIZE = ("wan2.1-1.3b", "sd3.5-large", "flux")
PIXELS = {"wan2.1-1.3b": "832 x 480, 81 frames"}


def arguments() -> argparse.Namespace:
    options = parser(__doc__, runs=9)
    options.add_argument("--models", nargs="+", choices=(*MODELS, *FULL_SIZE))
    options.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help="which to time")
    options.add_argument("--layers", type=int, metavar="N", help="of transformers; 4 on a CPU, else (0) all")
    return parse(
        options,
        cpu={"models": ["sd15", "pixart", "sd3"], "sizes": [512], "layers": 4},
        gpu={"models": list(MODELS), "sizes": [1024], "layers": 0},
    )


def twice(value: Any, batch: int) -> Any:
    """Arguments for two branches."""
    if isinstance(value, Tensor):
        return torch.cat([value, value]) if value.ndim > 0 and value.shape[0] == batch else value
    return {name: twice(each, batch) for name, each in value.items()} if isinstance(value, Mapping) else value


def sides_of(model: nn.Module, example: dict[str, Any], mode: str) -> dict[str, Callable[[], Any]]:
    patched = sloth_fx.transform(model, sloth_fx.NAG(stop=STOP), example_inputs=example)
    context = sloth_fx.context(patched)
    context.set_negative(**{TEXT: torch.randn_like(example[TEXT])})
    run = in_mode(patched, mode)

    def at(progress: float) -> Any:
        context.at(progress)
        return call(run, example)

    return {
        "unguided": partial(call, in_mode(sharing_copy(model), mode), example),
        "NAG": partial(at, 0.0),
        "NAG, at its end": partial(at, STOP),
        "two branches": partial(call, in_mode(sharing_copy(model), mode), twice(example, len(example[TEXT]))),
    }


def built(name: str, size: int, options: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    if name in FULL_SIZE:
        model, example = full_size.built(name, options.device, options.layers)
        example = tree_map(lambda value: value.to(options.dtype) if isinstance(value, Tensor) else value, example)
        return nn.Module.to(model, options.dtype).requires_grad_(False), example
    model = denoiser(name, size, options)
    return model, arguments_for(name, model, size, options)


def main() -> None:
    options = arguments()
    table = Table("model", "pixels", "mode", "side", "ms (p20 to p80)", "times unguided", "runs")
    for name in options.models:
        for size in [1024] if name in FULL_SIZE else options.sizes:
            model, example = built(name, size, options)
            for mode in modes(options):
                torch.compiler.reset()
                found = sides_of(model, example, mode)
                sides = {side: found[side] for side in options.sides}
                warmup = max(1, warmups(options, mode))  # the negative keys are computed in the first lap
                timing = interleave(sides, options, warmup=warmup, what=f"guidance, {name}, {size} pixels, {mode}")
                for side in sides:
                    ratio = "" if side == "unguided" else f"{timing.ratio(side, 'unguided'):.3f}"
                    table.add(name, PIXELS.get(name, str(size)), mode, side, timing.ms(side), ratio, str(timing.runs))
    publish(options, "guidance", table)


if __name__ == "__main__":
    main()
