"""Students of few steps without guidance: each of their steps is what several guided steps of the teacher do.

A student draws from noise on its own path; at one of its steps it is asked for the velocity that takes it, in one step,
to where the teacher gets in ``SUBSTEPS`` steps with classifier-free guidance (progressive distillation, Salimans and Ho
2022, from the student's own states).
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import scenes
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from models import LATENT_CHANNELS, LATENT_SIZE
from objectives import Denoising, generator, noise_of, with_silence
from torch import Tensor, nn
from torch.nn import functional as F

STEPS = 4
SUBSTEPS = 4


class Student(Denoising):
    """``guidance`` is the teacher's. Times are pairs (timestep as the network takes it, where it is on the path)."""

    guidance: float

    def __init__(self, *args: Any, guidance: float) -> None:
        super().__init__(*args)
        self.guidance = guidance
        self.teacher = copy.deepcopy(self.denoiser).eval().requires_grad_(False)

    def loss(self, step: int) -> Tensor:
        random = generator(self.name, step)
        drawn = [scenes.random_scene(random) for _ in range(self.batch)]
        texts = [scenes.random_text(scene, random) for scene in drawn]
        now = int(random.integers(STEPS))
        times = self.times()
        with torch.no_grad():
            latents = noise_of(random, (self.batch, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE), self.device)
            said, unsaid = self.encoded(texts, random), self.encoded([""] * self.batch, random)
            for start, end in pairwise(times[: now + 1]):
                velocity = self.predict(self.denoiser, latents, start, said)
                latents = self.advance(latents, velocity, start, end)
            goal = latents
            between = self.between(times[now], times[now + 1])
            for start, end in pairwise(between):
                with_text, without = (self.predict(self.teacher, goal, start, each) for each in (said, unsaid))
                goal = self.advance(goal, torch.lerp(without, with_text, self.guidance), start, end)
            target = self.velocity(latents, goal, times[now], times[now + 1])
        return F.mse_loss(self.predict(self.denoiser, latents, times[now], said), target)

    def between(self, start: float, end: float) -> list[float]:
        return [start + (end - start) * part / SUBSTEPS for part in range(SUBSTEPS + 1)]

    @abstractmethod
    def times(self) -> Sequence[float]:
        """Where the student's steps begin, and the end."""

    @abstractmethod
    def predict(self, model: nn.Module, latents: Tensor, time: float, text: Any) -> Tensor: ...

    @abstractmethod
    def advance(self, latents: Tensor, velocity: Tensor, start: float, end: float) -> Tensor: ...

    @abstractmethod
    def velocity(self, latents: Tensor, goal: Tensor, start: float, end: float) -> Tensor:
        """The one with which :meth:`advance` leads from ``latents`` to ``goal``."""


class VelocityStudent(Student):
    """Of the UNet: DDIM steps, times are timesteps, -1 is the picture."""

    def __init__(self, *args: Any, scheduler: DDIMScheduler, guidance: float) -> None:
        super().__init__(*args, guidance=guidance)
        self.scheduler = scheduler

    def times(self) -> Sequence[float]:
        self.scheduler.set_timesteps(STEPS)
        return [*map(float, self.scheduler.timesteps), -1.0]

    def predict(self, model: nn.Module, latents: Tensor, time: float, text: Any) -> Tensor:
        return model(latents, torch.full((len(latents),), round(time), device=self.device), text).sample.float()

    def _parts(self, time: float) -> tuple[Tensor, Tensor]:
        index = round(time)
        share = self.scheduler.alphas_cumprod[index] if index >= 0 else torch.tensor(1.0)
        return share.sqrt(), (1 - share).sqrt()

    def _turn(self, start: float, end: float) -> tuple[Tensor, Tensor]:
        (signal, noise), (next_signal, next_noise) = self._parts(start), self._parts(end)
        return next_signal * signal + next_noise * noise, next_noise * signal - next_signal * noise

    def advance(self, latents: Tensor, velocity: Tensor, start: float, end: float) -> Tensor:
        kept, added = self._turn(start, end)
        return kept * latents + added * velocity

    def velocity(self, latents: Tensor, goal: Tensor, start: float, end: float) -> Tensor:
        kept, added = self._turn(start, end)
        return (goal - kept * latents) / added


class FlowStudent(Student):
    """Of the transformer: Euler steps, times are the scheduler's sigmas."""

    def __init__(self, *args: Any, scheduler: FlowMatchEulerDiscreteScheduler, guidance: float) -> None:
        super().__init__(*args, guidance=guidance)
        self.scheduler = scheduler

    def encoded(self, texts: list[str], random: np.random.Generator) -> tuple[Tensor, Tensor]:
        states, pooled = self.encode(texts)
        return with_silence(states, random), pooled

    def times(self) -> Sequence[float]:
        self.scheduler.set_timesteps(STEPS)
        return [*map(float, self.scheduler.sigmas)]

    def predict(self, model: nn.Module, latents: Tensor, time: float, text: Any) -> Tensor:
        states, pooled = text
        return model(
            latents, states, pooled, torch.full((len(latents),), 1000 * time, device=self.device)
        ).sample.float()

    def advance(self, latents: Tensor, velocity: Tensor, start: float, end: float) -> Tensor:
        return latents + (end - start) * velocity

    def velocity(self, latents: Tensor, goal: Tensor, start: float, end: float) -> Tensor:
        return (goal - latents) / (end - start)
