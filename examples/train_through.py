"""Training through a patched model: gradients flow as in any other. Random weights, and one random image to learn.

The patched model shares its weights with the original, so what it learns the original knows as well. That is how one
would adapt a model to the reduction it will run with.
"""

import argparse

import torch
import torch.nn.functional as F
import unets
from diffusers import DDPMScheduler
from tqdm import trange

import sloth_fx


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a tiny UNet: seconds on a CPU")
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()

    unet = unets.sd15(tiny=options.tiny)
    patched = sloth_fx.transform(unet, sloth_fx.SlothfulAttention()).train()
    patched.requires_grad_(False)
    learning = [weight for name, weight in patched.named_parameters() if ".attn1." in name]
    for weight in learning:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(learning, lr=1e-3)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")

    given = unets.inputs(unet)
    image = given.pop("sample")
    noise = torch.randn_like(image)

    def loss_of(model: torch.nn.Module, timestep: int) -> torch.Tensor:
        when = torch.tensor([timestep])
        return F.mse_loss(model(scheduler.add_noise(image, noise, when), when, **given).sample, noise)

    with torch.no_grad():
        before = loss_of(unet, 600)
    for step in (bar := trange(options.steps, desc="training", unit="step")):
        optimizer.zero_grad()
        loss = loss_of(patched, (200, 600)[step % 2])
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.4f}")

    with torch.no_grad():
        print(f"loss of the patched model: {before:.4f} before, {loss_of(patched, 600):.4f} after")
        print(f"loss of the original, which shares the weights: {loss_of(unet, 600):.4f}")


if __name__ == "__main__":
    main()
