"""Images, batch by batch, and what is kept of them on disk: enough for the report, and not the images themselves."""

from __future__ import annotations

import copy
import hashlib
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, wait
from numpy.typing import NDArray
from quality_measures import measured
from quality_points import Point

import sloth_fx
from sloth_fx.cli.judge import Judge

LAB = ROOT / "examples" / "lab"
sys.path.append(str(LAB))  # the lab is no package

import evaluate  # noqa: E402

THUMBNAILS = 3  # images of the first batch that are kept
SIZE = 64  # pixels of an edge
FORM = 1  # of what is stored; another number makes all that is stored unknown


@dataclass(frozen=True)
class Conditions:
    """What images and times depend on, besides the spec. ``weights`` is the :func:`digest` of pipeline and judge."""

    weights: str
    steps: int = 20
    guidance: float = 4.0
    batch: int = 25
    device: str = "cpu"
    form: int = FORM


@dataclass(frozen=True)
class Batch:
    """``features`` (N, F) of the judge; ``measures`` (N, len(MEASURES)); ``seconds`` of the pipeline's call;
    ``thumbnails`` (0, THUMBNAILS or N, 64, 64, 3); ``machine``: on which it was made, in words."""

    features: NDArray[np.float32]
    measures: NDArray[np.float64]
    seconds: float
    thumbnails: NDArray[np.uint8]
    machine: str


def digest(*folders: Path) -> str:
    """Of all weights and configs in the folders."""
    found = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".safetensors", ".json"):
                found.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:16]


class Store:
    """The results of one model under fixed conditions. Each point has a folder, whose name has a digest of the point's
    spec and the conditions; so what was made otherwise is not found."""

    def __init__(self, folder: Path, conditions: Conditions) -> None:
        self.folder, self.conditions = folder, conditions

    def path(self, point: Point, batch: int) -> Path:
        made = json.dumps(self._made(point), sort_keys=True)
        return self.folder / f"{point.name}-{hashlib.sha256(made.encode()).hexdigest()[:8]}" / f"{batch:04}.npz"

    def has(self, point: Point, batch: int) -> bool:
        return self.path(point, batch).exists()

    def done(self, point: Point, batches: int) -> int:
        """How many of so many batches there are, from the first on."""
        return next((index for index in range(batches) if not self.has(point, index)), batches)

    def save(self, point: Point, batch: int, made: Batch) -> None:
        path = self.path(point, batch)
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "made.json").write_text(json.dumps(self._made(point), indent=1) + "\n", encoding="utf-8")
        unfinished = path.with_suffix(".new")
        with unfinished.open("wb") as file:
            np.savez_compressed(file, **{name: np.asarray(value) for name, value in vars(made).items()})
        unfinished.replace(path)

    def load(self, point: Point, batches: Iterable[int]) -> list[Batch]:
        return [self._load(self.path(point, batch)) for batch in batches]

    def _load(self, path: Path) -> Batch:
        with np.load(path) as stored:
            arrays = {name: stored[name] for name in stored.files}
        return Batch(**{**arrays, "seconds": float(arrays["seconds"]), "machine": str(arrays["machine"])})

    def _made(self, point: Point) -> dict[str, Any]:
        spec = point.spec.to_dict() if point.spec is not None else None
        return {"spec": spec, "first_seed": point.first_seed, **asdict(self.conditions)}


class Painter:
    """Paints batches of held-out prompts at any point. Each point keeps a patched denoiser of its own, over the same
    weights: to patch takes as long as some images do. ``whole`` keeps all images, and not only some of the first batch.
    """

    def __init__(
        self, pipe: Any, judge: Judge, conditions: Conditions, machine: str = "", *, whole: bool = False
    ) -> None:
        self.pipe, self.judge, self.conditions, self.machine, self.whole = pipe, judge, conditions, machine, whole
        self._pipes: dict[Point, Any] = {}

    def batch(self, point: Point, index: int) -> Batch:
        first = index * self.conditions.batch
        texts = evaluate.prompts(first + self.conditions.batch)[first:]
        seeds = [point.first_seed + first + each for each in range(len(texts))]
        pipe = self._attached(point, texts, seeds)
        device = torch.device(self.conditions.device)
        wait(device)
        began = time.perf_counter()
        images = self._paint(pipe, texts, seeds, self.conditions.steps)
        wait(device)
        seconds = time.perf_counter() - began
        kept = images if self.whole else images[: THUMBNAILS if index == 0 else 0]
        return Batch(
            features=self.judge.features(images).astype(np.float32),
            measures=measured(images, texts, self.judge),
            seconds=seconds,
            thumbnails=np.array([np.asarray(each) for each in kept], np.uint8).reshape(-1, SIZE, SIZE, 3),
            machine=self.machine,
        )

    def _attached(self, point: Point, texts: Sequence[str], seeds: Sequence[int]) -> Any:
        if point not in self._pipes:
            pipe = copy.copy(self.pipe)  # has the same parts; what is attached to it is its own
            if point.spec is not None:
                sloth_fx.attach(pipe, point.spec)
            self._paint(pipe, texts, seeds, 2)  # the first calls capture and allocate
            self._pipes[point] = pipe
        return self._pipes[point]

    def _paint(self, pipe: Any, texts: Sequence[str], seeds: Sequence[int], steps: int) -> list[Any]:
        noise = [torch.Generator().manual_seed(seed) for seed in seeds]
        guidance = self.conditions.guidance
        call = {"generator": noise, "height": SIZE, "width": SIZE, "guidance_scale": guidance}
        return list(pipe(list(texts), num_inference_steps=steps, **call, **evaluate.options(pipe)).images)


def features(batches: Iterable[Batch]) -> NDArray[np.float64]:
    return np.concatenate([each.features for each in batches]).astype(np.float64)


def missing(store: Store, points: Sequence[Point], batches: int) -> list[tuple[Point, int]]:
    """What is to be made, batch by batch; each batch begins with another point, so that drift of the machine falls on
    all alike."""
    turns = [(points[(turn + batch) % len(points)], batch) for batch in range(batches) for turn in range(len(points))]
    return [(point, batch) for point, batch in turns if not store.has(point, batch)]
