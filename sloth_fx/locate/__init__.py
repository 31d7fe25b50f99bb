"""Step one: find every attention of a model, from runs that know only shapes. Nothing is changed."""

from sloth_fx.locate.survey import Survey, as_call, survey

__all__ = ["Survey", "as_call", "survey"]
