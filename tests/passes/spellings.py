"""Attention as other people write it. Every module takes x (B, N, C), and some a mask over the tokens."""

import math

import einops
import torch
import torch.nn.functional as F
from torch import nn

CHANNELS, HEADS = 12, 2
HEAD_DIM = CHANNELS // HEADS
SCALE = HEAD_DIM**-0.5


class Projections(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(CHANNELS, CHANNELS) for _ in range(3))
        for each in (self.to_q, self.to_k):
            nn.init.normal_(each.weight)

    def project(self, x):
        return self.to_q(x), self.to_k(x), self.to_v(x)

    def heads(self, x):
        return x.unflatten(2, (HEADS, -1)).transpose(1, 2)


class LatentDiffusion(Projections):
    """Einsum over folded heads, as in the first latent diffusion models."""

    def forward(self, x, mask=None):
        q, k, v = (einops.rearrange(t, "b n (h d) -> (b h) n d", h=HEADS) for t in self.project(x))
        sim = torch.einsum("b i d, b j d -> b i j", q, k) * SCALE
        if mask is not None:
            mask = einops.repeat(mask, "b j -> (b h) () j", h=HEADS)
            sim.masked_fill_(~mask, -torch.finfo(sim.dtype).max)
        out = torch.einsum("b i j, b j d -> b i d", sim.softmax(dim=-1), v)
        return einops.rearrange(out, "(b h) n d -> b n (h d)", h=HEADS)


class GuidedDiffusion(nn.Module):
    """Channels first, one convolution for all three, half the scale on each side, softmax in fp32."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Conv1d(CHANNELS, 3 * CHANNELS, 1)

    def forward(self, x):
        qkv = self.qkv(x.transpose(1, 2))
        batch, width, length = qkv.shape
        channels = width // (3 * HEADS)
        q, k, v = qkv.reshape(batch * HEADS, channels * 3, length).split(channels, dim=1)
        scale = 1 / math.sqrt(math.sqrt(channels))
        weight = torch.einsum("bct,bcs->bts", q * scale, k * scale)
        weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
        return torch.einsum("bts,bcs->bct", weight, v).reshape(batch, -1, length).transpose(1, 2)


class FeatureMap(nn.Module):
    """Attention between pixels: values come first in the second product, and the map is transposed."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Conv2d(CHANNELS, CHANNELS, 1) for _ in range(3))

    def forward(self, x):
        image = x.transpose(1, 2).unsqueeze(2)
        b, c, h, w = image.shape
        q = self.q(image).reshape(b, c, h * w).permute(0, 2, 1)
        weights = torch.bmm(q, self.k(image).reshape(b, c, h * w)) * (int(c) ** (-0.5))
        weights = F.softmax(weights, dim=2).permute(0, 2, 1)
        out = torch.bmm(self.v(image).reshape(b, c, h * w), weights)
        return out.reshape(b, c, h, w).squeeze(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """One linear layer for all three, dropout and softmax as modules."""

    def __init__(self, softmax=False):
        super().__init__()
        self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS)
        self.attend, self.attn_drop = nn.Softmax(dim=-1), nn.Dropout(0.3)

    def forward(self, x):
        batch, tokens, channels = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, HEADS, channels // HEADS).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attn = self.attn_drop(self.attend((q * SCALE) @ k.transpose(-2, -1)))
        return (attn @ v).transpose(1, 2).reshape(batch, tokens, channels)


class KeysFirst(Projections):
    def forward(self, x):
        q, k, v = map(self.heads, self.project(x))
        weights = torch.matmul(k, q.mT).div(math.sqrt(HEAD_DIM)).softmax(-2)
        return torch.matmul(weights.transpose(2, 3), v).transpose(1, 2).flatten(2)


class HeadsLast(Projections):
    def forward(self, x):
        q, k, v = (t.unflatten(2, (HEADS, -1)) for t in self.project(x))
        weights = F.softmax(torch.einsum("...nhd,...mhd->...nmh", q, k) * SCALE, dim=2)
        return torch.einsum("bnmh,bmhd->bnhd", weights, v).flatten(2)


class SharedKeys(Projections):
    """All heads look at the same keys and values."""

    def forward(self, x):
        q, k, v = self.heads(self.to_q(x)), self.to_k(x)[..., :HEAD_DIM], self.to_v(x)[..., :HEAD_DIM]
        weights = torch.einsum("bhid,bjd->bhij", q, k).mul(SCALE).softmax(dim=-1)
        return torch.einsum("bhij,bjd->bhid", weights, v).transpose(1, 2).flatten(2)


