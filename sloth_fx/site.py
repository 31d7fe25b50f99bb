"""An attention site: one place in a model where attention is computed, and what its tokens mean."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Kind = Literal["self", "cross", "joint"]
Stage = Literal["in", "middle", "out"]


@dataclass(frozen=True, kw_only=True)
class AttentionSite:
    """One attention call, as seen with the inputs that the model was located with.

    ``path`` is the *owner*: the innermost module whose forward computes the attention; ``call`` counts the attention
    calls of that owner. ``depth`` is how much coarser this site's grid is than that of the shallowest attention level
    (1, 2, 4, ...). ``grid`` is (rows, columns) of the image tokens, ``divisors`` how many latent rows and columns one
    token stands for. ``text`` is the range of key positions that are text, or ``None``.
    """

    path: str
    call: int
    owner: str
    kind: Kind
    stage: Stage
    depth: float
    heads: int
    head_dim: int
    q_tokens: int
    kv_tokens: int
    grid: tuple[int, int] | None
    divisors: tuple[float, float] | None
    text: tuple[int, int] | None

    @property
    def name(self) -> str:
        """``path``, with the number of the call where the owner has several."""
        path = self.path or "(the model itself)"
        return f"{path}[{self.call}]" if self.call else path

    @property
    def downscale(self) -> float:
        """Latent rows or columns per token: 1 at the shallowest level of SD1.5, 2 at that of SDXL."""
        return math.prod(self.divisors) ** 0.5 if self.divisors is not None else self.depth

    def grid_at(self, latent: tuple[int, int]) -> tuple[int, int] | None:
        """(rows, columns) of this site's image tokens for a latent of ``latent`` rows and columns."""
        if self.divisors is None:
            return None
        rows, columns = (math.ceil(size / divisor) for size, divisor in zip(latent, self.divisors, strict=True))
        return rows, columns
