"""The command line, ``sloth-fx``. It needs the extra ``cli``; nothing else imports this package."""

from __future__ import annotations

import sys
from importlib.util import find_spec

_NEEDED = ("typer", "rich")


def main() -> None:
    """What the command ``sloth-fx`` runs."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        sys.exit(f"sloth-fx needs {' and '.join(missing)}: pip install 'sloth-fx[cli]'")
    from sloth_fx.cli.app import app

    app(prog_name="sloth-fx")
