"""Running a pipeline, with and without specs, from the same noise."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

import sloth_fx
from sloth_fx.cli.options import width_and_height
from sloth_fx.errors import SlothError
from sloth_fx.spec import NAG, Spec


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to paint. ``guidance`` and ``size`` (width, height in pixels) are ``None`` for the pipeline's own; image i
    of ``count`` starts from the noise of ``seed`` + i."""

    prompt: str
    negative_prompt: str | None = None
    seed: int = 0
    steps: int = 30
    guidance: float | None = None
    size: tuple[int, int] | None = None
    count: int = 1

    @classmethod
    def of(cls, *, size: str | None, **values: Any) -> Settings:
        """From the values of options; raises a usage error for a size that is none."""
        return cls(size=width_and_height(size) if size is not None else None, **values)

    def arguments(self, pipe: Any, *, guided: bool = False) -> dict[str, Any]:
        """For a call of ``pipe``, which NAG guides or not. Raises :class:`SlothError` where it does not take them."""
        width, height = self.size if self.size is not None else (None, None)
        asked = {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "guidance_scale": self.guidance,
            "width": width,
            "height": height,
            "num_inference_steps": self.steps,
            "num_images_per_prompt": self.count if self.count > 1 else None,
        }
        given = {name: value for name, value in asked.items() if value is not None}
        known = inspect.signature(pipe.__call__).parameters
        if guided and "negative_prompt" not in known:
            given.pop("negative_prompt", None)  # it goes to NAG
        refused = [name for name in given if name not in known]
        if refused:
            raise SlothError(f"{type(pipe).__name__} takes no {', '.join(refused)}: it takes {', '.join(known)}")
        seeds = [torch.Generator("cpu").manual_seed(self.seed + i) for i in range(self.count)]
        return {**given, "generator": seeds if self.count > 1 else seeds[0]}


def paint(pipe: Any, settings: Settings, specs: Sequence[Spec], done: Callable[[], object]) -> list[Any]:
    """``settings.count`` PIL images, with ``specs`` attached (none: the pipeline as it is).

    ``done`` is called after each step. Raises :class:`SlothError` where the pipeline does not run as asked.
    """
    guided = any(isinstance(spec, NAG) for spec in specs)
    if guided and settings.negative_prompt is None:
        raise SlothError("NAG needs a negative prompt: give --negative-prompt")
    arguments = settings.arguments(pipe, guided=guided)
    steps = 0

    def step_done(_pipe: Any, _step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        nonlocal steps
        steps += 1
        done()
        return values

    if "callback_on_step_end" in inspect.signature(pipe.__call__).parameters:
        arguments["callback_on_step_end"] = step_done
    pipe.set_progress_bar_config(disable=True)
    negative = settings.negative_prompt if guided else None
    with sloth_fx.attach(pipe, list(specs), negative_prompt=negative) if specs else nullcontext():
        try:
            images = pipe(**arguments).images
        except SlothError:
            raise
        except (ValueError, TypeError, RuntimeError, AttributeError) as error:
            raise SlothError(f"{type(pipe).__name__} failed: {type(error).__name__}: {error}") from error
    for _ in range(steps, settings.steps):
        done()
    return list(images)
