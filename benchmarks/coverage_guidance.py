"""How one denoiser is guided, and at what price: by a negative text, and by perturbed attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import sloth_fx
from sloth_fx import NAG, PAG, SEG, SLG, AttentionSite, Report
from sloth_fx.model_adapters import Arguments, adapter_for
from sloth_fx.planner import block_of
from sloth_fx.spec import Spec
from tests.zoo.recipe import Inputs

COLUMNS = ("NAG", "PAG", "SEG", "SLG")


def spec_for(column: str, sites: Sequence[AttentionSite]) -> Spec:
    """The spec of a column with its defaults; ``SLG`` leaves out the block of the last site."""
    if column == "SLG":
        return SLG(layers=(block_of(sites[-1].path) or sites[-1].path,), start=0.0, stop=1.0)
    return {"NAG": NAG, "PAG": PAG, "SEG": SEG}[column]()


def negatives(patched: nn.Module, model: nn.Module, inputs: Inputs) -> list[dict[str, Any]]:
    """Noise in the place of the text, where it is a negative text that guides: alone, with the masks of its words, and
    with all else that conditions the model, for hosts that read keys from both."""
    if not any("NAG" in site.operators for site in sloth_fx.report(patched)):
        return [{}]
    text = {label.partition("[")[0] for label in Arguments(model, adapter_for(model)).text((), inputs)}
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    masks = {name for name, value in tensors.items() if "mask" in name and value.ndim == 2}
    images = {name for name in tensors if "image" in name and "mask" not in name}
    chosen = (text, text | masks, text | masks | images)
    return [{name: _noise(inputs[name]) for name in sorted(names)} for names in chosen]


def steer(patched: nn.Module, negative: dict[str, Any], progress: float) -> None:
    """Let the next call be guided."""
    context = sloth_fx.context(patched)
    context.at(progress)
    if negative:
        context.set_negative(**negative)


def _noise(text: Any) -> Any:
    generator = torch.Generator().manual_seed(0)

    def noise(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return torch.randn(value.shape, generator=generator).to(value) if floating else value

    return tree_map(noise, text)


def why_dear(report: Report) -> str:
    """Why a guided call costs as much as two; empty where what both have in common is computed once."""
    for note in (site.note for site in report if site.operators):
        for way in ("two branches: ", "a call of its own: "):
            if way in note:
                return note.partition(way)[2]
    return ""
