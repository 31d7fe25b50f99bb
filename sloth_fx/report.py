"""What was found in a model, and what was done to it: printable, iterable, and plain data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sloth_fx.site import AttentionSite

_KEYS = (
    *("path", "call", "kind", "stage", "depth", "heads", "head_dim"),
    *("q_tokens", "kv_tokens", "grid", "text", "operators", "note"),
)
_COLUMNS = ("stage", "depth", "kind", "heads", "head_dim", "queries", "keys", "grid", "operators", "site")


@dataclass(frozen=True, kw_only=True)
class SiteReport(AttentionSite):
    """One site: what it is, which operators act there, and how or why not."""

    operators: tuple[str, ...] = ()
    note: str = ""

    @classmethod
    def of(cls, site: AttentionSite, operators: tuple[str, ...] = (), note: str = "") -> SiteReport:
        return cls(**vars(site), operators=operators, note=note)

    def to_dict(self) -> dict[str, Any]:
        values = {key: getattr(self, key) for key in _KEYS}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


@dataclass(frozen=True)
class Report:
    """All attention sites of a model, in order of execution. ``print`` it, iterate over it, or take ``to_dict()``."""

    model: str
    sites: tuple[SiteReport, ...]
    note: str = ""

    def __iter__(self) -> Iterator[SiteReport]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON: ``{"model": ..., "note": ..., "sites": [{"path": ..., "kind": ..., ...}]}``."""
        return {"model": self.model, "note": self.note, "sites": [site.to_dict() for site in self.sites]}

    def __str__(self) -> str:
        rows = [_row(site) for site in self.sites]
        widths = [max(map(len, column)) for column in zip(_COLUMNS, *rows, strict=True)] if rows else []
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (_COLUMNS, *rows)] if rows else []
        acted = sum(bool(site.operators) for site in self.sites)
        kinds = ", ".join(
            f"{sum(site.kind == kind for site in self.sites)} {kind}"
            for kind in dict.fromkeys(site.kind for site in self.sites)
        )
        head = f"{self.model}: {len(self.sites)} attention sites ({kinds})" if rows else self.model
        if acted:
            head += f", {acted} with operators"
        return "\n".join(filter(None, [head, self.note, *lines]))


def _row(site: SiteReport) -> tuple[str, ...]:
    grid = "x".join(map(str, site.grid)) if site.grid is not None else "?"
    action = "+".join(site.operators) or (f"- ({site.note})" if site.note else "-")
    numbers = (site.heads, site.head_dim, site.q_tokens, site.kv_tokens)
    return (site.stage, f"{site.depth:g}", site.kind, *map(str, numbers), grid, action, site.name)
