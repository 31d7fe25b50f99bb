"""Options that several commands take, and the checks of their values."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sloth_fx.errors import SlothError


class Dtype(StrEnum):
    """The types of numbers that a model may compute with."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"

    @property
    def bytes(self) -> int:
        """Of one number."""
        return 4 if self is Dtype.FLOAT32 else 2


SpecFile = Annotated[
    Path, typer.Option("--spec", help="A spec (JSON), a PNG that sloth-fx wrote, or a ComfyUI workflow.")
]
Pipeline = Annotated[
    Path, typer.Argument(metavar="PIPELINE", help="A pipeline folder (diffusers). Nothing is downloaded.")
]
Prompt = Annotated[str, typer.Option(help="What to paint.")]
NegativePrompt = Annotated[str | None, typer.Option(help="What not to paint.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the first noise.")]
Steps = Annotated[int, typer.Option(min=1, help="Of the sampling run.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale; default: the pipeline's own.")]
Size = Annotated[str | None, typer.Option(metavar="WxH", help="Of the image in pixels; default: the pipeline's own.")]
DtypeOption = Annotated[Dtype, typer.Option(help="The type of numbers to compute with.")]
Device = Annotated[str, typer.Option(help="Such as cpu, cuda or mps.")]


def width_and_height(value: str, option: str = "--size") -> tuple[int, int]:
    """(width, height) of ``WxH``. Raises a usage error for anything else."""
    found = re.fullmatch(r"([1-9]\d{0,5})[xX]([1-9]\d{0,5})", value.strip())
    if found is None:
        raise typer.BadParameter(f"{value!r} is not WIDTHxHEIGHT, such as 768x512", param_hint=option)
    return int(found[1]), int(found[2])


def check_writable(path: Path, suffix: str) -> None:
    """Raise :class:`SlothError`, before any work is done, for a path at which no such file can be written."""
    if path.suffix.lower() != suffix:
        raise SlothError(f"{path}: give a name that ends with {suffix}")
    if not path.absolute().parent.is_dir():
        raise SlothError(f"cannot write {path}: there is no folder {path.parent}")
