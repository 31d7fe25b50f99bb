"""What the docstring of a spec says of each field."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from functools import cache
from typing import Any

_NO_USE = re.compile(r" (Source:|Raises SlothError).*| \(:\w+:`[^`]*`\)")  # to whoever sets a widget


@cache
def documented(kind: Any) -> dict[str, str]:
    """What the docstrings of a dataclass and of its bases say of its fields: ``"scale: 1..100 ..."``, with several
    names before the colon, or several entries one after another. An entry goes on to the next, or to an empty line;
    those that say no more than where to look are left out."""
    names = "|".join(each.name for each in fields(kind))
    entry = re.compile(rf"(?:^|(?<=\n)|(?<=[.;] ))((?:{names})(?:, (?:{names}))*): ")
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(base.__dict__.get("__doc__") or "")):
            _, *parts = entry.split(paragraph)
            for heads, text in zip(parts[::2], parts[1::2], strict=True):
                told = _NO_USE.sub("", " ".join(text.split())).strip("; ")
                if not told.startswith("as in "):
                    found |= dict.fromkeys(heads.split(", "), told)
    return found


def summary(kind: type) -> str:
    """The first paragraph of a docstring."""
    return " ".join(inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0].split())
