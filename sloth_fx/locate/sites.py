"""From what a probe saw to a list of attention sites: kind, stage, depth and grid."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sloth_fx.locate.probe import AttentionEvent, Probe
from sloth_fx.locate.tokens import ImageTokens, Latent, Tokens, kind_of, read_tokens
from sloth_fx.site import AttentionSite, Kind, LatentSize, Place, Stage

_HALVINGS = [2**power for power in range(8)]
_WHOLE = range(3, 65)
_Divisors = tuple[float, float, float]


@dataclass(frozen=True)
class _Seen:
    """One attention and what its tokens are."""

    event: AttentionEvent
    kind: Kind
    query: Tokens
    key: Tokens

    @property
    def on_image(self) -> bool:
        """Whether image tokens attend to image tokens; where nothing is known, they may."""
        known = self.query.sources and self.key.sources
        return self.kind in ("self", "joint", "temporal") and (not known or self.image is not None)

    @property
    def image(self) -> ImageTokens | None:
        return self.query.image if self.kind == "cross" else self.key.image


def locate(
    probe: Probe, latent: Latent, text: frozenset[str], again: tuple[Probe, Latent] | None = None
) -> list[AttentionSite]:
    """The attention sites of a probed model, in order of execution.

    ``text`` names the inputs that are text. ``again`` is a run at another size, which tells what moves with size; it
    may have stopped early.
    """
    seen = _read(probe, latent, text)
    resized = _read(*again, text) if again is not None else []
    divisors = [_divisors(each.image, latent.size) for each in seen]
    scales = [_scale(each) for each in divisors]
    of_images = [scale for scale, each in zip(scales, seen, strict=True) if each.on_image and each.kind != "temporal"]
    shallowest = min((scale for scale in of_images or scales if scale is not None), default=1.0)
    stages = _stages(probe, seen, divisors)
    places = _Places()
    counts: dict[str, int] = {}
    sites = []
    for index, each in enumerate(seen):
        event, image = each.event, each.image
        counts[event.owner.path] = counts.get(event.owner.path, -1) + 1
        again_here = resized[index] if index < len(resized) else None
        sites.append(
            AttentionSite(
                path=event.owner.path,
                call=counts[event.owner.path],
                core=event.owner.attentions.index(event),
                owner=type(event.owner.module).__name__,
                kind=each.kind,
                stage=stages[index],
                depth=round((scales[index] or shallowest) / shallowest, 3),
                heads=event.heads,
                head_dim=event.head_dim,
                q_tokens=event.q_tokens,
                kv_tokens=event.kv_tokens,
                grid=_relevant(image.grid, image) if image is not None and image.grid is not None else None,
                divisors=_relevant(divisors[index], image, moving=True) if image is not None else None,
                text=each.key.text,
                query_place=places.of(each.query, again_here.query if again_here is not None else None),
                key_place=places.of(each.key, again_here.key if again_here is not None else None),
                on_image=each.on_image,
                image_queries=event.query is None or each.query.image is not None,
                refusal=event.refusal,
            )
        )
    return sites


def _read(probe: Probe, latent: Latent, text: frozenset[str]) -> list[_Seen]:
    seen = []
    for event in probe.attentions:
        query = read_tokens(event.query, event.q_tokens, probe.sources, latent, text)
        key = read_tokens(event.key, event.kv_tokens, probe.sources, latent, text)
        seen.append(_Seen(event, "linear" if event.linear else kind_of(query, key), query, key))
    return seen


def _stages(probe: Probe, seen: Sequence[_Seen], divisors: Sequence[_Divisors | None]) -> list[Stage]:
    """The last skip connection that a UNet makes is the first one that it joins.

    It was made when the input blocks ended, and is joined when the output blocks begin; between lies the middle. A
    model without skip connections at one scale is a stack of blocks, of which the first half is input and the second
    half output. One with several scales is half a UNet, so all input.
    """
    last = max(probe.skips, default=None)
    if last is not None:
        return ["in" if s.event.time < last[0] else "middle" if s.event.time < last[1] else "out" for s in seen]
    blocks = list(itertools.accumulate(each.on_image or each.kind == "linear" for each in seen))
    if len({scale for scale in map(_scale, divisors) if scale is not None}) > 1:
        return ["in" for _ in seen]
    return ["in" if max(block - 1, 0) * 2 < max(blocks[-1], 1) else "out" for block in blocks]


def _holds_text(tokens: Tokens, in_front: bool) -> bool:
    """Whether there is text on one side of the image: that side grows with it."""
    if tokens.text is None or tokens.image is None:
        return False
    return tokens.text[0] < tokens.image.start if in_front else tokens.text[1] > tokens.image.stop


class _Places:
    """Where image tokens lie: fixed to the end of a sequence if what comes before them changes with the inputs."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int, int], Place] = {}

    def of(self, tokens: Tokens, resized: Tokens | None) -> Place:
        if tokens.image is None:
            return Place()
        before, after = tokens.image.start, tokens.total - tokens.image.stop
        key = before, tokens.image.stop, tokens.total
        if key not in self._known:
            self._known[key] = self._place(tokens, before, after, resized)
        return self._known[key]

    def _place(self, tokens: Tokens, before: int, after: int, resized: Tokens | None) -> Place:
        if before == after == 0:
            return Place()
        others = before + after
        if resized is not None and resized.image is not None and before > 0 and after > 0:
            again = resized.image.start, resized.total - resized.image.stop
            from_start = again[0] == before
            if sum(again) != others and from_start != (again[1] == after) and not _holds_text(tokens, from_start):
                return Place(before if from_start else after, from_end=not from_start, alone=False)
        from_end = before > 0 and (after == 0 or (tokens.text is not None and tokens.text[0] < before))
        sure = before == 0 or after == 0
        return Place(after if from_end else before, from_end, alone=False, others=None if sure else others)


def _divisors(image: ImageTokens | None, latent: LatentSize | None) -> _Divisors | None:
    """How many latent frames, rows and columns one token stands for, so that ceil(latent / divisor) gives the grid.

    Halving is the rule, so powers of two come first: 13 rows become 7, 4, 2, of which the last is an eighth, though a
    seventh would fit as well.
    """
    if image is None or image.grid is None or latent is None:
        return None
    frames, *grid = image.levels
    for divisor in (*_HALVINGS, *_WHOLE):
        if all(math.ceil(size / divisor) == tokens for size, tokens in zip(latent[1:], grid, strict=True)):
            return _divisor(latent.frames, frames), divisor, divisor
    return _divisor(latent.frames, frames), _divisor(latent.rows, grid[0]), _divisor(latent.columns, grid[1])


def _divisor(size: int, tokens: int) -> float:
    return next((each for each in (*_HALVINGS, *_WHOLE) if math.ceil(size / each) == tokens), size / tokens)


def _scale(divisors: _Divisors | None) -> float | None:
    return math.sqrt(divisors[1] * divisors[2]) if divisors is not None else None


def _relevant(values: Any, image: ImageTokens, *, moving: bool = False) -> Any:
    """Of (frames, rows, columns) the last two, unless one attention sees several frames. With ``moving``, ``None`` for
    axes of which one attention sees a part: that does not grow with the latent."""
    if values is None or image.grid is None:
        return None
    if moving:
        # Frames that the host folds into the batch are more than the latent's axes tell.
        alike = [
            whole and here == all_ for whole, here, all_ in zip(image.whole, image.grid, image.levels, strict=True)
        ]
        values = tuple(value if each else None for value, each in zip(values, alike, strict=True))
    return tuple(values if image.grid[0] > 1 else values[1:])
