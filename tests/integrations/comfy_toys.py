"""A node pack with a toy model, its texts and its VAE. ComfyUI loads it, so this is imported nowhere else."""

import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.taesd.taesd
import torch

from tests.integrations.comfy_host import Blind
from tests.integrations.comfy_real import conditioning, fill, made


class ToyCheckpoint:
    """A UNet of ComfyUI with 14 sites of attention, or a model without any."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"name": (["unet", "blind"],)}})
    RETURN_TYPES = ("MODEL", "CONDITIONING", "CONDITIONING", "VAE")
    FUNCTION, CATEGORY = "load", "toys"

    def load(self, name):
        patcher, _ = made(comfy, "unet")
        if name == "blind":
            patcher.model.diffusion_model = Blind()
            patcher.model.diffusion_model.dtype = torch.float32
        vae = comfy.taesd.taesd.TAESD()
        fill(vae, seed=2)
        with torch.no_grad():
            vae.vae_scale.fill_(1.0)
            vae.vae_shift.fill_(0.0)
        return patcher, conditioning(1), conditioning(2), comfy.sd.VAE(sd=vae.state_dict())


NODE_CLASS_MAPPINGS = {"ToyCheckpoint": ToyCheckpoint}
