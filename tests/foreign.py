"""Denoisers that are not from diffusers, each written in the manner of another code base: images.

What they hide: einops, einsum and softmax written out; heads folded into the batch, a scale on query and key; packed
projections; functions instead of modules; torch's own attention module; one global attention function for all.
:mod:`tests.foreign_sequences` has video, sound and windows.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn


def sinusoids(timestep: Tensor, dim: int) -> Tensor:
    """(B,) -> (B, dim)."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=timestep.device) / (dim // 2))
    angles = timestep.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


# The first latent diffusion models: einops, einsum, softmax


class LatentCrossAttention(nn.Module):
    def __init__(self, dim, context_dim=None, heads=2, dim_head=8):
        super().__init__()
        inner = heads * dim_head
        self.scale, self.heads = dim_head**-0.5, heads
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k = nn.Linear(context_dim or dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim or dim, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, dim), nn.Dropout(0.0))

    def forward(self, x, context=None):
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (rearrange(t, "b n (h d) -> (b h) n d", h=self.heads) for t in (q, k, v))
        sim = torch.einsum("b i d, b j d -> b i j", q, k) * self.scale
        attn = sim.softmax(dim=-1)
        out = torch.einsum("b i j, b j d -> b i d", attn, v)
        return self.to_out(rearrange(out, "(b h) n d -> b n (h d)", h=self.heads))


class GEGLU(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.proj, self.out = nn.Linear(dim, 4 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return self.out(x * F.gelu(gate))


class SpatialTransformer(nn.Module):
    def __init__(self, channels, context_dim):
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.proj_in, self.proj_out = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.attn1, self.attn2 = LatentCrossAttention(channels), LatentCrossAttention(channels, context_dim)
        self.ff = GEGLU(channels)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))

    def forward(self, x, context):
        h = rearrange(self.proj_in(self.norm(x)), "b c h w -> b (h w) c")
        h = self.attn1(self.norm1(h)) + h
        h = self.attn2(self.norm2(h), context=context) + h
        h = self.ff(self.norm3(h)) + h
        return x + self.proj_out(rearrange(h, "b (h w) c -> b c h w", h=x.shape[2], w=x.shape[3]))


class ResBlock(nn.Module):
    def __init__(self, channels_in, channels, emb_dim=16):
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(4, channels_in), nn.SiLU(), nn.Conv2d(channels_in, channels, 3, padding=1)
        )
        self.emb = nn.Linear(emb_dim, channels)
        self.skip = nn.Conv2d(channels_in, channels, 1)

    def forward(self, x, emb):
        return self.skip(x) + self.in_layers(x) + self.emb(emb)[..., None, None]


class LatentUNet(nn.Module):
    def __init__(self, context_dim=24):
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)
        self.time_embed = nn.Sequential(nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 16))
        self.input_block, self.input_attn = ResBlock(16, 16), SpatialTransformer(16, context_dim)
        self.down = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.middle_block, self.middle_attn = ResBlock(16, 16), SpatialTransformer(16, context_dim)
        self.output_block, self.output_attn = ResBlock(32, 16), SpatialTransformer(16, context_dim)

    def forward(self, x, timesteps, context):
        emb = self.time_embed(sinusoids(timesteps, 16))
        skip = self.input_attn(self.input_block(self.conv_in(x), emb), context)
        h = self.middle_attn(self.middle_block(self.down(skip), emb), context)
        h = torch.cat([F.interpolate(h, size=skip.shape[2:], mode="nearest"), skip], dim=1)
        return self.conv_out(self.output_attn(self.output_block(h, emb), context))


# Before latents: convolutions for q, k and v, heads folded into the batch, a scale on both sides


