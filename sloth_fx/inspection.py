"""Looking at a model, and into a patched one."""

from __future__ import annotations

import difflib
from typing import Any

from torch import fx, nn

from sloth_fx.context import TimestepContext
from sloth_fx.errors import SlothError
from sloth_fx.locate import as_call, survey
from sloth_fx.model_adapters import adapter_for, trial_call
from sloth_fx.patch import patch_of
from sloth_fx.planner import why_left_alone
from sloth_fx.report import Report, SiteReport
from sloth_fx.site import AttentionSite
from sloth_fx.transform import check_module, check_untouched


def inspect(model: nn.Module, *, example_inputs: Any = None) -> Report:
    """Every attention site of ``model``, which is not changed and computes nothing: weights may lie on ``meta``.

    Args:
        model: a module that computes attention.
        example_inputs: as for :func:`sloth_fx.transform`; needed where the class of the model is not known.

    Raises:
        SlothError: no module, one that is compiled or patched (for which there is :func:`report`), no attention, no
            inputs, or inputs that the model rejects.
    """
    check_module(model)
    check_untouched(model)
    adapter = adapter_for(model)
    call = as_call(example_inputs) if example_inputs is not None else trial_call(model, adapter)
    if call is None:
        raise SlothError(f"the inputs of {type(model).__name__} are not known: give example_inputs")
    sites = survey(model, adapter, call).sites
    return Report(type(model).__name__, tuple(SiteReport.of(site, note=_note(site)) for site in sites))


def _note(site: AttentionSite) -> str:
    """What is worth knowing of a site before anything is done to it."""
    return why_left_alone(site) if site.kind == "linear" else site.refusal or ""


def report(patched: nn.Module) -> Report:
    """Every attention site of a patched model, with the operators at work there, where they are, or why there are none.

    Raises :class:`SlothError` for a model that is not patched.
    """
    return patch_of(patched).report


def context(patched: nn.Module) -> TimestepContext:
    """The timestep context of a patched model. Raises :class:`SlothError` for a model that is not patched."""
    return patch_of(patched).context


def graph(patched: nn.Module, site_path: str) -> fx.Graph:
    """The rewritten graph of the owner at ``site_path`` (a path as in :func:`report`), for reading.

    Raises :class:`SlothError` for a model that is not patched, or a path at which nothing was rewritten.
    """
    patch = patch_of(patched)
    graphs = patch.graphs
    if site_path not in graphs:
        near = ", ".join(difflib.get_close_matches(str(site_path), graphs, n=3, cutoff=0.0))
        raise SlothError(
            f"nothing was rewritten at {site_path!r}; nearest: {near or patch.report.note or 'no site at all'}"
        )
    return graphs[site_path]
