"""Workflows of ComfyUI: both forms, every node and release, and what cannot be read."""

import json
from pathlib import Path
from typing import Any

import pytest

from sloth_fx.errors import SlothError
from sloth_fx.node_values import NODES
from sloth_fx.schedule import PeakDecay, StepDecay
from sloth_fx.spec import NearSightedAttention, NearSightedTile, Reduction, SlothfulAttention
from sloth_fx.workflow import FORMS, WorkflowNode, read_workflow

# The inputs of the nodes besides the model, as their packs declare them: that is the order of their widgets.
STRENGTH = "time_decay keep_middle in_mode in_depth_decay in_strength in_k_blend in_v_blend \
    out_mode out_depth_decay out_strength out_k_blend out_v_blend"
STRENGTH_SIMPLE = "time_decay depth_decay in_mode in_strength in_blend out_mode out_strength out_blend"
SIDES = "in_mode in_depth_decay in_slothful in_k_blend in_v_blend \
    out_mode out_depth_decay out_slothful out_k_blend out_v_blend"
TILES = "tiling_max_depth peak_time time_decay base_tile_size peak_tile_size base_global_ratio peak_global_ratio"
CONCAT = "concat_local concat_global"

# No two values of a kind are the same.
VALUES: dict[str, Any] = {
    "time_decay": 1.5,
    "keep_middle": False,
    "peak_time": 0.3,
    "depth_decay": 0.5,
    "tiling_max_depth": 3,
    "in_mode": "1D_MAX",
    "in_depth_decay": 2.5,
    "in_strength": 7.0,
    "in_k_blend": 0.1,
    "in_v_blend": 0.2,
    "out_mode": "2D_MAX",
    "out_depth_decay": 3.5,
    "out_strength": 3.0,
    "out_k_blend": 0.4,
    "out_v_blend": 0.6,
    "in_slothful": 8.0,
    "out_slothful": 2.0,
    "slothful": 5.0,
    "in_blend": 0.7,
    "out_blend": 0.8,
    "tile_size": 40,
    "global_ratio": 0.9,
    "base_tile_size": 18,
    "peak_tile_size": 58,
    "base_global_ratio": 0.15,
    "peak_global_ratio": 0.85,
    "concat_local": True,
    "concat_global": False,
}
NODE_TYPES = [
    ("SlothfulAttention", "2023-12-11", STRENGTH),
    ("SlothfulAttentionSimple", "2023-12-11", STRENGTH_SIMPLE),
    ("SlothfulAttention", "2023-12-16", f"peak_time time_decay {SIDES}"),
    ("NearSightedTile", "2023-12-16", "tiling_max_depth global_ratio tile_size"),
    ("NearSightedAttention", "2023-12-16", f"{TILES} {SIDES}"),
    ("NearSightedAttentionSimple", "2023-12-16", f"{TILES} slothful in_blend out_blend"),
    ("NearSightedTile", "later", f"{TILES} {CONCAT}"),
    ("NearSightedAttention", "later", f"{TILES} {SIDES} {CONCAT}"),
    ("NearSightedAttentionSimple", "later", f"{TILES} slothful in_blend out_blend {CONCAT}"),
]
SPECS = {each.__name__: each for each in (SlothfulAttention, NearSightedTile, NearSightedAttention)}


