"""What each network of the lab is trained for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import scenes
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from scenes import BACKGROUNDS, COLOURS, FILLS, LABELS, PLACES, RADII, SHAPES, TEXTURES, Scene
from torch import Tensor, nn
from torch.nn import functional as F

SEED = 2026


def generator(name: str, step: int) -> np.random.Generator:
    """What a training step is drawn from: its name and number alone."""
    return np.random.default_rng([SEED, *name.encode(), step])


def pictures(drawn: Sequence[Scene], device: torch.device | str = "cpu") -> Tensor:
    """(B, 3, 64, 64) in [-1, 1]."""
    pixels = torch.from_numpy(np.stack([scenes.draw(scene) for scene in drawn])).to(device)
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


# Text

_CATEGORIES = [
    ("colour", tuple(COLOURS)),
    ("shape", SHAPES),
    ("size", tuple(RADII)),
    ("fill", FILLS),
    ("place", tuple(place.split()[-1] for place in PLACES)),
    ("background", tuple(BACKGROUNDS)),
    ("texture", TEXTURES),
]
_OF_THINGS = 5
_WORDS = {
    word: (index, number + 1) for index, (_, words) in enumerate(_CATEGORIES) for number, word in enumerate(words)
}
_STATES = [len(words) + 1 for _, words in _CATEGORIES]
_HEADS = [*_STATES[:_OF_THINGS], *_STATES]  # the thing before, the present one, the background


def states_of(text: str, length: int) -> list[list[int]]:
    """What has been said up to each token: of the thing before, of the present one, of the background; 0: nothing."""
    before, now = [0] * _OF_THINGS, [0] * len(_CATEGORIES)
    found = [[*before, *now]]  # the start
    for word in text.split():
        if word == "and":
            before, now[:_OF_THINGS] = now[:_OF_THINGS], [0] * _OF_THINGS
        elif word in _WORDS:
            category, number = _WORDS[word]
            now[category] = number
        found.append([*before, *now])
    return (found + [found[-1]] * length)[:length]


class Text:
    """The text encoder learns to know at each word what has been said so far, in its last layer and the one before:
    pipelines of the one kind and of the other take these."""

    name = "text"

    def __init__(self, tokenizer, encoder, batch: int) -> None:
        self.tokenizer, self.batch = tokenizer, batch
        width = encoder.config.hidden_size
        heads = nn.ModuleList([nn.Linear(width, sum(_HEADS)) for _ in range(3)])
        self.networks = nn.ModuleDict({"encoder": encoder, "heads": heads})

    def loss(self, step: int) -> Tensor:
        random = generator(self.name, step)
        texts = [scenes.random_text(scenes.random_scene(random), random) for _ in range(self.batch)]
        ids = tokenized(self.tokenizer, texts)
        states = torch.tensor([states_of(text, ids.shape[1]) for text in texts])
        encoder, heads = self.networks["encoder"], self.networks["heads"]
        out = encoder(ids, output_hidden_states=True)
        readings = [
            (heads[0](out.last_hidden_state), states),
            (heads[1](out.hidden_states[-2]), states),
            (heads[2](out.text_embeds), states[:, -1]),
        ]
        return sum(_cross_entropy(logits, target) for logits, target in readings) / len(readings)


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    parts = logits.split(_HEADS, dim=-1)
    return sum(
        F.cross_entropy(part.flatten(0, -2), target[..., index].flatten()) for index, part in enumerate(parts)
    ) / len(parts)


def tokenized(tokenizer, texts: Sequence[str]) -> Tensor:
    length = tokenizer.model_max_length
    return tokenizer(
        list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids


# Pictures


class Autoencoder:
    """Absolute and squared differences of pixels, those of their slopes, and a little divergence of the latents from a
    normal. Things are small: without the squares they would be painted over."""

    name = "vae"

    def __init__(self, vae: AutoencoderKL, batch: int, device: torch.device) -> None:
        self.batch, self.device = batch, device
        self.networks = nn.ModuleDict({"vae": vae.to(device)})

    def loss(self, step: int) -> Tensor:
        random = generator(self.name, step)
        images = pictures([scenes.random_scene(random) for _ in range(self.batch)], self.device)
        vae = self.networks["vae"]
        posterior = vae.encode(images).latent_dist
        noise = noise_of(random, posterior.mean.shape, self.device)
        found = vae.decode(posterior.mean + posterior.std * noise).sample
        difference = found - images
        slopes = sum(difference.diff(dim=axis).abs().mean() for axis in (2, 3))
        pixels = difference.abs().mean() + 4 * difference.square().mean()
        return pixels + 0.5 * slopes + 1e-5 * posterior.kl().mean() / images.shape[1]


class Judging:
    """Which things are where; what else there is to see of them is asked for in training alone."""

    name = "judge"

    def __init__(self, judge, batch: int, device: torch.device) -> None:
        self.batch, self.device = batch, device
        self.sizes = (len(COLOURS) + 1, len(SHAPES) + 1, len(RADII) + 1, len(FILLS) + 1)
        width = judge.config.hidden_size
        further = nn.Linear(width, len(PLACES) * sum(self.sizes) + len(BACKGROUNDS) + len(TEXTURES))
        self.networks = nn.ModuleDict({"judge": judge.to(device), "further": further.to(device)})

    def loss(self, step: int) -> Tensor:
        random = generator(self.name, step)
        drawn = [scenes.random_scene(random) for _ in range(self.batch)]
        images = blemished(pictures(drawn, self.device), random)
        out = self.networks["judge"](images, output_hidden_states=True)
        features = self.networks["judge"].vit.layernorm(out.hidden_states[-1])[:, 0]
        labels = torch.tensor([[label in scene.labels for label in LABELS] for scene in drawn], device=self.device)
        main = F.binary_cross_entropy_with_logits(out.logits, labels.float()) * len(LABELS) / 2
        return main + self._further(self.networks["further"](features), drawn)

    def _further(self, logits: Tensor, drawn: Sequence[Scene]) -> Tensor:
        *places, background, texture = logits.split(
            [*self.sizes * len(PLACES), len(BACKGROUNDS), len(TEXTURES)], dim=-1
        )
        targets = torch.tensor([_seen(scene) for scene in drawn], device=self.device)
        parts = [*places, background, texture]
        return sum(F.cross_entropy(part, targets[:, index]) for index, part in enumerate(parts)) / len(parts)


def _seen(scene: Scene) -> list[int]:
    at = {thing.place: thing for thing in scene.things}
    found: list[int] = []
    for place in PLACES:
        thing = at.get(place)
        if thing is None:
            found += [0] * 4
        else:
            kinds = (tuple(COLOURS), SHAPES, tuple(RADII), FILLS)
            said = (thing.colour, thing.shape, thing.size, thing.fill)
            found += [kind.index(each) + 1 for kind, each in zip(kinds, said, strict=True)]
    return [*found, tuple(BACKGROUNDS).index(scene.background), TEXTURES.index(scene.texture)]


def blemished(images: Tensor, random: np.random.Generator) -> Tensor:
    """A third as they are, the others with noise or blurred a little: denoisers do not draw as cleanly."""
    kinds = random.random(len(images))
    noise = noise_of(random, images.shape, images.device) * 0.08
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    kind = torch.from_numpy(kinds).to(images.device)[:, None, None, None]
    return torch.where(kind < 0.33, images, torch.where(kind < 0.67, (images + noise).clamp(-1, 1), soft))


# Denoisers


class Denoising:
    """What both teachers have in common: latents, text, and noise of a step.

    ``pool`` is the number of scenes to draw from, each with new texts and new noise every time: a third of a step on a
    CPU would otherwise go into drawing and encoding pictures.
    """

    def __init__(
        self, denoiser, vae: AutoencoderKL, encode, batch: int, device: torch.device, name: str, pool: int = 32768
    ) -> None:
        self.name, self.batch, self.device, self.pool = name, batch, device, pool
        self.vae, self.encode = vae.to(device).eval().requires_grad_(False), encode
        self.networks = nn.ModuleDict({"denoiser": denoiser.to(device)})

    @property
    def denoiser(self) -> nn.Module:
        return self.networks["denoiser"]

    def encoded(self, texts: list[str], random: np.random.Generator) -> Any:
        """The texts as the denoiser takes them."""
        return self.encode(texts)

    def drawn(self, step: int) -> tuple[Tensor, list[str], np.random.Generator]:
        """Latents of pictures, scaled to unit variance, and texts that belong to them."""
        random = generator(self.name, step)
        chosen = random.integers(self.pool, size=self.batch)
        known, latents = self._pool
        texts = [scenes.random_text(known[index], random) for index in chosen]
        return latents[torch.from_numpy(chosen).to(self.device)], texts, random

    @cached_property
    def _pool(self) -> tuple[list[Scene], Tensor]:
        random = generator("pool", 0)
        drawn = [scenes.random_scene(random) for _ in range(self.pool)]
        parts = [drawn[first : first + 64] for first in range(0, self.pool, 64)]
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            latents = torch.cat([self.vae.encode(pictures(part, self.device)).latent_dist.mean for part in parts])
        return drawn, latents * self.vae.config.scaling_factor


class Velocity(Denoising):
    """The UNet predicts v = sqrt(a) * noise - sqrt(1 - a) * latents, with a schedule that ends in pure noise."""

    def __init__(self, *args, scheduler: DDIMScheduler) -> None:
        super().__init__(*args)
        self.scheduler = scheduler

    def loss(self, step: int) -> Tensor:
        latents, texts, random = self.drawn(step)
        noise = noise_of(random, latents.shape, self.device)
        even = (np.arange(self.batch) + random.random()) / self.batch  # one timestep from each part of the range
        timesteps = torch.from_numpy((even * 1000).astype(np.int64)).to(self.device)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        target = self.scheduler.get_velocity(latents, noise, timesteps)
        found = self.denoiser(noisy, timesteps, self.encoded(texts, random)).sample
        return F.mse_loss(found, target)


class Flow(Denoising):
    """The transformer predicts noise - latents at (1 - s) * latents + s * noise, s as SD3 draws it."""

    def encoded(self, texts: list[str], random: np.random.Generator) -> tuple[Tensor, Tensor]:
        states, pooled = self.encode(texts)
        return with_silence(states, random), pooled

    def loss(self, step: int) -> Tensor:
        latents, texts, random = self.drawn(step)
        noise = noise_of(random, latents.shape, self.device)
        even = (random.permutation(self.batch) + random.random(self.batch)) / self.batch
        sigma = torch.special.expit(torch.special.ndtri(torch.from_numpy(even))).float().to(self.device)
        noisy = torch.lerp(latents, noise, sigma[:, None, None, None])
        text, pooled = self.encoded(texts, random)
        found = self.denoiser(noisy, text, pooled, 1000 * sigma).sample
        return F.mse_loss(found, noise - latents)


def with_silence(text: Tensor, random: np.random.Generator) -> Tensor:
    """The tokens of a text, and after them those of a T5 that says nothing: zeros, 1 to 256 of them, because the
    pipeline takes as many as its ``max_sequence_length``, and no number may matter. Mostly few: they cost time."""
    count = round(256 ** random.random() ** 4)
    return F.pad(text, (0, 0, 0, count))


def noise_of(random: np.random.Generator, shape: Sequence[int], device: torch.device | str) -> Tensor:
    return torch.from_numpy(random.standard_normal(tuple(shape), dtype=np.float32)).to(device)
