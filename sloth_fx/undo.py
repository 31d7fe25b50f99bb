"""Takes back what was done to a model and its context, where it turns out in the middle that it cannot be done."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def undone_on_error(model: nn.Module, context: Any) -> Iterator[None]:
    """If the block raises, the modules of ``model`` have the forwards and children that they had, and ``context`` what
    it knew."""
    modules = [(module, dict(vars(module)), dict(module._modules)) for module in model.modules()]
    known = {name: copy.copy(value) for name, value in vars(context).items()}
    try:
        yield
    except BaseException:
        for module, attributes, children in modules:
            vars(module).clear()
            vars(module).update(attributes, _modules=children)
        vars(context).update(known)
        raise
