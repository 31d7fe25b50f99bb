"""``sloth-fx comfyui``: puts the node pack where ComfyUI looks for it, and takes it away again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sloth_fx.cli.console import say
from sloth_fx.errors import SlothError

app = typer.Typer(no_args_is_help=True, help="Install the nodes for ComfyUI, and remove them.")
Folder = Annotated[Path, typer.Argument(metavar="PATH", help="The folder of ComfyUI: the one that holds custom_nodes.")]

PACK = "sloth_fx"
LOADER = '''"""The nodes of sloth_fx, which has to be installed for the Python that runs ComfyUI."""

from sloth_fx.integrations.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS  # noqa: F401
'''


@app.command(epilog="Example: sloth-fx comfyui install ~/ComfyUI")
def install(path: Folder) -> None:
    """Write custom_nodes/sloth_fx/__init__.py, which loads the nodes when ComfyUI starts."""
    loader = _loader_in(path)
    if loader.exists() and not _is_ours(loader):
        raise SlothError(f"{loader} is another one's: move {loader.parent} away, or use it as it is")
    try:
        loader.parent.mkdir(exist_ok=True)
        loader.write_text(LOADER, encoding="utf-8")
    except OSError as error:
        raise SlothError(f"cannot write {loader}: {error.strerror}") from None
    say(f"{loader} is written: start ComfyUI anew")


@app.command(epilog="Example: sloth-fx comfyui uninstall ~/ComfyUI")
def uninstall(path: Folder) -> None:
    """Remove what install has written, and nothing else."""
    loader = _loader_in(path)
    if not loader.exists():
        raise SlothError(f"{loader.parent} holds no nodes of sloth_fx: there is nothing to remove")
    if not _is_ours(loader):
        raise SlothError(f"{loader} is another one's, and stays")
    try:
        loader.unlink()
        for cached in (loader.parent / "__pycache__").glob("__init__.*.pyc"):
            cached.unlink()
        for folder in (loader.parent / "__pycache__", loader.parent):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
    except OSError as error:
        raise SlothError(f"cannot remove {loader}: {error.strerror}") from None
    say(f"{loader} is removed")


def _loader_in(path: Path) -> Path:
    """Raises :class:`SlothError` for a folder that is not ComfyUI's."""
    nodes = path / "custom_nodes"
    if not nodes.is_dir():
        hint = "; give the folder above" if path.name == "custom_nodes" else ""
        raise SlothError(f"{path} is no folder of ComfyUI: it has no custom_nodes{hint}")
    return nodes / PACK / "__init__.py"


def _is_ours(loader: Path) -> bool:
    try:
        return "sloth_fx.integrations.comfyui" in loader.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