class QKVAttention(nn.Module):
    def __init__(self, n_heads):
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv):
        bs, width, length = qkv.shape
        ch = width // (3 * self.n_heads)
        q, k, v = qkv.chunk(3, dim=1)
        scale = 1 / math.sqrt(math.sqrt(ch))
        weight = torch.einsum(
            "bct,bcs->bts",
            (q * scale).view(bs * self.n_heads, ch, length),
            (k * scale).view(bs * self.n_heads, ch, length),
        )
        weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
        a = torch.einsum("bts,bcs->bct", weight, v.reshape(bs * self.n_heads, ch, length))
        return a.reshape(bs, -1, length)


class AttentionBlock(nn.Module):
    def __init__(self, channels, heads=2):
        super().__init__()
        self.norm, self.qkv = nn.GroupNorm(4, channels), nn.Conv1d(channels, 3 * channels, 1)
        self.attention, self.proj_out = QKVAttention(heads), nn.Conv1d(channels, channels, 1)

    def forward(self, x):
        b, c, *spatial = x.shape
        x = x.reshape(b, c, -1)
        return (x + self.proj_out(self.attention(self.qkv(self.norm(x))))).reshape(b, c, *spatial)


class PixelUNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.time_embed = nn.Linear(16, 16)
        self.input_blocks = nn.ModuleList([nn.Conv2d(3, 16, 3, padding=1), ResBlock(16, 16), AttentionBlock(16)])
        self.pool, self.middle = nn.AvgPool2d(2, ceil_mode=True), nn.ModuleList([ResBlock(16, 16), AttentionBlock(16)])
        self.output_blocks = nn.ModuleList([ResBlock(32, 16), AttentionBlock(16), ResBlock(32, 16)])
        self.out = nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 3, 3, padding=1))

    def forward(self, x, timesteps):
        emb, h, hs = self.time_embed(sinusoids(timesteps, 16)), x, []
        for block in self.input_blocks:
            h = block(h, emb) if isinstance(block, ResBlock) else block(h)
            hs.append(h)
        h = self.middle[1](self.middle[0](self.pool(h), emb))
        h = F.interpolate(h, size=hs[-1].shape[2:])
        for block in self.output_blocks:
            h = block(torch.cat([h, hs.pop()], dim=1), emb) if isinstance(block, ResBlock) else block(h)
        return self.out(h)


# A transformer of the first kind: one projection for q, k and v, a product with @, modulation by the timestep


class PackedAttention(nn.Module):
    def __init__(self, dim, num_heads=2):
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = nn.LayerNorm(dim // num_heads), nn.LayerNorm(dim // num_heads)

    def forward(self, x):
        B, N, C = x.shape  # noqa: N806
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        attn = (q * self.scale) @ k.transpose(-2, -1)
        x = attn.softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class ModulatedBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.attn, self.adaln = PackedAttention(dim), nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(approximate="tanh"), nn.Linear(2 * dim, dim))

    def forward(self, x, c):
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.adaln(c).unsqueeze(1).chunk(6, dim=-1)
        x = x + gate * self.attn(self.norm1(x) * (1 + scale) + shift)
        return x + gate_mlp * self.mlp(self.norm2(x) * (1 + scale_mlp) + shift_mlp)


class ClassTransformer(nn.Module):
    def __init__(self, dim=16):
        super().__init__()
        self.x_embedder, self.y_embedder = nn.Conv2d(4, dim, 2, stride=2), nn.Embedding(10, dim)
        self.t_embedder = nn.Linear(dim, dim)
        self.blocks = nn.ModuleList(ModulatedBlock(dim) for _ in range(2))
        self.final_layer = nn.Linear(dim, 2 * 2 * 4)

    def forward(self, x, t, y):
        h = self.x_embedder(x)
        rows, columns = h.shape[-2:]
        places = repeat(sinusoids(torch.arange(rows), 16), "h c -> (h w) c", w=columns)
        x = (
            h.flatten(2).transpose(1, 2)
            + places
            + repeat(sinusoids(torch.arange(columns), 16), "w c -> (h w) c", h=rows)
        )
        c = self.t_embedder(sinusoids(t, 16)) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x).reshape(x.shape[0], rows, columns, 2, 2, 4)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(x.shape[0], 4, 2 * rows, 2 * columns)


