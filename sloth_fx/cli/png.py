"""The text that a PNG carries."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sloth_fx.cli.models import import_extra
from sloth_fx.errors import SlothError

PNG = ".png"


def text_of(path: Path) -> dict[str, str]:
    """The text chunks of a PNG, by keyword. Raises :class:`SlothError` where it cannot be read."""
    import_extra("PIL")
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            image.load()  # text may follow the pixels
            chunks = getattr(image, "text", {})
    except UnidentifiedImageError:
        raise SlothError(f"{path} is no image") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise SlothError(f"cannot read {path}: {error}") from None
    return {str(name): str(value) for name, value in chunks.items()}


def save_png(image: Any, path: Path, text: Mapping[str, str]) -> None:
    """Write a PIL image with text chunks. Raises :class:`SlothError` where it cannot be written."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, value in text.items():
        info.add_itxt(name, value)
    try:
        image.save(path, format="PNG", pnginfo=info)
    except OSError as error:
        raise SlothError(f"cannot write {path}: {error.strerror or error}") from None