def saved(*nodes: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A workflow as it is saved: with a loader and a sampler around the nodes given, in front of it and behind it."""
    around = [{"id": 4, "type": "CheckpointLoaderSimple", "mode": 0, "widgets_values": ["a.safetensors"]}]
    sampler = {"id": 17, "type": "KSampler", "mode": 0, "widgets_values": [1, "fixed", 16, 5, "ddim", "karras", 1]}
    return {"last_node_id": 79, "nodes": [*around, *nodes, sampler], "links": [], "version": 0.4, **more}


def node(kind: str, values: Any, number: int = 79, **more: Any) -> dict[str, Any]:
    model = {"name": "model", "type": "MODEL", "link": 180}
    return {"id": number, "type": kind, "mode": 0, "inputs": [model], "widgets_values": values, **more}


def exported(kind: str, values: dict[str, Any]) -> dict[str, Any]:
    return {
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "a.safetensors"}},
        "79": {"class_type": kind, "inputs": {**values, "model": ["4", 0]}, "_meta": {"title": "Less"}},
    }


TILE = node("NearSightedTile", [2, 0.5, 32])
IDS = [f"{kind} {release}" for kind, release, _ in NODE_TYPES]


@pytest.mark.parametrize(("kind", "release", "names"), NODE_TYPES, ids=IDS)
def test_every_node_in_both_forms(kind: str, release: str, names: str) -> None:
    values = {name: VALUES[name] for name in names.split()}
    short = kind.endswith("Simple")
    spec = SPECS[kind.removesuffix("Simple")].from_node(release=release, simple=short, **values)
    expected = WorkflowNode(id="79", type=kind, title="Less", release=release, spec=spec)
    assert read_workflow(saved(node(kind, list(values.values()), title="Less"))) == [expected]
    assert read_workflow(saved(node(kind, values, title="Less"))) == [expected]  # some write widgets by name
    assert read_workflow(exported(kind, values)) == [expected]
    shuffled = dict(sorted(values.items()))
    assert read_workflow({"prompt": exported(kind, shuffled), "client_id": "a"}) == [expected]


def test_all_types_are_there() -> None:
    assert {kind for kind, _, _ in NODE_TYPES} == set(FORMS)
    known = {(name, release) for name, releases in NODES.items() for release in releases}
    tested = {(FORMS[kind][0], release) for kind, release, _ in NODE_TYPES}
    assert known - tested == {("SlothfulAttention", "later")}  # which is a case of its own, below


def test_fields_by_hand() -> None:
    """The second way: no `from_node`."""
    values = [1, 0.5, "1D_AVG", 6, 0.25, "2D_AVG", 4, 0]
    (found,) = read_workflow(saved(node("SlothfulAttentionSimple", values)))
    sides: dict[str, Any] = {"depth_decay": 0.5, "long_axis": "x", "border": "crop"}
    assert found.spec == SlothfulAttention(
        in_=Reduction(rate=6, mode="1d_avg", k_blend=0.25, v_blend=0.25, **sides),
        out=Reduction(rate=4, mode="2d_avg", **sides),
        schedule=StepDecay(time_decay=1),
    )
    assert found.title is None
    (found,) = read_workflow(saved(node("NearSightedTile", [3, 0.25, 24])))
    assert found.spec == NearSightedTile(tile_size=24, global_ratio=0.25, max_depth=3, mode="2d", long_axis="x")
    values = [0.4, 2.0, "2D_AVG", 2, 6, 0, 0, "2D_MAX", 2, 4, 1, 0]
    (found,) = read_workflow(saved(node("SlothfulAttention", values)))
    assert isinstance(found.spec, SlothfulAttention)
    assert (found.spec.in_.rate, found.spec.out.rate, found.spec.out.k_blend) == (6, 4, 1)
    assert found.spec.schedule == PeakDecay(peak_time=0.4, time_decay=2.0)


def test_several_nodes_in_the_order_of_the_workflow() -> None:
    first = node("NearSightedTile", [2, 0.5, 48], number=90, title="Tiles")
    nodes = read_workflow(saved(first, node("SlothfulAttentionSimple", [1, 1, "2D_AVG", 6, 0, "2D_AVG", 4, 0], 12)))
    assert [(each.id, each.type, each.title) for each in nodes] == [
        ("90", "NearSightedTile", "Tiles"),
        ("12", "SlothfulAttentionSimple", None),
    ]


SLOTHFUL = node("SlothfulAttention", [0.4, 2, "2D_AVG", 2, 6, 0, 0, "2D_AVG", 2, 4, 0, 0], 5)
LATER_TILE = node("NearSightedTile", [2, 0.3, 2, 32, 48, 1, 0.5, False, False])


@pytest.mark.parametrize(
    ("nodes", "release"),
    [
        ([SLOTHFUL], "2023-12-16"),
        ([SLOTHFUL, TILE], "2023-12-16"),
        ([SLOTHFUL, LATER_TILE], "later"),
        ([{**SLOTHFUL, "properties": {"cnr_id": "nearsighted_attention"}}], "later"),
        ([{**SLOTHFUL, "properties": {"aux_id": "MitoshiroPJ/comfyui_nearsighted_attention"}}], "later"),
        ([{**SLOTHFUL, "properties": {"aux_id": "MitoshiroPJ/comfyui_slothful_attention"}}], "2023-12-16"),
    ],
)
def test_releases_with_the_same_parameters(nodes: list[dict[str, Any]], release: str) -> None:
    found = read_workflow(saved(*nodes))[0]
    assert found.release == release
    assert isinstance(found.spec, SlothfulAttention)
    assert found.spec.in_.border == {"later": "keep", "2023-12-16": "crop"}[release]


def in_subgraph(inner: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The node within a subgraph within a subgraph."""
    deep = {"id": "uuid-2", "nodes": [inner]}
    outer = {"id": "uuid-1", "nodes": [{"id": 3, "type": "uuid-2", "mode": 0}, {"id": 8, "type": "VAEDecode"}]}
    return saved({"id": 30, "type": "uuid-1", "mode": 0, **more}, definitions={"subgraphs": [outer, deep]})


def test_subgraphs() -> None:
    (found,) = read_workflow(in_subgraph(TILE))
    assert (found.id, found.type) == ("30:3:79", "NearSightedTile")
    workflow = in_subgraph(TILE)
    workflow["nodes"].append({"id": 31, "type": "uuid-2", "mode": 0})  # used twice
    assert [each.id for each in read_workflow(workflow)] == ["30:3:79", "31:79"]


def test_muted_and_bypassed_nodes_are_left_out() -> None:
    for mode, word in ((2, "muted"), (4, "bypassed")):
        off = {**node("NearSightedTile", [2, 0.5, 48], 7), "mode": mode}
        assert [each.id for each in read_workflow(saved(off, TILE))] == ["79"]
        with pytest.raises(SlothError, match=rf"no node of the types .*; node 7 \(NearSightedTile\) is {word}"):
            read_workflow(saved(off))
        with pytest.raises(SlothError, match=rf"node 30:3:79 \(NearSightedTile\) is {word}"):
            read_workflow(in_subgraph(TILE, mode=mode))


def test_a_workflow_without_such_nodes() -> None:
    with pytest.raises(SlothError, match=r"no node of the types SlothfulAttention, .*: CheckpointLoaderSimple, KSampl"):
        read_workflow(saved())
    with pytest.raises(SlothError, match=r"its others: CheckpointLoaderSimple, SlothfulAttenton$"):
        read_workflow(exported("SlothfulAttenton", {}))


def test_links_name_the_node_and_the_input() -> None:
    link = {"name": "tile_size", "type": "INT", "link": 12, "widget": {"name": "tile_size"}}
    free = {"name": "global_ratio", "type": "FLOAT", "link": None, "widget": {"name": "global_ratio"}}
    linked = {**TILE, "inputs": [*TILE["inputs"], link, free], "title": "Tiles"}
    message = r"node 79 \(NearSightedTile, 'Tiles'\): tile_size comes over a link"
    with pytest.raises(SlothError, match=message):
        read_workflow(saved(linked))
    values = {"tiling_max_depth": 2, "global_ratio": 0.5, "tile_size": ["4", 1]}
    with pytest.raises(SlothError, match=r"node 79 \(NearSightedTile, 'Less'\): tile_size comes over a link"):
        read_workflow(exported("NearSightedTile", values))
    assert read_workflow(saved({**TILE, "inputs": [free]}))


def test_widgets_that_a_subgraph_shows() -> None:
    """What is set on the subgraph's node is not what lies in the node within."""
    workflow = in_subgraph(TILE)
    inner = workflow["definitions"]["subgraphs"][0]["nodes"][0]
    inner |= {"properties": {"proxyWidgets": [["79", "tile_size"], ["80", "seed"]]}, "widgets_values": [48, 1]}
    with pytest.raises(SlothError, match=r"node 30:3:79 \(NearSightedTile\): tile_size comes .* node of its subgraph"):
        read_workflow(workflow)


def test_group_nodes_are_refused() -> None:
    groups = {"groupNodes": {"Less": {"nodes": [{"type": "KSampler"}, {"type": "NearSightedTile"}]}}}
    for kind in ("workflow>Less", "workflow/Less"):
        group = {"id": 40, "type": kind, "mode": 0, "widgets_values": [2, 0.5, 32]}
        with pytest.raises(SlothError, match="node 40, a group node 'Less', holds NearSightedTile: convert it"):
            read_workflow(saved(group, TILE, extra=groups))
        assert read_workflow(saved({**group, "mode": 4}, TILE, extra=groups))
    assert read_workflow(saved(TILE, extra=groups))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            node("NearSightedTile", [2, 0.5]),
            r"node 79 \(NearSightedTile\): its param.* no release. Given: 2 values; 2023",
        ),
        (
            node("NearSightedTile", None),
            "Given: 0 values; 2023-12-16 has 3: tiling_max_depth, global_ratio, tile_size; ",
        ),
        (node("NearSightedTile", [2, 0.5, 80]), r"node 79 \(NearSightedTile\): NearSightedTile of 2023.* tile_size=80"),
        (node("NearSightedTile", [2, 0.5, "x"]), "tile_size='x' is refused"),
        (node("SlothfulAttention", [0.4, 2, "2D_AV", 2, 6, 0, 0, "2D_AVG", 2, 4, 0, 0]), "in_mode='2D_AV'"),
        (node("SlothfulAttention", [1, True, "2D_AVG", 5, 6, 0, 0, "2D_AVG", 2, 4, 0, 0]), "2023-12-11: in_depth_dec"),
        (node("NearSightedTile", {"tile_size": 3, "tile": 2}), "Given: tile_size, tile; 2023-12-16 has 3: tiling_max"),
    ],
)
def test_values_that_do_not_fit(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(SlothError, match=message):
        read_workflow(saved(changed))


def test_inputs_that_are_missing() -> None:
    """ComfyUI runs no such node, and which release it is of does not show."""
    with pytest.raises(SlothError, match="Given: tiling_max_depth, tile_size; 2023-12-16 has 3: tiling_max_depth, glo"):
        read_workflow(exported("NearSightedTile", {"tiling_max_depth": 2, "tile_size": 32}))


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "workflow.json"
    path.write_text(json.dumps(saved(TILE)), encoding="utf-8")
    assert read_workflow(path) == read_workflow(str(path)) == read_workflow(saved(TILE))
    for content in (b"", b"{not json", b"\xff\xfe\x00", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(SlothError, match=r"workflow.json' holds no workflow, being neither JSON nor a PNG"):
            read_workflow(path)
    for missing in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(SlothError, match="cannot read"):
            read_workflow(missing)


def test_images(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    info = pytest.importorskip("PIL.PngImagePlugin").PngInfo
    path = tmp_path / "image.png"

    def write(**texts: Any) -> None:
        made = info()
        for name, value in texts.items():
            made.add_text(name, value if isinstance(value, str) else json.dumps(value))
        image.new("RGB", (5, 3)).save(path, pnginfo=made)

    values = {"tiling_max_depth": 2, "global_ratio": 0.5, "tile_size": 48}
    linked = {**TILE, "inputs": [{"name": "tile_size", "link": 1}]}
    write(prompt=exported("NearSightedTile", values), workflow=saved(linked))
    (found,) = read_workflow(path)
    assert isinstance(found.spec, NearSightedTile)
    assert found.spec.tile_size == 48
    write(workflow=saved(TILE))
    assert read_workflow(path) == read_workflow(saved(TILE))
    write(parameters="a sloth, Steps: 20")
    with pytest.raises(SlothError, match=r"^'[^ ]*image.png' is an image without a workflow: it holds parameters"):
        read_workflow(path)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(SlothError, match=r"image.png"):
        read_workflow(path)


def test_images_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n")
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(SlothError, match="needs Pillow: install it, or save the workflow as JSON"):
        read_workflow(path)


def test_a_subgraph_that_contains_itself() -> None:
    workflow = in_subgraph(TILE)
    workflow["definitions"]["subgraphs"][1]["nodes"].append({"id": 9, "type": "uuid-1"})
    with pytest.raises(SlothError, match="node 30:3:9: this subgraph contains itself"):
        read_workflow(workflow)


@pytest.mark.parametrize(
    "data",
    [
        3,
        [],
        {"nodes": 3},
        {"nodes": [3]},
        {"nodes": [{"id": 3}]},
        {"nodes": [{"id": 3, "type": 3}]},
        {"nodes": [{**TILE, "inputs": 3}]},
        {"nodes": [], "definitions": {"subgraphs": [3]}},
        {"nodes": [], "definitions": 3},
        {"3": {"inputs": {}}},
        {"3": {"class_type": "KSampler"}},
        {"3": {"class_type": "KSampler", "inputs": 3}},
        {"3": 3},
        {"version": 1, "type": "SlothfulAttention"},
    ],
)
def test_json_that_is_no_workflow(data: Any) -> None:
    with pytest.raises(SlothError, match="is no ComfyUI workflow"):
        read_workflow(data)


def test_an_empty_workflow() -> None:
    for data in ({}, {"nodes": []}):
        with pytest.raises(SlothError, match="its others: none"):
            read_workflow(data)
