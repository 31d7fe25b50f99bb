"""Objects that do what ComfyUI's do as far as its nodes may rely on it, and models of its shape, at toy size."""

import copy
import functools
import math
import uuid

import torch
import torch.nn.functional as F
from torch import nn

TEXT, CHANNELS = 11, 4
ROWS, COLUMNS = 13, 9


def optimized_attention(
    q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **options
):
    """All heads in the channels, as ComfyUI calls its attention."""
    override = (options.get("transformer_options") or {}).get("optimized_attention_override")
    return (kernel if override is None else functools.partial(override, kernel))(q, k, v, heads, mask=mask, **options)


def kernel(q, k, v, heads, mask=None, **options):
    """What computes it."""
    q, k, v = (each.unflatten(2, (heads, -1)).transpose(1, 2) for each in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


class CrossAttention(nn.Module):
    def __init__(self, channels, heads, text=None):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(text or channels, channels, bias=False)
        self.to_v = nn.Linear(text or channels, channels, bias=False)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x, context=None, value=None, mask=None, transformer_options={}):  # noqa: B006 - as hosts write it
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context if value is None else value)
        return self.to_out(optimized_attention(q, k, v, self.heads, mask=mask, transformer_options=transformer_options))


class Block(nn.Module):
    """Attention with the patches that other packs may have set around it."""

    def __init__(self, channels, heads=2):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attn1, self.attn2 = CrossAttention(channels, heads), CrossAttention(channels, heads, TEXT)

    def forward(self, x, context, transformer_options):
        patches = transformer_options.get("patches", {})
        replaced = transformer_options.get("patches_replace", {})
        x = x + self.attend("attn1", self.norm1(x), None, patches, replaced, transformer_options)
        return x + self.attend("attn2", self.norm2(x), context, patches, replaced, transformer_options)

    def attend(self, name, x, context, patches, replaced, options):
        attention, value = getattr(self, name), None
        extra = {**options, "block": options["block"]}
        for patch in patches.get(f"{name}_patch", ()):
            context = x if context is None else context
            x, context, value = patch(x, context, context if value is None else value, extra)
        if options["block"] in replaced.get(name, {}):
            context = x if context is None else context
            q, k, v = attention.to_q(x), attention.to_k(context), attention.to_v(context)
            return attention.to_out(replaced[name][options["block"]](q, k, v, extra))
        return attention(x, context=context, value=value, transformer_options=options)


