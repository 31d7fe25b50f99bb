"""Models from local folders in diffusers' layout: without weights on ``meta``, or whole pipelines."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sloth_fx.checks import unknown
from sloth_fx.errors import SlothError
from sloth_fx.model_adapters import adapter_for

INDEX = "model_index.json"
DENOISERS = ("unet", "transformer", "prior", "decoder", "controlnet", "transformer_2", "unconditional_transformer")
_LATENT_PIXELS = 8  # of an edge, for each row or column of the latent, where no autoencoder says so


@dataclass(frozen=True)
class OpenedModel:
    """A denoiser on ``meta``: ``folder`` is the pipeline that it is part of, if any."""

    model: nn.Module
    folder: Path | None


def open_model(path: Path, component: str | None = None) -> OpenedModel:
    """The denoiser that a pipeline folder, a model folder or a config.json describes, on ``meta``.

    ``component`` names it in a pipeline; default: the first of unet, transformer and so on. Raises
    :class:`SlothError` where ``path`` is none of these, or its class is none of diffusers' models.
    """
    _check_there(path)
    if path.is_file() and path.suffix != ".json":
        raise SlothError(f"{path} is a single file: give a folder in diffusers' layout, or a config.json")
    if (path / INDEX).is_file():
        config = path / _component(path, component) / "config.json"
        return OpenedModel(_built(config), path)
    if component is not None:
        raise SlothError(f"--component {component}: {path} is no pipeline, it has no {INDEX}")
    config = path if path.is_file() else path / "config.json"
    if config.name == INDEX:
        return open_model(config.parent, component)
    folder = config.absolute().parent.parent
    return OpenedModel(_built(config), folder if (folder / INDEX).is_file() else None)


def open_pipeline(path: Path, dtype: str, device: str) -> Any:
    """The diffusers pipeline in a local folder; nothing is downloaded, and no code in it is run."""
    _check_there(path)
    if not (path / INDEX).is_file():
        raise SlothError(f"{path} is no pipeline: it has no {INDEX}")
    diffusers = import_extra("diffusers")
    if not sys.stderr.isatty():
        diffusers.utils.logging.disable_progress_bar()
        import_extra("transformers").utils.logging.disable_progress_bar()
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            str(path), dtype=getattr(torch, dtype), local_files_only=True
        )
        return pipe.to(device)
    except (OSError, ValueError, RuntimeError, ImportError, AttributeError, KeyError, TypeError) as error:
        raise SlothError(f"{path} cannot be opened: {type(error).__name__}: {error}") from error


def latent_pixels(opened: OpenedModel) -> int:
    """How many pixels of an edge one row or column of the latent stands for; of a packed latent, one token."""
    vae = _autoencoder(opened.folder)
    axes = adapter_for(opened.model).axes or ""
    if vae is None and opened.folder is not None and "n" not in axes:
        return 1  # a pipeline without an autoencoder works on pixels
    levels = (
        next((vae[key] for key in ("block_out_channels", "encoder_block_out_channels", "dim_mult") if key in vae), ())
        if vae
        else ()
    )
    pixels = 2 ** (len(levels) - 1) if levels else _LATENT_PIXELS
    if vae and isinstance(vae.get("patch_size"), int):
        pixels *= vae["patch_size"]
    return pixels * (_packing(opened.model, vae or {}) if "n" in axes else 1)


def import_extra(name: str) -> Any:
    """A package of the extra ``cli``. Raises :class:`SlothError`, saying what to install, where it is missing."""
    try:
        return __import__(name)
    except ImportError as error:
        raise SlothError(f"this needs {name}: pip install 'sloth-fx[cli]' ({error})") from error


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises :class:`SlothError` where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SlothError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise SlothError(f"{path} is not a JSON file: {error}") from None


def _check_there(path: Path) -> None:
    if not path.exists():
        raise SlothError(f"{path} does not exist: give a local folder (nothing is downloaded)")


def _component(folder: Path, asked: str | None) -> str:
    index = read_json(folder / INDEX)
    there = [name for name, value in index.items() if isinstance(value, list) and value[:1] != [None]]
    if asked is not None and asked not in there:
        raise SlothError(f"--component {unknown(asked, there)}")
    found = asked or next((name for name in DENOISERS if name in there), None)
    if found is None:
        raise SlothError(f"{folder} has no denoiser ({', '.join(DENOISERS)}), but {', '.join(there)}")
    return found


def _built(config: Path) -> nn.Module:
    values = read_json(config)
    name = values.get("_class_name") if isinstance(values, dict) else None
    if not isinstance(name, str):
        raise SlothError(f"{config} is no config of a diffusers model: it has no _class_name")
    diffusers = import_extra("diffusers")
    kind: Any = getattr(diffusers, name, None) if name in dir(diffusers) else None
    is_model = isinstance(kind, type) and issubclass(kind, nn.Module) and hasattr(kind, "from_config")
    if not is_model:
        models = [each for each in dir(diffusers) if each.endswith(("Model", "Transformer", "UNet"))]
        raise SlothError(f"{config}: diffusers {diffusers.__version__} has no such model: {unknown(name, models):.200}")
    try:
        with torch.device("meta"):
            model: nn.Module = kind.from_config(values)
    except Exception as error:
        raise SlothError(f"{config}: {name} cannot be built from this: {type(error).__name__}: {error}") from error
    return model.eval()


def _autoencoder(folder: Path | None) -> dict[str, Any] | None:
    """The config of a pipeline's autoencoder."""
    for name in ("vae", "movq", "vqgan", "vqvae"):
        config = folder / name / "config.json" if folder is not None else None
        if config is not None and config.is_file():
            found: dict[str, Any] = read_json(config)
            return found
    return None


def _packing(model: Any, vae: dict[str, Any]) -> int:
    """Rows of the latent to a row of packed tokens: channels tell how many latent pixels were made one token."""
    channels, packed = vae.get("latent_channels"), getattr(model.config, "in_channels", None)
    if isinstance(channels, int) and isinstance(packed, int) and channels > 0:
        return max(1, round(math.sqrt(packed / channels)))
    return 2
