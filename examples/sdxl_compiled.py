"""The UNet of Stable Diffusion XL, compiled without graph breaks, in a few phases warmed up beforehand. Random weights.

Strides are part of a compiled graph. ``phases=4`` rounds the schedule to at most four sets of them, so to as
many graphs; ``warmup`` makes them all before the run, and the run then compiles nothing more.
"""

import argparse
import time

import torch
import unets
from diffusers import EulerDiscreteScheduler

import sloth_fx


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a tiny UNet, traced but not compiled: seconds on a CPU")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--phases", type=int, default=4)
    options = parser.parse_args()

    unet = unets.sdxl(tiny=options.tiny)
    if torch.cuda.is_available() and not options.tiny:
        unet = unet.to("cuda", torch.bfloat16)
    patched = sloth_fx.transform(unet, sloth_fx.SlothfulAttention(), phases=options.phases)
    compiled = torch.compile(patched, fullgraph=True, backend="eager" if options.tiny else "inductor")

    given = unets.inputs(unet)
    timestep = torch.tensor(999.0, device=unet.device)
    start = time.perf_counter()
    # Arguments of the form that the run will use: torch compiles again for others.
    sets = sloth_fx.warmup(compiled, {**given, "timestep": timestep})
    print(f"{sets} sets of strides, all compiled in {time.perf_counter() - start:.1f} s")

    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.set_timesteps(options.steps, device=unet.device)
    context = sloth_fx.context(compiled)
    latent = given.pop("sample") * scheduler.init_noise_sigma
    start = time.perf_counter()
    with torch.compiler.set_stance("fail_on_recompile"):  # proves that nothing is compiled from here on
        for i, timestep in enumerate(scheduler.timesteps):
            context.step(i, options.steps)
            noisy = scheduler.scale_model_input(latent, timestep).to(unet.dtype)
            noise = compiled(sample=noisy, timestep=timestep, **given).sample
            latent = scheduler.step(noise, timestep, latent).prev_sample
    print(f"{options.steps} steps in {time.perf_counter() - start:.1f} s, and nothing was compiled again")


if __name__ == "__main__":
    main()
