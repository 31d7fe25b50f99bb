"""The picture of the demo: rows of images with their numbers on the left, and a prompt above each column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw, ImageFont

INK, FAINT, PAPER, RULE = "#22223b", "#6d6d85", "#ffffff", "#d8d8e2"
RIGHT, WRONG = "#2a9d4e", "#d1383d"
ZOOM, LABEL, GAP, MARGIN = 2, 250, 12, 32  # pixels, all but the first


@dataclass(frozen=True)
class Row:
    """One row: name, words and numbers (what, value) on its left; ``marks`` say which images are right."""

    name: str
    words: str
    numbers: Sequence[tuple[str, str]]
    images: Sequence[Image.Image]
    marks: Sequence[bool] | None = None


def sheet(title: str, line: str, columns: Sequence[str], rows: Sequence[Row], footer: Sequence[str]) -> Image.Image:
    """All rows in one picture; images are of one size, and shown at twice of it."""
    width, height = (edge * ZOOM for edge in rows[0].images[0].size)
    heads = [wrapped(each, width, font(13)) for each in columns]
    foot = [part for each in footer for part in wrapped(each, LABEL + len(columns) * (width + GAP), font(13))]
    top = MARGIN + 84 + 18 * max(map(len, heads))
    bottom = top + len(rows) * (height + GAP)
    size = (2 * MARGIN + LABEL + len(columns) * (width + GAP) - GAP, bottom + GAP + 20 * len(foot) + MARGIN)
    picture = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(picture)
    pen.text((MARGIN, MARGIN), title, INK, font(26))
    pen.text((MARGIN, MARGIN + 38), line, FAINT, font(15))
    for index, head in enumerate(heads):
        left = MARGIN + LABEL + index * (width + GAP)
        _lines(pen, (left, top - 12 - 18 * len(head)), head, INK, 13)
    for index, row in enumerate(rows):
        y = top + index * (height + GAP)
        pen.line((MARGIN, y - GAP // 2, MARGIN + LABEL - 2 * GAP, y - GAP // 2), RULE)
        _label(pen, y, row)
        for column, image in enumerate(row.images):
            x = MARGIN + LABEL + column * (width + GAP)
            picture.paste(image.resize((width, height), Image.Resampling.LANCZOS), (x, y))
            if row.marks is not None:
                picture.paste(_mark(row.marks[column]), (x + width - 14, y + height - 14), _mark(row.marks[column]))
    _lines(pen, (MARGIN, bottom + GAP), foot, FAINT, 13, step=20)
    return picture


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def wrapped(text: str, width: int, face: ImageFont.FreeTypeFont) -> list[str]:
    """The text in lines that are no wider than ``width``, unless a single word is."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        lines[-1:] = [longer] if face.getlength(longer) <= width else [*lines[-1:], word]
    return lines


def _label(pen: ImageDraw.ImageDraw, top: int, row: Row) -> None:
    pen.text((MARGIN, top), row.name, INK, font(18))
    words = wrapped(row.words, LABEL - 2 * GAP, font(13))
    _lines(pen, (MARGIN, top + 26), words, FAINT, 13)
    for index, (what, value) in enumerate(row.numbers):
        y = top + 34 + 18 * len(words) + 19 * index
        pen.text((MARGIN, y), what, FAINT, font(13))
        pen.text((MARGIN + 110, y), value, INK, font(13))


def _lines(
    pen: ImageDraw.ImageDraw, at: tuple[int, int], lines: Sequence[str], colour: str, size: int, step: int = 18
) -> None:
    for index, each in enumerate(lines):
        pen.text((at[0], at[1] + step * index), each, colour, font(size))


@cache
def _mark(right: bool) -> Image.Image:
    """A tick or a cross on a disc, drawn four times too large for soft edges."""
    mark = Image.new("RGBA", (88, 88), (0, 0, 0, 0))
    pen = ImageDraw.Draw(mark)
    pen.ellipse((0, 0, 87, 87), PAPER)
    pen.ellipse((6, 6, 81, 81), RIGHT if right else WRONG)
    strokes = [[(24, 46), (38, 60), (64, 30)]] if right else [[(29, 29), (59, 59)], [(59, 29), (29, 59)]]
    for stroke in strokes:
        pen.line(stroke, PAPER, 10, joint="curve")
    return mark.resize((22, 22), Image.Resampling.LANCZOS)
