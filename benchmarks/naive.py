"""The same formulas as attention processors of diffusers, written in the obvious way: what the benchmarks compare with.

They follow the nodes' way of working (docs/specs.md has the formulas): stride and grid are worked out at every call,
keys and values are reduced apart, both kinds of sample are always computed, the grid is padded with zeros, and the
global samples are repeated for every tile before they are projected.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sloth_fx
from sloth_fx.report import SiteReport


def finish(attn: Any, out: Tensor, residual: Tensor) -> Tensor:
    """What diffusers' processor does behind the attention."""
    out = attn.to_out[1](attn.to_out[0](out))
    if attn.residual_connection:
        out = out + residual
    return out / attn.rescale_output_factor


def heads(attn: Any, tokens: Tensor) -> Tensor:
    return tokens.view(tokens.shape[0], -1, attn.heads, tokens.shape[-1] // attn.heads).transpose(1, 2)


def joined(out: Tensor) -> Tensor:
    return out.transpose(1, 2).reshape(out.shape[0], out.shape[2], -1)


@dataclass
class Node:
    """The parameters of a node of 2023-12-16, and the moment."""

    latent: tuple[int, int]
    first_channels: int  # at the shallowest attention
    progress: float = 0.4
    slothful: tuple[float, float] = (6.0, 4.0)  # in, out
    blend: float = 0.0
    depth_decay: float = 2.0
    peak_time: float = 0.4
    time_decay: float = 2.0
    tile: tuple[float, float] | None = None  # base, peak
    global_ratio: tuple[float, float] = (0.0, 0.0)
    max_depth: int = 2
    tokens: dict[str, Tensor] = field(default_factory=dict)  # reduced ones, by name of the site
    given: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # the keys and values that they make

    @property
    def time_ratio(self) -> float:
        return math.exp(-(((self.progress - self.peak_time) * self.time_decay) ** 2))

    def stride(self, stage: str, channels: int) -> float:
        if stage == "middle":
            return 1.0
        rate = self.slothful[stage == "out"]
        # channels double with every level, so this is (downscale of the shallowest level / downscale here)
        return rate * self.time_ratio * (self.first_channels / channels) ** self.depth_decay

    def grid(self, tokens: int) -> tuple[int, int]:
        rows, columns = self.latent
        while rows * columns > tokens:
            rows, columns = -(-rows // 2), -(-columns // 2)
        return rows, columns

    def tiles(self, grid: tuple[int, int]) -> tuple[int, int]:
        """How many tiles, along rows and columns."""
        if self.tile is None or self.latent[0] / grid[0] > 2 ** (self.max_depth - 1):
            return 1, 1
        base, peak = self.tile
        size = round(base + (peak - base) * self.time_ratio)
        return math.ceil(grid[0] / size), math.ceil(grid[1] / size)

    @property
    def samples_per_tile(self) -> float:
        base, peak = self.global_ratio
        return base + (peak - base) * self.time_ratio


def split(stride: float, size: tuple[int, int], long_axis: str) -> tuple[int, int]:
    """Strides (rows, columns)."""
    long = math.ceil(math.sqrt(max(stride, 1)))
    short = math.ceil(max(stride, 1) / long)
    rows, columns = (long, short) if long_axis == "y" else (short, long)
    return min(rows, size[0]), min(columns, size[1])


def sampled(
    tokens: Tensor, grid: tuple[int, int], window: tuple[int, int], stride: tuple[int, int], blend: float
) -> Tensor:
    """(B, N, C) -> (B, M, C)."""
    image = tokens.transpose(1, 2).reshape(tokens.shape[0], -1, *grid)
    one = F.avg_pool2d(image, 1, stride)
    pool = F.avg_pool2d(image, window, stride)
    one = one[:, :, : pool.shape[2], : pool.shape[3]]
    return ((1 - blend) * one + blend * pool).flatten(2).transpose(1, 2)


class Naive:
    """Reduction, tiles, or both, at one site."""

    def __init__(self, node: Node, name: str) -> None:
        self.node = node
        self.name = name
        self.stage = {"down": "in", "mid": "middle"}.get(name.split("_")[0], "out")

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *_: Any, **__: Any
    ) -> Tensor:
        node, residual = self.node, hidden_states
        grid = node.grid(hidden_states.shape[1])
        stride = node.stride(self.stage, hidden_states.shape[-1])
        tiles = node.tiles(grid)
        if tiles == (1, 1):
            return finish(attn, self.attend(attn, hidden_states, *self.reduced(hidden_states, grid, stride)), residual)
        return finish(attn, self.in_tiles(attn, hidden_states, grid, tiles, stride), residual)

    def reduced(self, tokens: Tensor, grid: tuple[int, int], stride: float) -> tuple[Tensor, Tensor]:
        if stride <= 1:
            return tokens, tokens
        window = split(stride, grid, "y")
        keys, values = (sampled(tokens, grid, window, window, self.node.blend) for _ in range(2))
        return keys, values

    def attend(self, attn: Any, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        query, key = heads(attn, attn.to_q(queries)), heads(attn, attn.to_k(keys))
        value = heads(attn, attn.to_v(values))
        return joined(F.scaled_dot_product_attention(query, key, value))

    def in_tiles(
        self, attn: Any, tokens: Tensor, grid: tuple[int, int], tiles: tuple[int, int], stride: float
    ) -> Tensor:
        (rows, columns), (ty, tx), node = grid, tiles, self.node
        th, tw = math.ceil(rows / ty), math.ceil(columns / tx)
        image = tokens.unflatten(1, grid)
        padded = F.pad(image, (0, 0, 0, tx * tw - columns, 0, ty * th - rows))
        cut = padded.unflatten(2, (tx, tw)).unflatten(1, (ty, th)).transpose(2, 3).flatten(3, 4).flatten(0, 2)
        window = split(stride, (th, tw), "y")
        apart = max(1, stride) * ty * tx / node.samples_per_tile
        far_stride = split(apart, grid, "y" if any(node.slothful) else "x")  # the two nodes differ here
        both = []
        for _ in range(2):  # keys, values
            near = sampled(cut, (th, tw), window, window, node.blend) if stride > 1 else cut
            far = sampled(tokens, grid, window if stride > 1 else (1, 1), far_stride, node.blend)
            both.append(torch.cat([near, far.repeat_interleave(ty * tx, 0)], 1))
        out = self.attend(attn, cut, *both).unflatten(0, (-1, ty, tx)).unflatten(3, (th, tw))
        return out.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :rows, :columns].flatten(1, 2)


class Given:
    """The ideal: where keys and values are reduced, they are there already. Only queries, attention and output cost."""

    def __init__(self, node: Node, name: str) -> None:
        self.given = node.given.get(name)

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *_: Any, **__: Any
    ) -> Tensor:
        query = heads(attn, attn.to_q(hidden_states))
        key, value = self.key_value(attn, hidden_states)
        return finish(attn, joined(F.scaled_dot_product_attention(query, key, value)), hidden_states)

    def key_value(self, attn: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.given or (heads(attn, attn.to_k(tokens)), heads(attn, attn.to_v(tokens)))


class GivenTokens(Given):
    """The reduced tokens are there already, one tensor for keys and values; their projections cost."""

    def __init__(self, node: Node, name: str) -> None:
        self.tokens = node.tokens.get(name)

    def key_value(self, attn: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
        tokens = tokens if self.tokens is None else self.tokens
        return heads(attn, attn.to_k(tokens)), heads(attn, attn.to_v(tokens))


def with_processors(model: Any, make: Callable[[Node, str], Any], node: Node) -> nn.Module:
    """Give the self-attentions of ``model`` (which is changed) processors of a node."""
    processors = {
        name: make(node, name) if name.split(".")[-2] == "attn1" else processor
        for name, processor in model.attn_processors.items()
    }
    model.set_attn_processor(processors)
    return model


def self_attentions(patched: nn.Module) -> list[SiteReport]:
    return [each for each in sloth_fx.report(patched) if each.kind == "self"]


def first_channels(patched: nn.Module) -> int:
    """Channels of the shallowest self-attention."""
    shallowest = min(self_attentions(patched), key=lambda site: site.depth)
    return shallowest.heads * shallowest.head_dim


def give(node: Node, model: nn.Module, patched: nn.Module, like: Tensor) -> None:
    """Make what :class:`Given` and :class:`GivenTokens` give, of random tokens in the batch and dtype of a latent."""
    for site in self_attentions(patched):
        attn, name = model.get_submodule(site.path), f"{site.path}.processor"
        grid, channels = site.grid_at(node.latent), site.heads * site.head_dim
        processor = Naive(node, name)
        stride = node.stride(processor.stage, channels)
        if grid is not None and stride > 1:
            tokens = torch.randn(like.shape[0], math.prod(grid), channels, device=like.device).to(like.dtype)
            keys, values = processor.reduced(tokens, grid, stride)
            node.tokens[name] = keys.contiguous()
            node.given[name] = heads(attn, attn.to_k(keys)), heads(attn, attn.to_v(values))
