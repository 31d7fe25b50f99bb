"""What an adapter holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from sloth_fx.checks import Limits, accepting, between, check_fields, or_none
from sloth_fx.errors import SlothError
from sloth_fx.schedule import NoiseSchedule

Inputs = dict[str, Any]


def _spells(letters: str) -> Callable[[Any], bool]:
    """Whether a value is a string of these letters, each at most once; "_" stands for an axis that does not matter."""
    return lambda value: (
        isinstance(value, str)
        and value.strip("_") != ""
        and set(value) <= {*letters, "_"}
        and all(value.count(letter) <= 1 for letter in letters)
    )


def _are_names(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(name, str) for name in value)


NAME: Limits = or_none(accepting("the name of a parameter of forward", lambda value: isinstance(value, str)))
NAMES: Limits = or_none(accepting("a tuple of names of parameters of forward", _are_names))
SIZES: Limits = or_none(
    accepting(
        "the names of the parameters (rows, columns) or (frames, rows, columns)",
        lambda value: _are_names(value) and len(value) in (2, 3),
    )
)
AXES: Limits = or_none(
    accepting(
        "one letter per axis: b (batch), c (channels), t (frames), h (rows), w (columns), n (packed tokens), "
        '_ (other), such as "bchw" or "bnc"',
        _spells("bcthwn"),
    )
)
ID_AXES: Limits = accepting(
    'one letter per column: t (image), f (frame), h (row), w (column), _ (other), such as "thw"',
    lambda value: _spells("tfhw")(value) and "h" in value and "w" in value,
)
FINITE: Limits = between(-1e9, 1e9)
NOISE: Limits = or_none(accepting("a NoiseSchedule", lambda value: isinstance(value, NoiseSchedule)))
FUNCTION: Limits = or_none(accepting("a function of the model", callable))


@dataclass(frozen=True, kw_only=True)
class ModelAdapter:
    """Data about one family of models: what the arguments of ``forward`` mean. Every field may be left out.

    The latent is the tensor that is denoised:

    - ``latent``: the parameter that holds it (a tensor, or a list with one per image). ``None``: the first floating
      point argument with three dimensions or more.
    - ``axes``: its axes, one letter each: batch b, channels c, frames t, rows h, columns w, packed tokens n, any other
      _. ``None``: by the number of dimensions, "bchw", "bcthw" or "bnc".

    Where tokens are packed (n), one of these says how they lie:

    - ``ids``: the parameter with the coordinates of each token, (N, A) or (B, N, A), and ``id_axes``: which of the A
      columns are image t, frame f, row h and column w (any further ones do not matter). Of several images (t), the
      first is the latent; the others are references. ``id_rows`` names the parameter with the indices (N,) of the
      latent's tokens, where the coordinates are those of a longer sequence.
    - ``shapes``: the parameter with [(frames, rows, columns), ...], for one image or for each; the first entry is the
      latent, or the one at index ``target``.
    - ``sizes``: the parameters with the numbers (rows, columns) or (frames, rows, columns).

    ``text`` names the parameters with text (``None``: every other argument with three dimensions or more, unless its
    name speaks of something else). ``timestep`` names the parameter with the timestep, which goes from ``timesteps``
    (start of sampling) to ``final_timestep`` (its end). ``noise`` is the schedule that the model was trained with,
    which turns timesteps into sigmas (``None``: unknown, so the caller has to give sigma). ``inputs(model)`` makes
    keyword arguments for a trial run, of which only shapes and dtypes matter.

    Raises :class:`SlothError` for a value that makes no sense, naming the field.
    """

    latent: str | None = field(default=None, metadata=NAME)
    axes: str | None = field(default=None, metadata=AXES)
    ids: str | None = field(default=None, metadata=NAME)
    id_axes: str = field(default="thw", metadata=ID_AXES)
    id_rows: str | None = field(default=None, metadata=NAME)
    shapes: str | None = field(default=None, metadata=NAME)
    target: int = field(default=0, metadata=between(-1000, 1000, whole=True))
    sizes: tuple[str, ...] | None = field(default=None, metadata=SIZES)
    text: tuple[str, ...] | None = field(default=None, metadata=NAMES)
    timestep: str | None = field(default=None, metadata=NAME)
    timesteps: float = field(default=1000.0, metadata=FINITE)
    final_timestep: float = field(default=0.0, metadata=FINITE)
    noise: NoiseSchedule | None = field(default=None, metadata=NOISE)
    inputs: Callable[[nn.Module], Inputs] | None = field(default=None, metadata=FUNCTION)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.timesteps == self.final_timestep:
            raise SlothError(
                f"ModelAdapter: timesteps={self.timesteps:g} is refused: sampling starts and ends at the same timestep"
            )
        ways = [name for name in ("ids", "shapes", "sizes") if getattr(self, name) is not None]
        if len(ways) > 1:
            raise SlothError(f"ModelAdapter: {' and '.join(ways)} both say the size of a packed latent: give one")

    def progress(self, timestep: float) -> float:
        """Where in the sampling run ``timestep`` is: 0 at its start, 1 at its end; clamped to that."""
        done = (self.timesteps - timestep) / (self.timesteps - self.final_timestep)
        return min(max(done, 0.0), 1.0) if math.isfinite(done) else 0.0
