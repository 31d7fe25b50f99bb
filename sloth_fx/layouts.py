"""The layouts that operators have in a model, where no context sets them: in a copy on trial."""

from __future__ import annotations

from typing import Any

from torch import nn

from sloth_fx.operators import KeyLayout


def has_layouts(module: nn.Module) -> bool:
    """Whether there are operators in a module: whatever a context steers has a layout."""
    return any(isinstance(getattr(each, "layout", None), KeyLayout) for each in module.modules())


def set_layouts(model: nn.Module, **changes: Any) -> None:
    """Change these fields in the layout of every operator."""
    for module in model.modules():
        layout = getattr(module, "layout", None)
        if isinstance(layout, KeyLayout):
            module.__dict__["layout"] = layout._replace(**changes)
