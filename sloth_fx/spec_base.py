"""What all specs have in common: their fields are checked, and they have a JSON form."""

from __future__ import annotations

from dataclasses import Field, asdict, fields
from typing import Any, ClassVar

from sloth_fx.checks import Limits, between, check_fields
from sloth_fx.errors import SlothError
from sloth_fx.schedule import SCHEDULES
from sloth_fx.where import Where, as_json, validate

VERSION = 1
"""Version of the JSON form that `to_dict` writes."""

SEED: Limits = between(0, 2**63 - 1, whole=True)


class BaseSpec:
    """A frozen dataclass with a selector, `where`. Lists become tuples, so that JSON can be given as it is."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    where: Where

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, list):
                object.__setattr__(self, each.name, tuple(value))
        check_fields(self)
        object.__setattr__(self, "where", validate(self.where))

    def to_dict(self) -> dict[str, Any]:
        """The spec as JSON values, for `load_spec`; SlothError for a schedule of your own, or a function as where."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        values["where"] = as_json(self.where)
        if "schedule" in values:
            values["schedule"] = _schedule(values["schedule"])
        plain = {name: _plain(value) for name, value in values.items()}
        return {"version": VERSION, "type": type(self).__name__, **plain}


def _schedule(schedule: Any) -> dict[str, Any]:
    kind = type(schedule)
    if kind not in SCHEDULES.values():
        raise SlothError(f"schedule={schedule!r:.80} has no JSON form: {', '.join(SCHEDULES)} have one")
    return {"type": kind.__name__, **asdict(schedule)}


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return asdict(value)
    return list(value) if isinstance(value, tuple) else value
