"""Sheets of labelled pictures, drawn with Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

INK, FAINT, PAPER = "#22223b", "#6d6d85", "#ffffff"
_GAP, _MARGIN, _SMALLEST = 14, 26, 192  # pixels


@dataclass(frozen=True)
class Cell:
    """Pictures one below the other (PIL, of equal size), and lines of text below them."""

    pictures: Sequence[Any] = ()
    lines: Sequence[str] = ()


@dataclass(frozen=True)
class Sheet:
    """A title, lines below it, and rows of cells with labels on the left and above."""

    title: str
    lines: Sequence[str]
    columns: Sequence[str]
    rows: Sequence[str]
    cells: Sequence[Sequence[Cell]]
    footer: Sequence[str] = field(default_factory=tuple)

    def draw(self) -> Any:
        """The sheet as a PIL image. Small pictures are enlarged, pixel by pixel."""
        from PIL import Image, ImageDraw

        pictures = [picture for row in self.cells for cell in row for picture in cell.pictures]
        width, height = (max(picture.size[axis] for picture in pictures) for axis in (0, 1))
        zoom = max(1, -(-_SMALLEST // max(width, height)))
        width, height = width * zoom, height * zoom
        unit = max(13, min(width, height) // 20)
        big, normal = (_font(round(unit * scale)) for scale in (1.5, 1))
        line = round(unit * 1.5)
        left = max((_length(name, normal) for name in self.rows), default=0) + (_GAP if any(self.rows) else 0)
        wide = max([width, *(_length(text, normal) for row in self.cells for cell in row for text in cell.lines)])
        wide = max([wide, *(_length(name, normal) for name in self.columns)]) + _GAP
        tall = [_tall(row, height, line) for row in self.cells]
        head = _MARGIN + 2 * line + len(self.lines) * line + _GAP
        text = max([_length(self.title, big), *(_length(each, normal) for each in (*self.lines, *self.footer))])
        total = (
            2 * _MARGIN + max(left + wide * len(self.columns), text),
            head + line + sum(tall) + len(self.footer) * line + _MARGIN,
        )
        sheet = Image.new("RGB", total, PAPER)
        pen = ImageDraw.Draw(sheet)
        pen.text((_MARGIN, _MARGIN), self.title, INK, big)
        for index, each in enumerate(self.lines):
            pen.text((_MARGIN, _MARGIN + 2 * line + index * line), each, FAINT, normal)
        for column, name in enumerate(self.columns):
            pen.text((_MARGIN + left + column * wide, head), name, INK, normal)
        top = head + line
        for name, row, rise in zip(self.rows, self.cells, tall, strict=True):
            pen.text((_MARGIN, top + height // 2), name, INK, normal, anchor="lm")
            for column, cell in enumerate(row):
                x, y = _MARGIN + left + column * wide, top
                for picture in cell.pictures:
                    resized = picture.resize((picture.size[0] * zoom, picture.size[1] * zoom), Image.Resampling.NEAREST)
                    sheet.paste(resized, (x, y))
                    y += height + _GAP // 2
                for each in cell.lines:
                    pen.text((x, y), each, INK, normal)
                    y += line
            top += rise
        for each in self.footer:
            pen.text((_MARGIN, top), each, FAINT, normal)
            top += line
        return sheet


def difference(image: Any, reference: Any) -> NDArray[np.float64]:
    """(H, W): how far each pixel is from that of another picture of this size, the mean of its channels, 0..255."""
    first, second = (np.asarray(each.convert("RGB"), dtype=np.float64) for each in (image, reference))
    found: NDArray[np.float64] = np.abs(first - second).mean(axis=2)
    return found


def difference_map(values: NDArray[np.float64], most: float) -> Any:
    """A PIL image of differences, from black (none) to bright yellow (``most``)."""
    from matplotlib import colormaps
    from PIL import Image

    colours = colormaps["inferno"](np.clip(values / max(most, 1e-9), 0, 1))[..., :3]
    return Image.fromarray(np.round(colours * 255).astype(np.uint8))


def _tall(row: Sequence[Cell], height: int, line: int) -> int:
    return max(len(cell.pictures) * (height + _GAP // 2) + len(cell.lines) * line for cell in row) + _GAP


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _length(text: str, font: Any) -> int:
    length: float = font.getlength(text)
    return round(length)
