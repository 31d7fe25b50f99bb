"""What a workflow of ComfyUI has beside our nodes: LoRA, samplings, patches as IP-Adapter sets them, ControlNet."""

import re

import torch

from sloth_fx.integrations.comfy.patching import patch_model
from sloth_fx.spec import NAG
from tests.integrations.comfy_real import TEXT, conditioning, fill

_WITH_LORA = re.compile(r"lora_unet_(input_blocks_1|middle_block|output_blocks_3)_1_.*_attn._to_(q|k|v|out_0)")


def with_lora(comfy, patcher):
    """A LoRA file in the names of its trainers, as the Load LoRA node applies it."""
    random = torch.Generator().manual_seed(5)
    keys = {
        f"lora_unet_{path.removeprefix('diffusion_model.').removesuffix('.weight').replace('.', '_')}": path
        for path in patcher.model.state_dict()
        if path.endswith(".weight")
    }
    chosen = [name for name in keys if _WITH_LORA.fullmatch(name)]
    file = {}
    for name in chosen:
        rows, columns = patcher.model.state_dict()[keys[name]].shape
        file[f"{name}.lora_up.weight"] = torch.randn(rows, 4, generator=random) * 0.2
        file[f"{name}.lora_down.weight"] = torch.randn(4, columns, generator=random) * 0.2
    changed = patcher.clone()
    patches = comfy.lora.load_lora(file, keys)
    assert len(patches) == len(chosen) == 24
    assert set(changed.add_patches(patches, 1.0)) == set(patches)
    return changed


def with_lcm(comfy, patcher):
    """An LCM-LoRA, and the sampling that goes with it."""
    return with_sampling("lcm", False)(comfy, with_lora(comfy, patcher))


def with_sampling(kind, zsnr=False):
    def change(comfy, patcher):
        from comfy_extras import nodes_model_advanced as nodes

        if kind == "edm":
            return nodes.ModelSamplingContinuousEDM().patch(patcher, "edm_playground_v2.5", 120.0, 0.002)[0]
        return nodes.ModelSamplingDiscrete().patch(patcher, kind, zsnr)[0]

    return change


def with_adapter(comfy, patcher):
    """As IP-Adapter: what the positive reads is another thing, by a patch and where attention is replaced."""
    from comfy.ldm.modules.attention import optimized_attention

    def scaled(context, groups):
        parts = zip(context.chunk(len(groups)), groups, strict=True)
        return torch.cat([part * (1.3 if group == 0 else 1.0) for part, group in parts])

    def patch(query, key, value, extra):
        return query, scaled(key, extra["cond_or_uncond"]), scaled(value, extra["cond_or_uncond"])

    def replaced(query, key, value, extra):
        read = optimized_attention(query, key, value, extra["n_heads"])
        return scaled(read, extra["cond_or_uncond"])

    changed = patcher.clone()
    changed.set_model_attn2_patch(patch)
    for block in (("input", 1), ("middle", 0), ("output", 2)):
        changed.set_model_attn2_replace(replaced, *block)
    return changed


def with_(spec):
    def change(comfy, patcher):
        negative = conditioning(5, tokens=9) if isinstance(spec, NAG) else None
        return patch_model(patcher, [spec], negative=negative)

    return change


def controlnet(comfy, pixels):
    """A ControlNet of ComfyUI for the UNet, with a picture of (rows, columns)."""
    network = comfy.cldm.cldm.ControlNet(
        image_size=32,
        in_channels=4,
        model_channels=32,
        hint_channels=3,
        num_res_blocks=[1, 1],
        channel_mult=(1, 2),
        num_heads=4,
        use_spatial_transformer=True,
        transformer_depth=[1, 1],
        transformer_depth_middle=1,
        context_dim=TEXT,
        legacy=False,
        dtype=torch.float32,
        device="cpu",
        operations=comfy.ops.disable_weight_init,
    )
    fill(network, seed=7)
    control = comfy.controlnet.ControlNet(network, load_device=torch.device("cpu"))
    hint = torch.rand(1, 3, *pixels, generator=torch.Generator().manual_seed(4))
    control.set_cond_hint(hint, 0.8)
    return control
