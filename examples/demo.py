"""The UNet of Stable Diffusion 1.5 at 512x512, as it is and with Slothful Attention: times, savings, two pictures.

Its weights are random, so it paints noise; times and savings are those of the real one. Pictures go to ``out/``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import unets
from diffusers import EulerDiscreteScheduler
from pictures import Tile, keys_over_steps, tile_view
from tqdm import tqdm

import sloth_fx
from sloth_fx.site import AttentionSite

PICTURE_STEPS = 30


def run(unet: torch.nn.Module, patched: torch.nn.Module, steps: int) -> None:
    """A sampling loop with both, side by side, and a table of it."""
    given = unets.inputs(unet)
    noise = given.pop("sample")
    runs = {"unpatched": Run(unet, noise, steps), "patched": Run(patched, noise, steps)}
    context = sloth_fx.context(patched)
    rows = []
    with tqdm(total=steps * len(runs), desc="sampling", unit="call") as bar:
        for each in runs.values():  # neither pays for a first call
            bar.set_postfix_str("warming up")
            each.model(noise, 999, **given)
        bar.unpause()
        for i in range(steps):
            context.step(i, steps)
            seconds = []
            for name, each in runs.items():
                bar.set_postfix_str(f"step {i + 1}, {name}")
                seconds.append(each.step(i, given))
                bar.update()
            rows.append((i + 1, *seconds, *savings(patched)))
    total = [sum(row[k] for row in rows) for k in (1, 2)] + [sum(row[k] for row in rows) / steps for k in (3, 4)]
    print("\n step  unpatched    patched  time saved  keys saved  attention saved")
    for name, before, after, kept, work in (*rows, ("all", *total)):
        print(f"{name:>5} {before:>8.2f} s {after:>8.2f} s {1 - after / before:>11.0%}", end="")
        print(f" {1 - kept:>11.0%} {1 - work:>16.0%}")
    print("Keys and attention (pairs of a query and a key) are those of self-attention.")


class Run:
    """One sampling run, step by step."""

    def __init__(self, model: torch.nn.Module, noise: torch.Tensor, steps: int) -> None:
        self.model = model
        self.scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        self.scheduler.set_timesteps(steps)
        self.latent = noise * self.scheduler.init_noise_sigma

    def step(self, i: int, given: dict[str, torch.Tensor]) -> float:
        """Do step ``i``; the seconds that the model took for it."""
        timestep = self.scheduler.timesteps[i]
        latent = self.scheduler.scale_model_input(self.latent, timestep)
        start = time.perf_counter()
        noise = self.model(latent, timestep, **given).sample
        seconds = time.perf_counter() - start
        self.latent = self.scheduler.step(noise, timestep, self.latent).prev_sample
        return seconds


def savings(patched: torch.nn.Module) -> tuple[float, float]:
    """Of all self-attention now: the share of the keys that is left, and of the pairs of a query and a key."""
    sites, now = self_attention(patched), layouts(patched)
    keys = sum(now[s.name].kv_tokens() if s.name in now else s.q_tokens for s in sites)
    pairs = sum((now[s.name].pairs() if s.name in now else s.q_tokens**2) * s.heads * s.head_dim for s in sites)
    return keys / sum(s.q_tokens for s in sites), pairs / sum(s.q_tokens**2 * s.heads * s.head_dim for s in sites)


def self_attention(patched: torch.nn.Module) -> list[AttentionSite]:
    return [each for each in sloth_fx.report(patched) if each.kind == "self"]


def layouts(patched: torch.nn.Module) -> dict[str, sloth_fx.operators.KeyLayout]:
    """What each patched site keeps now, by its name."""
    names = [each.name for each in sloth_fx.report(patched) if each.operators]
    return dict(zip(names, sloth_fx.context(patched).layouts(), strict=True))


def draw_keys(patched: torch.nn.Module, path: Path) -> None:
    sites, context = self_attention(patched), sloth_fx.context(patched)
    kept, work = np.ones((len(sites), PICTURE_STEPS)), np.ones(PICTURE_STEPS)
    for step in range(PICTURE_STEPS):
        context.step(step, PICTURE_STEPS)
        now = layouts(patched)
        work[step] = savings(patched)[1]
        for row, site in enumerate(sites):
            if site.name in now:
                kept[row, step] = now[site.name].kv_tokens() / now[site.name].tokens
    keys_over_steps(path, sites, kept, work)


def draw_tile(unet: torch.nn.Module, path: Path, *, tiny: bool) -> None:
    sizes = {"base_tile_size": 12, "peak_tile_size": 16} if tiny else {}
    patched = sloth_fx.transform(unet, sloth_fx.NearSightedAttention(**sizes))
    context, panels = sloth_fx.context(patched), []
    for title, progress in (("at the start of sampling", 0.0), ("at the peak, 40% of the run", 0.4)):
        context.at(progress)
        panels.append(Tile(title, context.layouts()[0]))
    tile_view(path, self_attention(patched)[0], panels)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a tiny UNet: seconds on a CPU")
    parser.add_argument("--steps", type=int, default=8, help="of the sampling loop")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures")
    options = parser.parse_args()

    print("Building the UNet of Stable Diffusion 1.5, with random weights ...", flush=True)
    unet = unets.sd15(tiny=options.tiny)
    print("Rewriting its attention ...", flush=True)
    patched = sloth_fx.transform(unet, sloth_fx.SlothfulAttention())
    print(f"\n{sloth_fx.report(patched)}\n")

    options.out.mkdir(parents=True, exist_ok=True)
    keys, tile = options.out / "keys_over_steps.png", options.out / "near_sighted_tile.png"
    draw_keys(patched, keys)
    draw_tile(unet, tile, tiny=options.tiny)
    run(unet, patched, options.steps)
    print(f"\nPictures:\n  {keys}  how many keys each layer looks at, over {PICTURE_STEPS} steps")
    print(f"  {tile}  where the queries of one tile look")


if __name__ == "__main__":
    main()
