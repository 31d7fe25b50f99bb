"""A judge of pictures: an image classifier whose labels are phrases that prompts contain."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sloth_fx.checks import unknown
from sloth_fx.cli.models import import_extra
from sloth_fx.errors import SlothError

_BATCH = 16
_HEADS = ("classifier", "head", "score", "fc")

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


class Judge:
    """A transformers image classifier with several labels at once (a sigmoid each), in a local folder.

    ``labels`` are its phrases, such as "red circle on the left". Images are PIL images; they are resized (bicubic) to
    ``image_size`` of the config if it has one, and scaled to -1..1.

    Raises :class:`SlothError` for a folder that holds no such model.
    """

    def __init__(self, folder: Path | str) -> None:
        if not (Path(folder) / "config.json").is_file():
            raise SlothError(f"{folder} is no judge: a folder with an image classifier (config.json) of transformers")
        auto = import_extra("transformers").AutoModelForImageClassification
        try:
            self._model = auto.from_pretrained(str(folder), local_files_only=True).float().eval()
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError) as error:
            raise SlothError(f"{folder} is no judge: {type(error).__name__}: {error}") from error
        names = self._model.config.id2label
        self.labels: tuple[str, ...] = tuple(str(names[index]) for index in sorted(names))

    def promised(self, prompt: str) -> tuple[str, ...]:
        """The labels whose phrase the prompt contains, as whole words, in upper or lower case."""
        return tuple(label for label in self.labels if _contains(prompt, label))

    def scores(self, images: Sequence[Any]) -> Floats:
        """(N, labels): how sure the judge is that an image shows a label, 0..1."""
        logits = [self._model(pixel_values=pixels).logits for pixels in self._batches(images)]
        return _joined([torch.sigmoid(each.double()) for each in logits], len(self.labels))

    def right(self, images: Sequence[Any], prompts: Sequence[str]) -> Flags:
        """(N,): whether an image shows all that its prompt promises, and nothing else; above 0.5 counts as shown."""
        if len(images) != len(prompts):
            raise SlothError(f"{len(images)} images and {len(prompts)} prompts: give a prompt for each image")
        promised = [self.promised(prompt) for prompt in prompts]
        expected = np.array([[label in each for label in self.labels] for each in promised], dtype=bool)
        shown = self.scores(images) > 0.5
        return np.asarray((shown == expected.reshape(shown.shape)).all(axis=1), dtype=np.bool_)

    def shows(self, images: Sequence[Any], phrase: str) -> Flags:
        """(N,): whether an image shows a label: the one that ``phrase`` is, or any that contains it."""
        exact = [index for index, label in enumerate(self.labels) if label.casefold() == phrase.casefold()]
        meant = exact or [index for index, label in enumerate(self.labels) if _contains(label, phrase)]
        if not meant:
            raise SlothError(f"label {unknown(phrase, self.labels)}")
        return np.asarray((self.scores(images)[:, meant] > 0.5).any(axis=1), dtype=np.bool_)

    def features(self, images: Sequence[Any]) -> Floats:
        """(N, F): what the last layer of the judge makes its labels of."""
        head = next((getattr(self._model, name) for name in _HEADS if hasattr(self._model, name)), None)
        if not isinstance(head, torch.nn.Module):
            raise SlothError(f"{type(self._model).__name__} has no last layer that is called {' or '.join(_HEADS)}")
        found: list[torch.Tensor] = []
        handle = head.register_forward_pre_hook(lambda _, args: found.append(args[0].flatten(1).double()))
        try:
            for pixels in self._batches(images):
                self._model(pixel_values=pixels)
        finally:
            handle.remove()
        return _joined(found, 0)

    def _batches(self, images: Sequence[Any]) -> Iterator[torch.Tensor]:
        with torch.no_grad():
            for start in range(0, len(images), _BATCH):
                pixels = np.stack([self._pixels(image) for image in images[start : start + _BATCH]])
                yield torch.from_numpy(pixels).to(self._model.device, self._model.dtype)

    def _pixels(self, image: Any) -> NDArray[np.float32]:
        """(3, H, W), -1..1."""
        size = getattr(self._model.config, "image_size", None)
        height, width = (size, size) if isinstance(size, int) else (size or image.size[::-1])
        picture = image.convert("RGB")
        if picture.size != (width, height):
            picture = picture.resize((width, height), 3)  # bicubic
        return np.asarray(picture, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1


def frechet(features_a: Floats, features_b: Floats) -> float:
    """The Frechet distance of two sets of features (N, F), as if each were normally distributed; 0 for equal ones.

    |mean_a - mean_b|^2 + trace(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)). Source: Heusel et al. 2017, GANs trained by a
    two time-scale update rule. Raises :class:`SlothError` for fewer than 2 samples, or other numbers of features.
    """
    a, b = (np.asarray(each, dtype=np.float64) for each in (features_a, features_b))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise SlothError(f"features of shape {a.shape} and {b.shape}: give two sets (N, F), N at least 2, F the same")
    cov_a, cov_b = (np.atleast_2d(np.cov(each, rowvar=False)) for each in (a, b))
    # The trace of the root of cov_a cov_b is that of the root of a symmetric matrix with the same eigenvalues.
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(np.clip(values, 0, None)) @ vectors.T
    mixed = np.sqrt(np.clip(np.linalg.eigvalsh(root @ cov_b @ root), 0, None)).sum()
    means = ((a.mean(axis=0) - b.mean(axis=0)) ** 2).sum()
    return max(0.0, float(means + np.trace(cov_a) + np.trace(cov_b) - 2 * mixed))


def _contains(text: str, phrase: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE) is not None


def _joined(parts: list[torch.Tensor], columns: int) -> Floats:
    return torch.cat(parts).cpu().numpy() if parts else np.zeros((0, columns))
