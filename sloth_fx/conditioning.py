"""What the rows of a batch are conditioned on: their groups, and the text that is not wanted."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from sloth_fx.branching import Groups
from sloth_fx.capture.capture import Call
from sloth_fx.errors import SlothError
from sloth_fx.model_adapters import Arguments
from sloth_fx.negative import Guide, Negative

CONDITIONAL = "cond"


@dataclass(eq=False)
class Conditioning:
    """``groups`` of the batch lie one after another, and ``names`` says what each is, as far as somebody told.

    ``guide`` brings the ``negative`` text into the model; there is none before a pending transform that ``expects`` it.
    """

    expects: bool
    names: tuple[str, ...] = (CONDITIONAL,)
    groups: int = 1
    guide: Guide | None = None
    negative: Negative | None = None

    @property
    def rows(self) -> Groups:
        """For each group, whether it is guided."""
        return tuple(name == CONDITIONAL for name in self.names)

    def name_groups(self, names: Any) -> None:
        """Raises :class:`SlothError` unless ``names`` are strings."""
        given = tuple(names) if isinstance(names, (list, tuple)) else ()
        if not given or not all(isinstance(name, str) for name in given):
            raise SlothError(f'rows={names!r:.80}: a name for each group of the batch, as in ("uncond", "cond")')
        self.names, self.groups = given, len(given)

    def count_groups(self, count: Any) -> None:
        """Raises :class:`SlothError` for what is no number of groups."""
        if not isinstance(count, numbers.Integral) or isinstance(count, bool) or count < 1:
            raise SlothError(f"halves={count!r}: the number of conditioning groups in the batch, 1 or more")
        self.groups = int(count)

    def set_negative(self, arguments: Mapping[str, Any], model: Arguments) -> None:
        """Raises :class:`SlothError` for what cannot be the negative text of a ``model``."""
        if self.guide is None and not self.expects:
            raise SlothError("nothing here takes a negative text: transform the model with NAG(...)")
        model.check_names(arguments)
        negative = Negative.of(arguments)
        if not negative.tensors:
            raise SlothError("set_negative: give the negative text as the model takes it, encoder_hidden_states=...")
        self.negative = negative

    def bring_negative(self, model: nn.Module, call: Call, arguments: Arguments) -> None:
        """Bring the negative text into ``model`` for a guided ``call``. Raises :class:`SlothError` if there is none, or
        none that goes with this call."""
        if self.negative is None:
            given = ", ".join(f"{name}=..." for name in arguments.text(*call)) or "encoder_hidden_states=..."
            raise SlothError(
                f"NAG has no negative text: give it with sloth_fx.context(model).set_negative({given}) before this call"
            )
        if len(self.names) != self.groups:
            raise SlothError(
                f"the batch holds {self.groups} groups of conditioning, and rows names {len(self.names)}: say what "
                'they are with rows of the context, as in ("uncond", "cond")'
            )
        assert self.guide is not None
        self.guide.prepare(model, call, self.negative, self.rows)
