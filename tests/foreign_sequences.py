"""Denoisers that are not from diffusers: torch's own attention, one global function, video, sound and windows."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from tests.foreign import sinusoids

# torch's own module


class TorchBlock(nn.Module):
    def __init__(self, dim, context_dim):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, 2, batch_first=True)
        self.cross_attn = nn.MultiheadAttention(dim, 2, kdim=context_dim, vdim=context_dim, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x, context):
        h = self.norm1(x)
        x = x + self.self_attn(h, h, h, need_weights=False)[0]
        return x + self.cross_attn(self.norm2(x), context, context, need_weights=False)[0]


class TorchTransformer(nn.Module):
    def __init__(self, dim=16, context_dim=24):
        super().__init__()
        self.patch, self.time = nn.Conv2d(4, dim, 2, stride=2), nn.Linear(16, dim)
        self.blocks = nn.ModuleList(TorchBlock(dim, context_dim) for _ in range(2))
        self.out = nn.ConvTranspose2d(dim, 4, 2, stride=2)

    def forward(self, sample, timestep, context):
        h = self.patch(sample)
        tokens = h.flatten(2).mT + self.time(sinusoids(timestep, 16))[:, None]
        for block in self.blocks:
            tokens = block(tokens, context)
        return self.out(tokens.mT.unflatten(2, h.shape[-2:]))


# One global function for all attention, and a block that calls it twice


def optimized_attention(q, k, v, heads, mask=None):
    b, _, dim_head = q.shape
    dim_head //= heads
    q, k, v = (t.view(b, -1, heads, dim_head).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0, is_causal=False)
    return out.transpose(1, 2).reshape(b, -1, heads * dim_head)


class GlobalAttention(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x):
        return self.to_out(optimized_attention(self.to_q(x), self.to_k(x), self.to_v(x), 2))


class WholeBlock(nn.Module):
    """Self-attention and cross-attention in one forward."""

    def __init__(self, dim, context_dim):
        super().__init__()
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q, self.kv, self.cross_proj = nn.Linear(dim, dim), nn.Linear(context_dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, x, context, mask=None):
        q, k, v = self.qkv(F.layer_norm(x, x.shape[-1:])).chunk(3, dim=-1)
        x = x + self.proj(optimized_attention(q, k, v, heads=2))
        k, v = self.kv(context).chunk(2, dim=-1)
        return x + self.cross_proj(optimized_attention(self.q(x), k, v, heads=2, mask=mask))


class GlobalFunctionTransformer(nn.Module):
    def __init__(self, dim=16, context_dim=24):
        super().__init__()
        self.patch, self.time = nn.Conv2d(4, dim, 2, stride=2), nn.Linear(16, dim)
        self.first, self.block, self.last = GlobalAttention(dim), WholeBlock(dim, context_dim), GlobalAttention(dim)
        self.out = nn.ConvTranspose2d(dim, 4, 2, stride=2)

    def forward(self, x, timesteps, context):
        h = self.patch(x)
        tokens = rearrange(h, "b c h w -> b (h w) c") + self.time(sinusoids(timesteps, 16))[:, None]
        tokens = tokens + self.first(tokens)
        tokens = self.block(tokens, context)
        tokens = tokens + self.last(tokens)
        return self.out(rearrange(tokens, "b (h w) c -> b c h w", h=h.shape[2]))


# Video: the same weights attend within frames, then over frames


class PlainAttention(nn.Module):
    def __init__(self, dim, heads=2):
        super().__init__()
        self.heads = heads
        self.norm, self.to_qkv, self.to_out = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = rearrange(self.to_qkv(self.norm(x)), "b n (k h d) -> k b h n d", k=3, h=self.heads)
        return x + self.to_out(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))


class FactorisedVideoTransformer(nn.Module):
    def __init__(self, dim=16):
        super().__init__()
        self.proj_in, self.proj_out, self.time = nn.Conv3d(4, dim, 1), nn.Conv3d(dim, 4, 1), nn.Linear(16, dim)
        self.blocks = nn.ModuleList(PlainAttention(dim) for _ in range(2))

    def forward(self, video, timestep):
        t, h, w = video.shape[2:]
        x = self.proj_in(video) + self.time(sinusoids(timestep, 16))[..., None, None, None]
        for block in self.blocks:
            x = block(rearrange(x, "b c t h w -> (b t) (h w) c"))
            x = block(rearrange(x, "(b t) (h w) c -> (b h w) t c", t=t, h=h))
            x = rearrange(x, "(b h w) t c -> b c t h w", h=h, w=w)
        return self.proj_out(x)


# Sound: a U-Net of one dimension


class SoundUNet(nn.Module):
    def __init__(self, dim=16, context_dim=24):
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv1d(2, dim, 3, padding=1), nn.Conv1d(2 * dim, 2, 3, padding=1)
        self.time, self.context = nn.Linear(16, dim), nn.Linear(context_dim, 2 * dim)
        self.down = nn.Conv1d(dim, dim, 3, stride=2, padding=1)
        self.shallow, self.deep, self.query = PlainAttention(dim), PlainAttention(dim), nn.Linear(dim, dim)

    def forward(self, waveform, timestep, context):
        h = self.conv_in(waveform) + self.time(sinusoids(timestep, 16))[..., None]
        skip = self.shallow(h.mT).mT
        deep = self.deep(self.down(skip).mT)
        k, v = self.context(context)[:, None].chunk(2, dim=-1)
        deep = deep + F.scaled_dot_product_attention(self.query(deep)[:, None], k, v).squeeze(1)
        return self.conv_out(torch.cat([F.interpolate(deep.mT, size=skip.shape[-1:]), skip], dim=1))


# Windows, every other time shifted by half a window, with a bias for each pair of places in a window


class WindowAttention(nn.Module):
    def __init__(self, dim, window, shift, heads=2):
        super().__init__()
        self.window, self.shift, self.heads, self.scale = window, shift, heads, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.zeros(heads, window**2, window**2))

    def partition(self, x):
        x = x.view(x.shape[0], x.shape[1] // self.window, self.window, x.shape[2] // self.window, self.window, -1)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, self.window**2, x.shape[-1])

    def mask(self, rows, columns):
        """0 between tokens that were neighbours before the shift, minus infinity between others."""
        region = torch.zeros(1, rows, columns, 1)
        region[:, -self.shift :] += 1
        region[:, :, -self.shift :] += 2
        region = self.partition(region).squeeze(-1)
        return torch.where(region[:, None] == region[:, :, None], 0.0, float("-inf"))

    def forward(self, x):
        batch, rows, columns, dim = x.shape
        h = torch.roll(x, (-self.shift, -self.shift), (1, 2)) if self.shift else x
        h = self.partition(F.layer_norm(h, (dim,)))
        q, k, v = self.qkv(h).reshape(*h.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attn = (q * self.scale) @ k.transpose(-2, -1) + self.bias
        if self.shift:
            mask = self.mask(rows, columns)
            attn = attn.view(batch, len(mask), *attn.shape[1:]) + mask[:, None]
            attn = attn.view(-1, *attn.shape[2:])
        h = self.proj((attn.softmax(dim=-1) @ v).transpose(1, 2).reshape(h.shape))
        h = h.view(batch, rows // self.window, columns // self.window, self.window, self.window, dim)
        h = h.permute(0, 1, 3, 2, 4, 5).reshape(x.shape)
        return x + (torch.roll(h, (self.shift, self.shift), (1, 2)) if self.shift else h)


class WindowTransformer(nn.Module):
    def __init__(self, dim=16):
        super().__init__()
        self.proj_in, self.proj_out, self.time = nn.Conv2d(4, dim, 1), nn.Conv2d(dim, 4, 1), nn.Linear(16, dim)
        self.layers = nn.ModuleList(WindowAttention(dim, 3, shift) for shift in (0, 1))

    def forward(self, x, t):
        h = (self.proj_in(x) + self.time(sinusoids(t, 16))[..., None, None]).permute(0, 2, 3, 1)
        for layer in self.layers:
            h = layer(h)
        return self.proj_out(h.permute(0, 3, 1, 2))
