"""What several tests of patched models share: specs, and guidance by hand."""

import torch

import sloth_fx
from sloth_fx.patch import patch_of
from tests.integrations.comfy_host import SIGMAS, call, latents

FULL = sloth_fx.SlothfulAttention(keep_middle=False)
NEUTRAL = sloth_fx.SlothfulAttention(in_=sloth_fx.Reduction(rate=1.0), out=sloth_fx.Reduction(rate=1.0))
TILE = sloth_fx.NearSightedTile(tile_size=5)
WEIGHT = "diffusion_model.output_blocks.1.1.transformer_blocks.0.attn1"
PERTURBING = {
    "PAG": sloth_fx.PAG(),
    "SEG": sloth_fx.SEG(),
    "TPG": sloth_fx.TPG(),
    "SLG": sloth_fx.SLG(layers=(1,), start=0.0, stop=1.0),
    "SAG": sloth_fx.SAG(),
}
SIGMA, SCALE = 3.5, 3.0


def model_of(patched):
    return patched.object_patches["diffusion_model"]


def context_of(patched):
    return patch_of(model_of(patched)).context


def predicted(model, *calls):
    """By group, what each of several calls predicts, which together are all there are."""
    model.load()
    with torch.no_grad():
        found = []
        for groups in calls:
            beside = [group for each in calls for group in each]
            found += zip(groups, call(model, latents(), SIGMA, SIGMAS, groups, beside), strict=True)
    model.unload()
    return found


def guided(found, scale=SCALE):
    """Classifier-free guidance by the mean of each text's predictions."""
    positive, negative = (torch.stack([each for group, each in found if group == text]).mean(0) for text in (0, 1))
    return negative + scale * (positive - negative)
