"""Small denoisers of nobody's, with idioms of real ones: how their text reaches attention, and what steers them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE, HEADS, BATCH, ROWS, COLUMNS = 8, 2, 2, 3, 7
IMAGE = ROWS * COLUMNS
TEXT = "encoder_hidden_states"
MASK = "encoder_attention_mask"
POOLED = "pooled_projections"


def heads(tokens: Tensor) -> Tensor:
    return tokens.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class Joint(nn.Module):
    """Attention over [text; image]."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(SIZE, 3 * SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        tokens, count = torch.cat([text, image], 1), text.shape[1]
        query, key, value = map(heads, self.qkv(tokens).chunk(3, -1))
        out = self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return out[:, :count], out[:, count:]


class SteeredJoint(Joint):
    """Long texts are read more softly."""

    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(text * 0.3 if text.shape[1] > 8 else text, image)


class Cross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.context, self.out = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 2 * SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, tokens: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        key, value = map(heads, self.context(context).chunk(2, -1))
        out = F.scaled_dot_product_attention(heads(self.query(tokens)), key, value, mask)
        return self.out(out.transpose(1, 2).flatten(2))


class Host(nn.Module):
    """Latent (B, 4, H, W), timestep (B,), text (B, N, 6), mask (B, N), pooled text (B, 3)."""

    joint: type[nn.Module] = Joint
    text: tuple[str, ...] = (TEXT,)
    """What a text consists of."""

    def __init__(self) -> None:
        super().__init__()
        self.image_in, self.time_in, self.text_in = nn.Linear(4, SIZE), nn.Linear(1, SIZE), nn.Linear(6, SIZE)
        self.pooled_in, self.image_out = nn.Linear(3, SIZE), nn.Linear(SIZE, 4)
        self.blocks = nn.ModuleList(self.joint() for _ in range(2))
        self.cross = Cross()
        self.learned = nn.Parameter(torch.randn(1, 3, SIZE))
        self.positions = nn.Parameter(torch.randn(1, IMAGE, SIZE))

    def embed(self, text: Tensor, pooled: Tensor | None) -> Tensor:
        return self.text_in(text)

    def run(self, text: Tensor, image: Tensor, vector: Tensor, mask: Tensor | None) -> Tensor:
        for block in self.blocks:
            more = block(F.layer_norm(text, (SIZE,)), F.layer_norm(image, (SIZE,)) * (1 + vector[:, None]))
            text, image = text + more[0], image + more[1]
        return image

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        pooled_projections: Tensor | None = None,
    ) -> Tensor:
        image = self.image_in(hidden_states.flatten(2).transpose(1, 2))
        vector = self.time_in(timestep[:, None] / 1000)
        text = self.embed(encoder_hidden_states, pooled_projections)
        image = self.run(text, image, vector, encoder_attention_mask)
        return self.image_out(image).transpose(1, 2).reshape(hidden_states.shape)


class Plain(Host):
    pass


class PooledRegisters(Host):
    """Learned tokens stand before the text, and the pooled text modulates them."""

    text = (TEXT, POOLED)

    def embed(self, text: Tensor, pooled: Tensor | None) -> Tensor:
        learned = self.learned.expand(len(text), -1, -1) + self.pooled_in(pooled)[:, None]
        return torch.cat([learned, self.text_in(text)], 1)


class MaskOfZeros(Host):
    """An additive mask (B, queries, keys), made of zeros and a row for each sample."""

    text = (TEXT, MASK)

    def run(self, text: Tensor, image: Tensor, vector: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is not None
        row = (1 - mask.to(text.dtype)) * -1e4
        bias = torch.zeros(len(image), image.shape[1], text.shape[1], dtype=text.dtype) + row[:, None]
        return super().run(text, image + self.cross(image, text, bias[:, None]), vector, None)


class Resampled(Host):
    """Learned tokens read the text, and the image reads them."""

    def embed(self, text: Tensor, pooled: Tensor | None) -> Tensor:
        learned = self.learned.expand(len(text), -1, -1)
        return learned + self.cross(learned, self.text_in(text))


class WrittenPositions(Host):
    """Positions are added in place, and the image without them is needed later; the image has one size."""

    def run(self, text: Tensor, image: Tensor, vector: Tensor, mask: Tensor | None) -> Tensor:
        tokens, count = torch.cat([text, image], 1), text.shape[1]
        tokens[:, count:] += self.positions
        return image + super().run(tokens[:, :count], tokens[:, count:], vector, mask)


class Steered(Host):
    """What attention does goes by the length of the text; it is captured for one size, as the image has no other."""

    joint = SteeredJoint

    def run(self, text: Tensor, image: Tensor, vector: Tensor, mask: Tensor | None) -> Tensor:
        return super().run(text, image + self.positions, vector, mask)


class Counted(Host):
    """Python counts the tokens."""

    def embed(self, text: Tensor, pooled: Tensor | None) -> Tensor:
        tokens = self.text_in(text)
        total = torch.zeros_like(tokens[:, 0])
        for index in range(text.shape[1]):
            total = total + tokens[:, index] / (1 + index)
        return tokens + total[:, None]


class Crossed(Host):
    """Cross-attention alone, with a mask of the text; its keys are to be had beforehand."""

    text = (TEXT, MASK)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Cross() for _ in range(2))

    def run(self, text: Tensor, image: Tensor, vector: Tensor, mask: Tensor | None) -> Tensor:
        hidden = mask.bool()[:, None, None] if mask is not None else None
        for block in self.blocks:
            image = image + block(F.layer_norm(image, (SIZE,)) * (1 + vector[:, None]), text, hidden)
        return image


class Trimmed(Crossed):
    """The text is cut to the longest that the mask leaves."""

    def run(self, text: Tensor, image: Tensor, vector: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is not None
        longest = int(mask.sum(1).max())
        return super().run(text[:, :longest], image, vector, mask[:, :longest])


class SteeredText(Crossed):
    """Long texts are made louder."""

    text = (TEXT,)

    def embed(self, text: Tensor, pooled: Tensor | None) -> Tensor:
        return self.text_in(text) * (2.0 if text.shape[1] > 6 else 1.0)


class CrossResampled(Resampled, Crossed):
    text = (TEXT,)


class Remembering(Host):
    """The text of the first call is kept."""

    kept: Any = None

    def embed(self, text: Tensor, pooled: Tensor | None) -> Tensor:
        if self.kept is None:
            self.kept = self.text_in(text)
        return self.text_in(text) + self.kept


def build(kind: type[Host]) -> Host:
    """In float64, with weights that let attention tell tokens apart."""
    torch.manual_seed(0)
    model = kind().double().eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
    return model


def call_of(kind: type[Host], tokens: int = 5, seed: int = 0) -> dict[str, Tensor]:
    """Arguments, with a text of so many ``tokens``, of which ``seed`` says how many a mask hides."""
    random = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    mask = torch.ones(BATCH, tokens, dtype=torch.int64)
    mask[0, tokens - seed % 3 :] = 0
    mask[1, tokens - 2 :] = 0
    given = {
        "hidden_states": noise(BATCH, 4, ROWS, COLUMNS),
        "timestep": torch.full((BATCH,), 321.0, dtype=torch.float64),
        TEXT: noise(BATCH, tokens, 6),
        MASK: mask,
        POOLED: noise(BATCH, 3),
    }
    return {name: each for name, each in given.items() if name in ("hidden_states", "timestep", *kind.text)}