class OneTensor(Projections):
    """Queries, keys and values are the same."""

    def forward(self, x):
        x = self.heads(self.to_v(x))
        return ((x @ x.transpose(-1, -2) * SCALE).softmax(-1) @ x).transpose(1, 2).flatten(2)


class Stabilised(Projections):
    def forward(self, x):
        q, k, v = map(self.heads, self.project(x))
        scores = torch.matmul(q, k.transpose(-1, -2)) * SCALE
        scores = scores - scores.amax(dim=-1, keepdim=True)
        return (F.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype) @ v).transpose(1, 2).flatten(2)


class LearnedScale(Projections):
    """A temperature for each head, and a cap on the scores."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.rand(HEADS, 1, 1))

    def forward(self, x):
        q, k, v = map(self.heads, self.project(x))
        scores = torch.tanh(q @ k.transpose(-1, -2) * self.temperature.exp() / 5) * 5
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Added(Projections):
    """The mask is added after scaling; (B, M) is True where tokens count."""

    def forward(self, x, mask):
        q, k, v = map(self.heads, self.project(x))
        bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -10000.0)
        scores = q @ k.transpose(-1, -2) * SCALE + bias[:, None, None]
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class Chosen(Projections):
    def forward(self, x, mask):
        q, k, v = map(self.heads, self.project(x))
        scores = torch.where(mask[:, None, None], q @ k.transpose(-1, -2) * SCALE, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class AddedByProduct(Projections):
    """``baddbmm`` adds the mask; without one it reads nothing of a tensor made from sizes of the input."""

    def forward(self, x, mask=None):
        batch, tokens, _ = x.shape
        q, k, v = (self.heads(t).reshape(batch * HEADS, tokens, -1) for t in self.project(x))
        if mask is None:
            bias, beta = torch.empty(batch * HEADS, tokens, tokens, dtype=q.dtype, device=q.device), 0
        else:
            bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -10000.0)
            bias, beta = bias[:, None].repeat_interleave(HEADS, dim=0), 1
        scores = torch.baddbmm(bias, q, k.transpose(-1, -2), beta=beta, alpha=SCALE)
        out = torch.bmm(scores.softmax(dim=-1), v)
        return out.view(batch, HEADS, tokens, -1).transpose(1, 2).flatten(2)


class SlicedSamples(Projections):
    """Two samples (heads folded) at a time, written into a buffer: the last slice is shorter."""

    def forward(self, x, mask=None):
        q, k, v = (self.heads(t).flatten(0, 1)[:5] for t in self.project(x))
        bias = None if mask is None else torch.where(mask, 0.0, -10000.0).repeat_interleave(HEADS, 0)[:5, None]
        out = torch.zeros(q.shape[0], q.shape[1], v.shape[2], dtype=q.dtype, device=q.device)
        for start in range(0, q.shape[0], 2):
            part = slice(start, start + 2)
            scores = torch.einsum("bid,bjd->bij", q[part], k[part]) * SCALE
            if bias is not None:
                scores += bias[part]
            out[part] = torch.einsum("bij,bjd->bid", scores.softmax(dim=-1), v[part])
        return out


class SlicedQueries(Projections):
    """Three queries at a time, concatenated."""

    def forward(self, x, mask=None):
        q, k, v = map(self.heads, self.project(x))
        if mask is not None:
            mask = mask[:, None, None].expand(-1, 1, q.shape[2], -1)
        parts = []
        for start in range(0, q.shape[2], 3):
            part = q[:, :, start : start + 3]
            hidden = mask if mask is None else mask[:, :, start : start + 3]
            parts.append(F.scaled_dot_product_attention(part, k, v, attn_mask=hidden))
        return torch.cat(parts, dim=2).transpose(1, 2).flatten(2)


class MultiHead(nn.Module):
    """``nn.MultiheadAttention``, called as hosts call it."""

    def __init__(self, batch_first=True):
        super().__init__()
        self.attn = nn.MultiheadAttention(CHANNELS, HEADS, batch_first=batch_first)

    def forward(self, x):
        return self.attn(x, x, x, need_weights=False)[0]


EXPLICIT = [
    LatentDiffusion,
    GuidedDiffusion,
    FeatureMap,
    VisionTransformer,
    KeysFirst,
    HeadsLast,
    SharedKeys,
    OneTensor,
    Stabilised,
    LearnedScale,
    AddedByProduct,
]
MASKED = [LatentDiffusion, Added, Chosen, AddedByProduct]