# Two streams, functions instead of modules, and one rotation matrix for each pair of channels


def rope(pos, dim):
    omega = 100.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.einsum("...n,d->...nd", pos, omega)
    out = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], dim=-1)
    return rearrange(out, "b n d (i j) -> b n d i j", i=2, j=2).float()


def apply_rope(x, pe):
    x_ = x.float().reshape(*x.shape[:-1], -1, 1, 2)
    return (pe[..., 0] * x_[..., 0] + pe[..., 1] * x_[..., 1]).reshape(*x.shape).type_as(x)


def attention(q, k, v, pe):
    x = F.scaled_dot_product_attention(apply_rope(q, pe), apply_rope(k, pe), v)
    return rearrange(x, "B H L D -> B L (H D)")


def split_heads(qkv):
    return rearrange(qkv, "B L (K H D) -> K B H L D", K=3, H=2)


class DoubleStreamBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.img_qkv, self.img_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.txt_qkv, self.txt_proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, img, txt, vec, pe):
        img_q, img_k, img_v = split_heads(self.img_qkv(F.layer_norm(img, img.shape[-1:]) * vec))
        txt_q, txt_k, txt_v = split_heads(self.txt_qkv(F.layer_norm(txt, txt.shape[-1:]) * vec))
        q, k, v = (torch.cat(pair, dim=2) for pair in ((txt_q, img_q), (txt_k, img_k), (txt_v, img_v)))
        attn = attention(q, k, v, pe=pe)
        txt_attn, img_attn = attn[:, : txt.shape[1]], attn[:, txt.shape[1] :]
        return img + self.img_proj(img_attn), txt + self.txt_proj(txt_attn)


class SingleStreamBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.dim = dim
        self.linear1, self.linear2 = nn.Linear(dim, 5 * dim), nn.Linear(3 * dim, dim)

    def forward(self, x, vec, pe):
        qkv, mlp = self.linear1(F.layer_norm(x, x.shape[-1:]) * vec).split([3 * self.dim, 2 * self.dim], dim=-1)
        q, k, v = split_heads(qkv)
        return x + self.linear2(torch.cat((attention(q, k, v, pe=pe), F.gelu(mlp)), 2))


class TwoStreamTransformer(nn.Module):
    def __init__(self, dim=32):
        super().__init__()
        self.img_in, self.txt_in, self.time_in = nn.Linear(16, dim), nn.Linear(24, dim), nn.Linear(16, dim)
        self.double_blocks = nn.ModuleList([DoubleStreamBlock(dim)])
        self.single_blocks = nn.ModuleList([SingleStreamBlock(dim)])
        self.final_layer = nn.Linear(dim, 16)

    def forward(self, latent, timestep, text):
        rows, columns = latent.shape[-2] // 2, latent.shape[-1] // 2
        img = self.img_in(rearrange(latent, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=2, pw=2))
        txt, vec = self.txt_in(text), 1 + self.time_in(sinusoids(timestep, 16))[:, None]
        ids = torch.zeros(rows, columns, 2)
        ids[..., 0] += torch.arange(rows)[:, None]
        ids[..., 1] += torch.arange(columns)[None, :]
        ids = torch.cat([torch.zeros(txt.shape[1], 2), ids.reshape(-1, 2)])[None]
        pe = torch.cat([rope(ids[..., axis], 8) for axis in range(2)], dim=-3).unsqueeze(1)
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, pe)
        x = torch.cat((txt, img), 1)
        for block in self.single_blocks:
            x = block(x, vec, pe)
        x = self.final_layer(x[:, txt.shape[1] :])
        return rearrange(x, "b (h w) (c ph pw) -> b c (h ph) (w pw)", h=rows, w=columns, ph=2, pw=2)
