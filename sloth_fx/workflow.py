"""Specs from a ComfyUI workflow: its Slothful and Near-sighted nodes, with the values that they hold there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sloth_fx.errors import SlothError
from sloth_fx.node_values import NODES, Form
from sloth_fx.spec import NearSightedAttention, NearSightedTile, SlothfulAttention, Spec

SPECS = {each.__name__: each for each in (SlothfulAttention, NearSightedTile, NearSightedAttention)}
FORMS: Mapping[str, tuple[str, str]] = {
    node + ("Simple" if form == "simple" else ""): (node, form)
    for node, releases in NODES.items()
    for forms in releases.values()
    for form in forms
}
"""Which node of `node_values`, and which form of it, a type of a workflow is."""

OFF = {2: "muted", 4: "bypassed"}
_NO_WIDGETS = {"NearSightedAttentionSimple": ("mode", "depth_decay")}  # `from_node` takes them, the node fixes them
_LATER_PACK = "nearsighted_attention"
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, kw_only=True)
class WorkflowNode:
    """One node of a workflow, and the spec that does what it does.

    id: as in the workflow; a node within a subgraph is "outer:inner". type: such as "NearSightedAttentionSimple".
    title: what the workflow calls it, if anything. release: the node's, as `from_node` takes it.
    """

    id: str
    type: str
    title: str | None
    release: str
    spec: Spec


class _Node(NamedTuple):
    """What either form of a workflow says of a node.

    ``values`` are those of its widgets, by name or in order; ``linked`` the parameters that come from elsewhere.
    """

    id: str
    type: str
    title: str | None
    values: Mapping[str, Any] | Sequence[Any]
    linked: tuple[str, ...] = ()
    off: str = ""
    pack: str = ""

    def __str__(self) -> str:
        return f"node {self.id} ({self.type}{f', {self.title!r:.60}' if self.title else ''})"


def read_workflow(source: str | os.PathLike[str] | Mapping[str, Any]) -> list[WorkflowNode]:
    """The Slothful and Near-sighted nodes of a ComfyUI workflow, in the order it lists them, each with its spec.

    Args:
        source: a workflow as it is saved ({"nodes": [...]}, with subgraphs), or as it is exported for the API
            ({"3": {"class_type": ..., "inputs": ...}}): the JSON object, or the path of a file that holds it. That may
            be a PNG that ComfyUI made, too, which needs Pillow.

    Muted and bypassed nodes are left out. A node's parameters tell its release, but for one case: Slothful Attention of
    2023-12-16 has the same ones as the later release. It counts as later where the workflow names that node pack, or
    holds another node that is of it.

    Raises SlothError for a file that cannot be read or holds no workflow; a workflow without such nodes, naming those
    it has; a parameter that comes over a link or from a subgraph's node; parameters that are of no release; and values
    out of range. The node packs: Slothful Attention, both releases, and the author's later Near-sighted Attention.
    """
    data = _read(Path(source)) if isinstance(source, str | os.PathLike) else source
    nodes = list(_nodes(data))
    active = [node for node in nodes if node.type in FORMS and not node.off]
    if not active:
        off = "".join(f"; {node} is {node.off}" for node in nodes if node.type in FORMS)
        kinds = ", ".join(sorted({node.type for node in nodes} - set(FORMS))) or "none"
        raise SlothError(f"the workflow has no node of the types {', '.join(FORMS)}{off}; its others: {kinds:.500}")
    fits = [_fitting(node) for node in active]
    later = any(list(each) == ["later"] or _LATER_PACK in node.pack for node, each in zip(active, fits, strict=True))
    return [_built(node, each, later) for node, each in zip(active, fits, strict=True)]


def _read(path: Path) -> Any:
    try:
        content = path.read_bytes()
        return json.loads(_from_image(path) if content.startswith(_PNG) else content)
    except OSError as error:
        raise SlothError(f"cannot read {str(path)!r}: {error.strerror or error}") from None
    except SlothError:
        raise
    except (ValueError, RecursionError) as error:
        raise SlothError(f"{str(path)!r} holds no workflow, being neither JSON nor a PNG of one: {error}") from None


def _from_image(path: Path) -> str:
    """The workflow in a PNG; of its two forms the one that was executed, where all values are filled in."""
    try:
        from PIL import Image
    except ImportError:
        raise SlothError("a workflow in a PNG needs Pillow: install it, or save the workflow as JSON") from None
    with Image.open(path) as image:
        texts = image.info
    for name in ("prompt", "workflow"):
        if isinstance(texts.get(name), str):
            return str(texts[name])
    held = ", ".join(map(str, texts)) or "nothing"
    raise SlothError(f"{str(path)!r} is an image without a workflow: it holds {held:.200}, and no prompt or workflow")


def _nodes(data: Any) -> Iterator[_Node]:
    """All nodes, those within subgraphs too."""
    if not isinstance(data, Mapping):
        raise SlothError(f"{data!r:.80} is no ComfyUI workflow, which is a JSON object")
    if isinstance(data.get("prompt"), Mapping):
        data = data["prompt"]  # as it is sent to be executed
    try:
        if "nodes" in data:
            _refuse_group_nodes(data)
            subgraphs = {each["id"]: each for each in data.get("definitions", {}).get("subgraphs", ())}
            yield from _saved(data, subgraphs)
        else:
            yield from (_exported(str(name), node) for name, node in data.items())
    except (LookupError, TypeError, AttributeError) as error:
        raise SlothError(
            'it is no ComfyUI workflow: one has "nodes": [{"id": ..., "type": ...}, ...], or, exported for the API, '
            f'"3": {{"class_type": ..., "inputs": ...}}, ... ({type(error).__name__}: {error})'
        ) from None


def _exported(name: str, node: Mapping[str, Any]) -> _Node:
    values = {key: value for key, value in node["inputs"].items() if key != "model"}
    linked = tuple(key for key, value in values.items() if isinstance(value, list | tuple))
    return _Node(name, node["class_type"], node.get("_meta", {}).get("title"), values, linked)


def _saved(
    graph: Mapping[str, Any],
    subgraphs: Mapping[str, Mapping[str, Any]],
    outer: str = "",
    off: str = "",
    promoted: Sequence[Sequence[Any]] = (),
    within: frozenset[str] = frozenset(),
) -> Iterator[_Node]:
    """The nodes of a graph as it is saved; ``promoted`` are the widgets (node, name) that its subgraph's node shows."""
    for node in graph["nodes"]:
        kind, name = node["type"], f"{outer}{node['id']}"
        now_off = off or OFF.get(node.get("mode"), "")
        properties = node.get("properties") or {}
        if kind in subgraphs:
            if kind in within:
                raise SlothError(f"node {name}: this subgraph contains itself")
            shown = properties.get("proxyWidgets") or ()
            yield from _saved(subgraphs[kind], subgraphs, f"{name}:", now_off, shown, within | {kind})
            continue
        elsewhere = [each["name"] for each in node.get("inputs") or () if each.get("link") is not None]
        elsewhere += [widget for inner, widget in promoted if str(inner) == str(node["id"])]
        linked = tuple(each for each in elsewhere if each != "model")
        pack = f"{properties.get('cnr_id')} {properties.get('aux_id')}".lower()
        yield _Node(name, kind, node.get("title"), node.get("widgets_values") or (), linked, now_off, pack)


