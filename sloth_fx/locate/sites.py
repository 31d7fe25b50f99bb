"""From what a probe saw to a list of attention sites: kind, stage, depth and grid."""

from __future__ import annotations

import math

from sloth_fx.locate.probe import AttentionEvent, Probe
from sloth_fx.site import AttentionSite, Kind, Stage

_HALVINGS = [2**power for power in range(8)]
_WHOLE = range(3, 65)


def locate(probe: Probe, latent: tuple[int, int] | None) -> list[AttentionSite]:
    """The attention sites of a probed model, in order of execution.

    ``latent`` is (rows, columns) of the latent that the probe ran on.
    """
    events = probe.attentions
    kinds = [_kind(probe, event) for event in events]
    divisors = [_divisors(event, latent) for event in events]
    scales = [
        math.prod(divisor) ** 0.5 if divisor else 1 / math.sqrt(event.query.shape[-2])
        for event, divisor in zip(events, divisors, strict=True)
    ]
    images = [scale for scale, kind in zip(scales, kinds, strict=True) if kind != "cross"]
    shallowest = min(images or scales)
    last_skip = max(probe.skips, default=None)
    calls: dict[str, int] = {}
    sites = []
    for event, kind, divisor, scale in zip(events, kinds, divisors, scales, strict=True):
        path = event.owner.path
        calls[path] = calls.get(path, -1) + 1
        heads, head_dim = _heads(event)
        sites.append(
            AttentionSite(
                path=path,
                call=calls[path],
                owner=type(event.owner.module).__name__,
                kind=kind,
                stage=_stage(event.time, last_skip),
                depth=round(scale / shallowest, 3),
                heads=heads,
                head_dim=head_dim,
                q_tokens=event.query.shape[-2],
                kv_tokens=event.kv_tokens,
                grid=event.grid,
                divisors=divisor,
                text=(0, event.kv_tokens) if kind == "cross" else None,
            )
        )
    return sites


def _kind(probe: Probe, event: AttentionEvent) -> Kind:
    """Self: keys come from what the queries come from. Cross: from something else. Joint: from both."""
    query, key = (probe.sources(tensor, event.owner) for tensor in (event.query, event.key))
    if key <= query:
        return "self"
    return "joint" if key & query else "cross"


def _stage(time: int, last_skip: tuple[int, int] | None) -> Stage:
    """The last skip connection that a UNet makes is the first one that it joins.

    It was made when the input blocks ended, and is joined when the output blocks begin; between lies the middle. A
    model without skip connections is all input.
    """
    if last_skip is None or time < last_skip[0]:
        return "in"
    return "middle" if time < last_skip[1] else "out"


def _heads(event: AttentionEvent) -> tuple[int, int]:
    """(heads, head_dim). Three-dimensional attention has its heads folded into the batch."""
    query = event.query
    if query.ndim >= 4:
        return query.shape[-3], query.shape[-1]
    tokens = next(
        (tensor for tensor in (*event.owner.args, *event.owner.kwargs.values()) if hasattr(tensor, "shape")), query
    )
    return max(1, query.shape[0] // tokens.shape[0]), query.shape[-1]


def _divisors(event: AttentionEvent, latent: tuple[int, int] | None) -> tuple[float, float] | None:
    """How many latent rows and columns one token stands for, so that ceil(latent / divisor) gives the grid.

    Halving is the rule, so powers of two come first: 13 rows become 7, 4, 2, of which the last is an eighth, though a
    seventh would fit as well.
    """
    if latent is None or event.grid is None:
        return None
    for divisor in (*_HALVINGS, *_WHOLE):
        if all(math.ceil(size / divisor) == tokens for size, tokens in zip(latent, event.grid, strict=True)):
            return divisor, divisor
    return latent[0] / event.grid[0], latent[1] / event.grid[1]
