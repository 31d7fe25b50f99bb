"""A sampling loop with the UNet of Stable Diffusion 1.5, as it is and with Slothful Attention. Random weights.

The loop needs no change: the patched model reads each call's own timestep.
"""

import argparse
import time

import torch
import unets
from diffusers import EulerDiscreteScheduler
from tqdm import tqdm

import sloth_fx


def sample(unet: torch.nn.Module, given: dict, steps: int, title: str) -> torch.Tensor:
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.set_timesteps(steps)
    latent = given["sample"] * scheduler.init_noise_sigma
    for timestep in tqdm(scheduler.timesteps, desc=title, unit="step"):
        noisy = scheduler.scale_model_input(latent, timestep)
        noise = unet(noisy, timestep, encoder_hidden_states=given["encoder_hidden_states"]).sample
        latent = scheduler.step(noise, timestep, latent).prev_sample
    return latent


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a tiny UNet: seconds on a CPU")
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()

    unet = unets.sd15(tiny=options.tiny)
    patched = sloth_fx.transform(unet, sloth_fx.SlothfulAttention())
    print(sloth_fx.report(patched))

    given = unets.inputs(unet)
    results = []
    for model, title in ((unet, "unpatched"), (patched, "patched")):
        model(timestep=500, **given)  # warm up
        start = time.perf_counter()
        results.append(sample(model, given, options.steps, title))
        print(f"{title}: {time.perf_counter() - start:.2f} s")
    base, reduced = results
    print(f"relative difference of the results: {(reduced - base).norm() / base.norm():.3f}")


if __name__ == "__main__":
    main()