def _refuse_group_nodes(data: Mapping[str, Any]) -> None:
    groups = (data.get("extra") or {}).get("groupNodes") or {}
    for node in data["nodes"]:
        name = node["type"].removeprefix("workflow>").removeprefix("workflow/")
        inner = {each["type"] for each in groups.get(name, {}).get("nodes", ())} if name != node["type"] else set()
        if inner & set(FORMS) and node.get("mode") not in OFF:
            raise SlothError(
                f"node {node['id']}, a group node {name!r}, holds {', '.join(sorted(inner & set(FORMS)))}: convert it "
                "to nodes, or export the workflow for the API"
            )


def forms_of(kind: str) -> dict[str, Form]:
    """The parameters of a type of node, by release; in the order of its widgets."""
    node, form = FORMS[kind]
    fixed = _NO_WIDGETS.get(kind, ())
    return {
        release: {name: parameter for name, parameter in forms[form].items() if name not in fixed}
        for release, forms in NODES[node].items()
        if form in forms
    }


def _fitting(node: _Node) -> dict[str, dict[str, Any]]:
    """The node's values by name, for each release that has these parameters."""
    if node.linked:
        raise SlothError(
            f"{node}: {', '.join(node.linked)} comes over a link, or from the node of its subgraph: set it on the node "
            "itself, or export the workflow for the API, which fills in what is known"
        )
    forms = forms_of(node.type)
    if isinstance(node.values, Mapping):
        fits = {release: dict(node.values) for release, form in forms.items() if set(node.values) == set(form)}
        given = ", ".join(node.values) or "none"
    else:
        named = {
            release: dict(zip(form, node.values, strict=True))
            for release, form in forms.items()
            if len(form) == len(node.values)
        }
        accepted = {release: _accepted(forms[release], values) for release, values in named.items()}
        fits = {release: named[release] for release, count in accepted.items() if count == max(accepted.values())}
        given = f"{len(node.values)} values"
    if not fits:
        known = "; ".join(f"{release} has {len(form)}: {', '.join(form)}" for release, form in forms.items())
        raise SlothError(f"{node}: its parameters are of no release. Given: {given}; {known}")
    return fits


def _accepted(form: Form, values: Mapping[str, Any]) -> int:
    """How many values their parameters take: releases with as many parameters differ in what these are."""
    return sum(parameter.limits["accepts"].holds(values[name]) for name, parameter in form.items())


def _built(node: _Node, fits: Mapping[str, Mapping[str, Any]], later: bool) -> WorkflowNode:
    release = "later" if later and "later" in fits else next(iter(fits))
    try:
        spec = SPECS[FORMS[node.type][0]].from_node(release=release, **fits[release])
    except SlothError as error:
        raise SlothError(f"{node}: {error}") from None
    return WorkflowNode(id=node.id, type=node.type, title=node.title, release=release, spec=spec)