class Spatial(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.transformer_blocks = nn.ModuleList([Block(channels)])

    def forward(self, x, context, transformer_options):
        tokens = x.movedim(1, 3)
        shape = tokens.shape
        tokens = tokens.flatten(1, 2)
        for block in self.transformer_blocks:
            tokens = block(tokens, context, transformer_options)
        return x + tokens.reshape(shape).movedim(3, 1)


class UNetModel(nn.Module):
    """Two levels, one skip connection at each, and attention in the places where Stable Diffusion has it."""

    def __init__(self, channels=16):
        super().__init__()
        self.dtype, self.in_channels, self.channel_mult, self.num_classes = torch.float32, CHANNELS, (1, 1), None
        self.time = nn.Linear(1, channels)
        first = nn.Conv2d(CHANNELS, channels, 3, padding=1)
        down = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.input_blocks = nn.ModuleList(map(nn.ModuleList, ([first], [nn.Identity(), Spatial(channels)], [down])))
        self.middle_block = nn.ModuleList([nn.Identity(), Spatial(channels)])
        self.output_blocks = nn.ModuleList(
            nn.ModuleList([nn.Conv2d(2 * channels, channels, 1), Spatial(channels)]) for _ in range(2)
        )
        self.out = nn.Conv2d(channels, CHANNELS, 3, padding=1)

    def forward(self, x, timesteps=None, context=None, y=None, control=None, transformer_options={}, **kwargs):  # noqa: B006
        options, kept = transformer_options, []
        h = x
        for index, block in enumerate(self.input_blocks):
            options["block"] = ("input", index)
            h = self.run(block, h, context, options)
            if index == 0:
                h = h + self.time((timesteps / 1000).unsqueeze(1))[:, :, None, None]
            kept.append(h)
        options["block"] = ("middle", 0)
        h = self.run(self.middle_block, h, context, options)
        for index, block in enumerate(self.output_blocks):
            options["block"] = ("output", index)
            skip = kept.pop() if index == 0 else kept[1]
            h = F.interpolate(h, skip.shape[-2:]) if h.shape != skip.shape else h
            h = self.run(block, torch.cat([h, skip], 1), context, options)
        return self.out(h)

    def run(self, block, h, context, options):
        for layer in block:
            h = layer(h, context, options) if isinstance(layer, Spatial) else layer(h)
        return h


class Novel(nn.Module):
    """A transformer of a family that nobody has described: it is located at its first call."""

    def __init__(self, channels=16):
        super().__init__()
        self.dtype = torch.float32
        self.embed, self.out = nn.Linear(CHANNELS, channels), nn.Linear(channels, CHANNELS)
        self.blocks = nn.ModuleList(Block(channels) for _ in range(2))

    def forward(self, x, timestep, context, transformer_options={}, **kwargs):  # noqa: B006
        rows, columns = x.shape[-2:]
        tokens = self.embed(x.flatten(2).transpose(1, 2)) + timestep[:, None, None] / 1000
        for index, block in enumerate(self.blocks):
            transformer_options["block"] = ("double_block", index)
            tokens = block(tokens, context, transformer_options)
        return self.out(tokens).transpose(1, 2).unflatten(2, (rows, columns))


class Joint(nn.Module):
    """A transformer whose blocks attend over text and image together, of a family that nobody has described."""

    def __init__(self, channels=16):
        super().__init__()
        self.dtype = torch.float32
        self.embed, self.read = nn.Linear(CHANNELS, channels), nn.Linear(TEXT, channels)
        self.blocks = nn.ModuleList(CrossAttention(channels, 2) for _ in range(2))
        self.out = nn.Linear(channels, CHANNELS)

    def forward(self, x, timestep, context, transformer_options={}, **kwargs):  # noqa: B006
        image = self.embed(x.flatten(2).transpose(1, 2)) + timestep[:, None, None] / 1000
        text = self.read(context)
        for block in self.blocks:
            both = torch.cat([text, image], 1)
            both = both + block(F.layer_norm(both, both.shape[-1:]), transformer_options=transformer_options)
            text, image = both[:, : text.shape[1]], both[:, text.shape[1] :]
        return self.out(image).transpose(1, 2).unflatten(2, x.shape[-2:])


class Blind(nn.Module):
    """A model without attention."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.SiLU())

    def forward(self, x, timesteps, context=None, transformer_options={}, **kwargs):  # noqa: B006
        return self.layers(x)


class EPS:
    """Models that predict the noise."""


class Discrete(EPS, nn.Module):
    """The sampling of Stable Diffusion: 1000 timesteps, each with its sigma."""

    num_timesteps = 1000

    def __init__(self):
        super().__init__()
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        kept = torch.cumprod(1 - betas, 0)
        self.register_buffer("sigmas", ((1 - kept) / kept).sqrt().float())

    @property
    def sigma_min(self):
        return self.sigmas[0]

    @property
    def sigma_max(self):
        return self.sigmas[-1]

    def timestep(self, sigma):
        return (sigma.log() - self.sigmas.log()[:, None]).abs().argmin(0).view(sigma.shape)


class CONST:
    """Flow matching."""


class Flow(CONST, nn.Module):
    def __init__(self, multiplier=1000):
        super().__init__()
        self.multiplier = multiplier
        self.sigma_min, self.sigma_max = torch.tensor(0.001), torch.tensor(1.0)

    def timestep(self, sigma):
        return sigma * self.multiplier


class Edm(nn.Module):
    def __init__(self, low=0.002, high=80.0):
        super().__init__()
        self.sigma_min, self.sigma_max = torch.tensor(low), torch.tensor(high)

    def timestep(self, sigma):
        return 0.25 * sigma.log()


class EDM:
    """Models that predict what is missing, preconditioned by the deviation of the data."""


class Preconditioned(EDM, Edm):
    """The sampling of models such as Playground 2.5."""

    def __init__(self, sigma_data=0.7):
        super().__init__()
        self.sigma_data = sigma_data


class Angle(Edm):
    def timestep(self, sigma):
        return sigma.atan() / (math.pi / 2)


class Cond:
    """What a model makes of a conditioning."""

    def __init__(self, cond):
        self.cond = cond


class BaseModel(nn.Module):
    def __init__(self, diffusion_model, sampling=None):
        super().__init__()
        self.diffusion_model = diffusion_model
        self.model_sampling = sampling or Discrete()

    def extra_conds(self, **given):
        return {"c_crossattn": Cond(given["cross_attn"]), "c_concat": Cond(given["noise"])}

    def apply_model(self, x, t, c_crossattn, transformer_options):
        timesteps = self.model_sampling.timestep(t).float()
        x = x / (t**2 + 1).sqrt()[:, None, None, None]
        return self.diffusion_model(
            x, timesteps, context=c_crossattn, control=None, transformer_options=transformer_options
        )


class ModelPatcher:
    """Patches of weights are sums, by the name that a parameter has in whichever model is there when it is loaded."""

    def __init__(self, model):
        self.model = model
        self.patches, self.backup = {}, {}
        self.object_patches, self.object_patches_backup = {}, {}
        self.model_options = {"transformer_options": {}}
        self.wrappers = {}

    def clone(self):
        other = ModelPatcher(self.model)
        other.patches, other.backup = dict(self.patches), self.backup
        other.object_patches, other.object_patches_backup = dict(self.object_patches), self.object_patches_backup
        other.model_options = copy.deepcopy(self.model_options)
        other.wrappers = copy.deepcopy(self.wrappers)
        return other

    def add_object_patch(self, name, value):
        self.object_patches[name] = value

    def get_model_object(self, name):
        for known in (self.object_patches, self.object_patches_backup):
            if name in known:
                return known[name]
        return getattr(self.model, name)

    def add_patches(self, patches):
        self.patches |= patches

    def load(self):
        for name, value in self.object_patches.items():
            self.object_patches_backup.setdefault(name, getattr(self.model, name))
            setattr(self.model, name, value)
        for name, difference in self.patches.items():
            path, _, leaf = name.rpartition(".")
            owner = self.model.get_submodule(path)
            self.backup[name] = getattr(owner, leaf)
            setattr(owner, leaf, nn.Parameter(getattr(owner, leaf) + difference, requires_grad=False))

    def unload(self):
        for name, weight in self.backup.items():
            path, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(path), leaf, weight)
        self.backup.clear()
        for name, value in self.object_patches_backup.items():
            setattr(self.model, name, value)
        self.object_patches_backup.clear()


def patcher(model=None, sampling=None):
    """A patcher of a model whose weights do something everywhere."""
    model = UNetModel() if model is None else model
    random = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
        parameter.data = torch.randn(parameter.shape, generator=random) * (1.5 * fan_in**-0.5)
        parameter.requires_grad_(False)
    return ModelPatcher(BaseModel(model.eval(), sampling))


def conditioning(tokens=5, seed=1, channels=TEXT):
    random = torch.Generator().manual_seed(seed)
    return [[torch.randn(1, tokens, channels, generator=random), {"pooled_output": None}]]


POSITIVE, NEGATIVE = conditioning(seed=1), conditioning(seed=2)
SIGMAS = torch.tensor([12.5, 3.5, 0.9, 0.0])


def latents(batch=2, seed=3, rows=ROWS, columns=COLUMNS):
    return torch.randn(batch, CHANNELS, rows, columns, generator=torch.Generator().manual_seed(seed))


class CFGGuider:
    """Classifier-free guidance with one scale for the whole run, as long as which it lives."""

    def __init__(self, patched, cfg, **conds):
        self.model_options, self.cfg, self.conds = patched.model_options, cfg, conds
        patched.guider = self

    def predict_noise(self):
        """Its name is what tells that it is this one."""


def start(guider):
    """The run of a guider begins; returns what its sampler would."""
    (note,) = guider.model_options["transformer_options"]["wrappers"]["outer_sample"]["sloth_fx"]

    class Executor:
        class_obj = guider

        def __call__(self):
            return "sampled"

    return note(Executor())


def call(patched, x, sigma, sigmas, groups=(0,), beside=(), texts=(POSITIVE, NEGATIVE)):
    """One call of a loaded model for some groups of ``texts``, as a sampler makes it; ``beside`` are those that have
    calls of their own."""
    conds = [each if group in (*groups, *beside) else None for group, each in enumerate(texts)]
    wrappers = patched.model_options["transformer_options"].get("wrappers", {}).get("calc_cond_batch", {})
    for note in (each for notes in wrappers.values() for each in notes):
        note(lambda *args, **kwargs: None, patched.model, conds, x, sigma, patched.model_options)
    texts = [texts[group][0][0].expand(len(x), -1, -1) for group in groups]
    options = {
        **copy.deepcopy(patched.model_options["transformer_options"]),
        "sigmas": torch.full((len(x),), sigma),
        "sample_sigmas": sigmas,
        "cond_or_uncond": list(groups),
        "uuids": [uuid.uuid4() for _ in groups],
    }
    times = torch.full((len(x) * len(groups),), sigma)
    return patched.model.apply_model(torch.cat([x] * len(groups)), times, torch.cat(texts), options).chunk(len(groups))


@torch.inference_mode()
def sample(patched, x=None, sigmas=SIGMAS, groups=(1, 0), scale=3.0):
    """A run of Euler steps with classifier-free guidance. Returns what the model predicts at each of them."""
    x = latents() * sigmas[0] if x is None else x * sigmas[0]
    wrappers = patched.model_options["transformer_options"].get("wrappers", {}).get("prepare_sampling", {})
    for each in (check for checks in wrappers.values() for check in checks):
        each(lambda *args, **kwargs: None, patched, x.shape, {}, model_options=patched.model_options)
    patched.load()
    try:
        found = []
        for sigma, following in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
            by_group = dict(zip(groups, call(patched, x, sigma, sigmas, groups), strict=True))
            noise = by_group[0] if 1 not in by_group else by_group[1] + scale * (by_group[0] - by_group[1])
            found.append(noise)
            x = x + noise * (following - sigma)
        return torch.stack(found)
    finally:
        patched.unload()
