"""From a graph to a Python function."""

from __future__ import annotations

import itertools
import linecache
from collections.abc import Callable
from typing import Any

from torch import fx

_numbers = itertools.count()


def generate(graph: fx.Graph, name: str) -> Callable[..., Any]:
    """The function ``forward(self, *placeholders)`` of a graph; tracebacks and debuggers show its source."""
    code = graph.python_code("self")
    filename = f"<sloth_fx {name} {next(_numbers)}>"
    linecache.cache[filename] = (len(code.src), None, code.src.splitlines(keepends=True), filename)
    namespace = dict(code.globals)
    exec(compile(code.src, filename, "exec"), namespace)  # the graph's own code, not a caller's
    function: Callable[..., Any] = namespace["forward"]
    return function
