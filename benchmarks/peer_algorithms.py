"""ToDo, HyperTile and ToMe as published, the naive way and the limit, as attention processors of diffusers.

They follow the published formulas, at the shallowest attention level: they count levels from the latent, which would
leave SDXL alone, so here they are told where to act.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from naive import Naive, Node, finish, heads, joined
from torch import Tensor, nn

from sloth_fx.report import SiteReport


class NotApplicableError(Exception):
    """Why an algorithm has no place in a model."""


class Algorithm(Protocol):
    """What becomes of the image tokens of one self-attention."""

    def split(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What queries, keys and values are projected from; (B, N, C) each, and N and B may differ."""

    def join(self, out: Tensor) -> Tensor:
        """The output of the attention, back on the image tokens."""


@dataclass(frozen=True)
class OneKey:
    """The limit: nothing but queries and output costs anything."""

    def split(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        key = tokens[:, :1]
        return tokens, key, key

    def join(self, out: Tensor) -> Tensor:
        return out


@dataclass(frozen=True)
class ToDo:
    """Token Downsampling: keys and values of an image that is smaller by ``factor``, nearest; all queries."""

    grid: tuple[int, int]
    factor: int

    def split(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image = tokens.unflatten(1, self.grid).permute(0, 3, 1, 2)
        small = F.interpolate(image, size=[edge // self.factor for edge in self.grid], mode="nearest")
        keys = small.flatten(2).transpose(1, 2)
        return tokens, keys, keys

    def join(self, out: Tensor) -> Tensor:
        return out


@dataclass(frozen=True)
class HyperTile:
    """Tiles whose size is the first divisor of the grid from ``least`` tokens on, as with a swap_size of 1."""

    grid: tuple[int, int]
    least: int = 32  # 256 pixels

    def split(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (rows, columns), (th, tw) = self.grid, map(self._size, self.grid)
        tiles = tokens.unflatten(1, (rows // th, th, columns // tw, tw)).transpose(2, 3).flatten(3, 4).flatten(0, 2)
        return tiles, tiles, tiles

    def join(self, out: Tensor) -> Tensor:
        (rows, columns), (th, tw) = self.grid, map(self._size, self.grid)
        tiles = out.unflatten(0, (-1, rows // th, columns // tw)).unflatten(3, (th, tw))
        return tiles.transpose(2, 3).flatten(1, 4)

    def _size(self, length: int) -> int:
        return next((size for size in range(self.least, length) if length % size == 0), length)


@dataclass(frozen=True)
class Pooled:
    """Slothful Attention as `naive.Naive` does it, for joint attention."""

    naive: Naive
    grid: tuple[int, int]

    def split(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        stride = self.naive.node.stride(self.naive.stage, tokens.shape[-1])
        return tokens, *self.naive.reduced(tokens, self.grid, stride)

    def join(self, out: Tensor) -> Tensor:
        return out


class SelfAttention:
    """A processor for self-attention."""

    def __init__(self, algorithm: Algorithm) -> None:
        self.algorithm = algorithm

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *_: Any, **__: Any
    ) -> Tensor:
        query, key, value = projected(attn, *self.algorithm.split(hidden_states))
        out = self.algorithm.join(joined(F.scaled_dot_product_attention(query, key, value)))
        return finish(attn, out, hidden_states)


class JointAttention:
    """A processor for the joint attention of SD3: the algorithm sees the image tokens, and text is as ever."""

    def __init__(self, algorithm: Algorithm) -> None:
        self.algorithm = algorithm

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        image = projected(attn, *self.algorithm.split(hidden_states))
        to_text = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text = [heads(attn, project(encoder_hidden_states)) for project in to_text]
        query, key, value = (torch.cat(pair, 2) for pair in zip(image, text, strict=True))
        out = joined(F.scaled_dot_product_attention(query, key, value))
        of_image, of_text = out.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], 1)
        of_image = attn.to_out[1](attn.to_out[0](self.algorithm.join(of_image)))
        return of_image, of_text if attn.context_pre_only else attn.to_add_out(of_text)


def projected(attn: Any, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return heads(attn, attn.to_q(queries)), heads(attn, attn.to_k(keys)), heads(attn, attn.to_v(values))


def is_joint(attn: Any) -> bool:
    return getattr(attn, "add_q_proj", None) is not None


def grid_of(site: SiteReport, latent: tuple[int, int]) -> tuple[int, int]:
    grid = site.grid_at(latent)
    if grid is None:
        raise NotApplicableError(f"the grid of its {site.q_tokens} tokens is not known")
    rows, columns = grid[-2:]
    return rows, columns


def with_algorithm(
    model: Any, sites: Sequence[SiteReport], make: Callable[[SiteReport], Algorithm], *, shallowest: bool = True
) -> nn.Module:
    """Give the self-attentions of ``model`` (which is changed) an algorithm: all of them, or the shallowest only."""
    processors = dict(model.attn_processors)
    for site in sites:
        if site.depth == 1 or not shallowest:
            kind = JointAttention if is_joint(model.get_submodule(site.path)) else SelfAttention
            processors[f"{site.path}.processor"] = kind(make(site))
    model.set_attn_processor(processors)
    return model


def hyper_tiled(model: nn.Module, sites: Sequence[SiteReport], latent: tuple[int, int]) -> nn.Module:
    if any(is_joint(model.get_submodule(site.path)) for site in sites):
        raise NotApplicableError("published for self-attention alone, not joined with text")
    return with_algorithm(model, sites, lambda site: HyperTile(grid_of(site, latent)))


def naive(model: Any, sites: Sequence[SiteReport], node: Node) -> nn.Module:
    """Give the self-attentions of ``model`` (which is changed) the processors of naive.py."""
    processors = dict(model.attn_processors)
    for site in sites:
        name = f"{site.path}.processor"
        processors[name] = processor = Naive(node, name)
        # Only UNets tell the stage by their names; Near-sighted Attention does not spare the middle block.
        processor.stage = "in" if site.stage == "middle" and node.tile is not None else site.stage
        if is_joint(model.get_submodule(site.path)):
            if node.tile is not None:
                raise NotApplicableError("naive.py has no tiles joined with text")
            processors[name] = JointAttention(Pooled(processor, grid_of(site, node.latent)))
    model.set_attn_processor(processors)
    return model


def tomesd_merged(model: nn.Module, sites: Sequence[SiteReport], latent: tuple[int, int], mode: str) -> nn.Module:
    """tomesd's own patch, with its defaults, on the shallowest level; ``model`` is changed."""
    if type(model).__name__ != "UNet2DConditionModel":
        raise NotApplicableError("tomesd's block is that of UNets")
    if mode == "compiled blocks":
        raise NotApplicableError("tomesd renames the blocks, so compile_repeated_blocks does not find them")
    import tomesd

    downsample = min(round(math.prod(latent) ** 0.5 / math.prod(grid_of(site, latent)) ** 0.5) for site in sites)
    return tomesd.apply_patch(model, ratio=0.5, max_downsample=downsample)
