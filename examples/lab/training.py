"""A training loop that can be stopped at any time and goes on where it was, to the same end."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

_fused = F.scaled_dot_product_attention

SAVE_SECONDS = 120
LOG_STEPS = 50


class Objective(Protocol):
    """What is trained, and on what. ``loss`` of step ``i`` depends on ``i`` and the weights alone."""

    networks: nn.ModuleDict

    def loss(self, step: int) -> torch.Tensor: ...


@dataclass
class Loop:
    """``steps`` of AdamW, in bfloat16 where autocast sees to it, with warm-up, a constant rate, and a linear decay over
    the last fifth; and the mean of the weights over the last steps, which is what the training is for.

    Everything is kept in ``folder``: ``state.pt``, from which another run goes on, and ``log.json``.
    """

    folder: Path
    steps: int
    learning_rate: float
    warmup: int = 300
    decay: float = 0.2
    mean_over: float = 0.999
    weight_decay: float = 0.01
    log: list[dict[str, float]] = field(default_factory=list)

    def run(self, objective: Objective, *, minutes: float = math.inf, name: str = "") -> bool:
        """Train until the end (True) or for so many minutes (False)."""
        networks = objective.networks
        mean = {key: value.detach().clone() for key, value in networks.state_dict().items()}
        optimizer = torch.optim.AdamW(
            [each for each in networks.parameters() if each.requires_grad],
            lr=self.learning_rate,
            weight_decay=self.weight_decay,
            betas=(0.9, 0.98),
        )
        first = self._resume(networks, optimizer, mean)
        device = next(networks.parameters()).device.type
        began = saved = time.monotonic()
        losses: list[float] = []
        with tqdm(total=self.steps, initial=first, desc=name, unit="step", smoothing=0.02) as bar:
            for step in range(first, self.steps):
                for group in optimizer.param_groups:
                    group["lr"] = self.learning_rate * self._share(step)
                with torch.autocast(device, torch.bfloat16), attention_for_training(device):
                    loss = objective.loss(step)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
                optimizer.step()
                self._follow(mean, networks, step)
                losses.append(loss.item())
                bar.update()
                now = time.monotonic()
                if (step + 1) % LOG_STEPS == 0:
                    average = sum(losses) / len(losses)
                    self.log.append({"step": step + 1, "loss": round(average, 5)})
                    bar.set_postfix_str(f"loss {average:.4f}")
                    losses.clear()
                if now - saved > SAVE_SECONDS or step + 1 == self.steps or now - began > 60 * minutes:
                    self._save(step + 1, networks, optimizer, mean)
                    saved = now
                if now - began > 60 * minutes and step + 1 < self.steps:
                    return False
        networks.load_state_dict(mean)
        return True

    def _share(self, step: int) -> float:
        rest = (self.steps - step) / (self.decay * self.steps)
        return min(1.0, (step + 1) / self.warmup, rest)

    def _follow(self, mean: dict[str, torch.Tensor], networks: nn.Module, step: int) -> None:
        weight = 1 - min(self.mean_over, (step + 1) / (step + 10))
        with torch.no_grad():
            for key, value in networks.state_dict().items():
                if value.is_floating_point():
                    mean[key].lerp_(value, weight)
                else:
                    mean[key].copy_(value)

    def _save(
        self, step: int, networks: nn.Module, optimizer: torch.optim.Optimizer, mean: dict[str, torch.Tensor]
    ) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {"step": step, "networks": networks.state_dict(), "optimizer": optimizer.state_dict(), "mean": mean}
        torch.save(state, self.folder / "state.new")
        (self.folder / "state.new").replace(self.folder / "state.pt")
        (self.folder / "log.json").write_text(json.dumps(self.log), encoding="utf-8")

    def _resume(self, networks: nn.Module, optimizer: torch.optim.Optimizer, mean: dict[str, torch.Tensor]) -> int:
        path = self.folder / "state.pt"
        if not path.exists():
            return 0
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location=next(networks.parameters()).device)
        networks.load_state_dict(state["networks"])
        optimizer.load_state_dict(state["optimizer"])
        for key, value in state["mean"].items():
            mean[key].copy_(value)
        self.log[:] = json.loads((self.folder / "log.json").read_text(encoding="utf-8"))
        return int(state["step"])


@contextmanager
def attention_for_training(device: str) -> Iterator[None]:
    """On a CPU attention is spelled out: the fused kernel's backward pass takes a third of a training step."""
    if device != "cpu":
        yield
        return
    with patch.object(F, "scaled_dot_product_attention", _spelled):
        yield


def _spelled(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    mask, scale = options.get("attn_mask"), options.get("scale") or query.shape[-1] ** -0.5
    if mask is not None or options.get("is_causal") or options.get("dropout_p"):
        return _fused(query, key, value, **options)
    weights = (query * scale @ key.mT).softmax(-1, dtype=query.dtype)
    return weights @ value


def mean_weights(folder: Path, networks: nn.Module) -> int:
    """Load the mean weights of a run, finished or not, into ``networks``; returns the step."""
    state = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
    networks.load_state_dict(state["mean"])
    return int(state["step"])
