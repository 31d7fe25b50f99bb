"""Denoisers of a few lines; of the first, everything in front of its one attention is a function: a line per idiom."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import sloth_fx
from sloth_fx.report import SiteReport

TEXT = 4  # channels of text


class Attention(nn.Module):
    """Of (B, N, C) to (B, M, C), with two heads."""

    def forward(self, query, key=None):
        both = (each @ torch.eye(each.shape[-1]) for each in (query, query if key is None else key))
        query, key = (each.unflatten(-1, (2, -1)).transpose(1, 2) for each in both)
        return F.scaled_dot_product_attention(query, key, key).transpose(1, 2).flatten(2)


class Denoiser(nn.Module):
    """``way(model, sample, text)`` calls ``model.attention`` on tokens; ``layers`` are what it needs besides."""

    def __init__(self, way: Callable[..., Any], layers: dict[str, nn.Module] | None = None) -> None:
        super().__init__()
        self.way, self.attention = way, Attention()
        for name, layer in (layers or {}).items():
            self.add_module(name, layer)

    def forward(self, sample, text=None):
        return self.way(self, sample, text)


class Stack(nn.Module):
    """Self-attention and cross-attention by turns, at one scale."""

    def __init__(self, blocks):
        super().__init__()
        self.own, self.cross = (nn.ModuleList(Attention() for _ in range(blocks)) for _ in range(2))

    def forward(self, sample, text):
        x = tokens_of(sample)
        for own, cross in zip(self.own, self.cross, strict=True):
            x = cross(own(x), text)
        return x


def tokens_of(x):
    """(B, C, ...) to (B, N, C)."""
    return x.flatten(2).mT


def sites(way: Callable[..., Any], sample: tuple[int, ...], text: int = 0, **layers: nn.Module) -> list[SiteReport]:
    """What is found with a latent of this shape, and ``text`` tokens."""
    values = {"sample": torch.zeros(sample)}
    if text:
        values["text"] = torch.zeros(sample[0], text, TEXT)
    return list(sloth_fx.inspect(Denoiser(way, layers), example_inputs=values))


def only(way: Callable[..., Any], sample: tuple[int, ...], text: int = 0, **layers: nn.Module) -> SiteReport:
    """The one site of such a model."""
    [site] = sites(way, sample, text, **layers)
    return site
