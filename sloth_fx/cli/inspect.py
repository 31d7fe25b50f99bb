"""``sloth-fx inspect``: where a model computes attention."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import sloth_fx
from sloth_fx.cli.console import add_row, out, say, say_json, table
from sloth_fx.cli.models import open_model
from sloth_fx.report import Report

EXAMPLE = "Example: sloth-fx inspect stable-diffusion-v1-5 --json"
ModelPath = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A pipeline folder, a model folder or a config.json (diffusers).")
]
Component = Annotated[str | None, typer.Option(help="Which denoiser of a pipeline, such as transformer_2.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def inspect(model: ModelPath, component: Component = None, as_json: AsJson = False) -> None:
    """List the attention sites of a model. It is built without weights, so even a large one takes seconds."""
    report = sloth_fx.inspect(open_model(model, component).model)
    if as_json:
        say_json(report.to_dict())
    else:
        _show(report)


def _show(report: Report) -> None:
    kinds = [site.kind for site in report]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    say(f"{report.model}: {len(report)} attention sites ({counts})\n")
    rows = table(
        "site", "kind", "stage", "depth", "grid", "queries", "keys", "heads", "head_dim", "note", numbers="___r_rrrr"
    )
    for site in report:
        grid = "x".join(map(str, site.grid)) if site.grid is not None else "-"
        numbers = (site.q_tokens, site.kv_tokens, site.heads, site.head_dim)
        add_row(rows, site.name, site.kind, site.stage, f"{site.depth:g}", grid, *numbers, site.note)
    out().print(rows)
    say("\nGrids and numbers of tokens are those of a trial run; they grow with the latent and the text.")
