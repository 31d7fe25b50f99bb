"""An attention site: one place in a model where attention is computed, and what its tokens mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from sloth_fx.errors import SlothError

Kind = Literal["self", "cross", "joint", "temporal", "linear"]
Stage = Literal["in", "middle", "out"]


class LatentSize(NamedTuple):
    """The size of a latent, in its own units: pixels of the latent, or tokens where the host packs it. One frame for an
    image, one row for a sequence such as audio."""

    frames: int
    rows: int
    columns: int


class Place(NamedTuple):
    """Where the image tokens lie in a sequence that may hold others (text, registers) as well.

    They are contiguous, and start ``offset`` tokens after its start, or end ``offset`` tokens before its end.
    ``alone`` tells that there are no others. ``others`` is the number of these where nobody knows on which side of the
    image they would grow.
    """

    offset: int = 0
    from_end: bool = False
    alone: bool = True
    others: int | None = None

    def start(self, total: int, tokens: int) -> int:
        """The first image token, of ``tokens`` in a sequence of ``total``.

        Raises :class:`SlothError` where that cannot be told.
        """
        if self.others is not None and total - tokens != self.others:
            raise SlothError(
                f"{total - tokens} other tokens surround the {tokens} of the image, which had {self.others} around "
                "them when it was located, and where the new ones are is not known: transform the model with "
                "example_inputs like these"
            )
        return total - tokens - self.offset if self.from_end else self.offset


@dataclass(frozen=True, kw_only=True)
class AttentionSite:
    """One attention call, as seen with the inputs that the model was located with.

    ``path`` is the *owner*: the innermost module whose forward computes the attention; ``call`` counts the attention
    calls of that owner, and ``core`` those within one call of its forward. ``kind`` tells what attends to what:

    - ``self``: image tokens to image tokens (or text to text: then there is no grid);
    - ``joint``: image tokens to image tokens and to those of another input, such as text;
    - ``cross``: to tokens of another input alone;
    - ``temporal``: to the same place in other frames;
    - ``linear``: by products of keys and values, without a softmax.

    ``depth`` is how much coarser this site's grid is than that of the shallowest attention level (1, 2, 4, ...).
    ``grid`` is (rows, columns) of the image tokens, or (frames, rows, columns) where one attention sees several frames.
    ``divisors`` tell, for each of these, how many of the latent's one token stands for (``None``: the number of tokens
    is fixed, as in a window). ``text`` is the range of key positions that are text, or ``None``. ``query_place`` and
    ``key_place`` tell where in the sequence the image tokens lie, ``on_image`` whether both sides have any, and
    ``image_queries`` whether the queries do.
    ``refusal`` says why no operator can work here, whatever the tokens are.
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
    grid: tuple[int, ...] | None
    divisors: tuple[float | None, ...] | None
    text: tuple[int, int] | None
    query_place: Place = field(default_factory=Place)
    key_place: Place = field(default_factory=Place)
    core: int = 0
    on_image: bool = True
    image_queries: bool = True
    refusal: str | None = None

    @property
    def name(self) -> str:
        """``path``, with the number of the call where the owner has several."""
        path = self.path or "(the model itself)"
        return f"{path}[{self.call}]" if self.call else path

    @property
    def downscale(self) -> float:
        """Latent rows or columns per token: 1 at the shallowest level of SD1.5, 2 at that of SDXL."""
        known = [divisor for divisor in self.divisors or () if divisor is not None][-2:]
        return math.prod(known) ** 0.5 if len(known) == 2 else self.depth

    def grid_at(self, latent: Sequence[int]) -> tuple[int, ...] | None:
        """``grid`` for a latent of (rows, columns) or (frames, rows, columns); ``None`` where that is not known."""
        if self.grid is None or self.divisors is None:
            return None
        sizes = (1, *latent)[-len(self.grid) :]
        return tuple(
            tokens if divisor is None else math.ceil(size / divisor)
            for tokens, divisor, size in zip(self.grid, self.divisors, sizes, strict=True)
        )
