"""Draws the picture of docs/comfyui.md: a graph of ComfyUI with nodes of sloth_fx between loader and sampler.

python docs/comfyui_graph.py
"""

from pathlib import Path as File

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path

from sloth_fx.integrations.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

HEAD, LINE = 0.5, 0.32
COLOURS = {"MODEL": "#8b7bd8", "CLIP": "#d9b400", "CONDITIONING": "#e08a2c", "LATENT": "#d96aa8", "STRING": "#5a9c6d"}


def of_pack(name, **values):
    """Title and lines of one of our nodes: what it takes, with its defaults or the values given."""
    declared = NODE_CLASS_MAPPINGS[name].INPUT_TYPES()["required"]
    ports = {
        key: kind for key, (kind, _) in declared.items() if str(kind) in COLOURS and "default" not in declared[key][1]
    }
    widgets = {
        key: values.get(key, options.get("default")) for key, (_, options) in declared.items() if key not in ports
    }
    return NODE_DISPLAY_NAME_MAPPINGS[name], ports, widgets, list(NODE_CLASS_MAPPINGS[name].RETURN_TYPES)


GRAPH = {  # place, and (title, inputs, widgets, outputs)
    "load": ((0, 0), ("Load Checkpoint", {}, {"ckpt_name": "..."}, ["MODEL", "CLIP"])),
    "lora": ((4.3, 0), ("LoraLoaderModelOnly", {"model": "MODEL"}, {"lora_name": "..."}, ["MODEL"])),
    "tile": ((8.6, 0), of_pack("NearSightedTile")),
    "nag": ((12.9, 0), of_pack("SlothFXNAG")),
    "compile": ((17.2, 0), ("TorchCompileModel (or not)", {"model": "MODEL"}, {"backend": "inductor"}, ["MODEL"])),
    "no": ((8.6, 2.9), ("CLIP Text Encode (negative)", {"clip": "CLIP"}, {"text": "blurry"}, ["CONDITIONING"])),
    "yes": ((8.6, 4.7), ("CLIP Text Encode (positive)", {"clip": "CLIP"}, {"text": "a sloth"}, ["CONDITIONING"])),
    "sample": (
        (21.5, 0),
        (
            "KSampler",
            {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT"},
            {"steps": 20, "cfg": 1.0},
            ["LATENT"],
        ),
    ),
    "report": ((21.5, 3.9), of_pack("SlothFXReport")),
}
LINKS = [
    ("load", 0, "lora", "model"),
    ("lora", 0, "tile", "model"),
    ("tile", 0, "nag", "model"),
    ("nag", 0, "compile", "model"),
    ("nag", 0, "report", "model"),
    ("compile", 0, "sample", "model"),
    ("load", 1, "no", "clip"),
    ("load", 1, "yes", "clip"),
    ("no", 0, "nag", "negative"),
    ("no", 0, "sample", "negative"),
    ("yes", 0, "sample", "positive"),
]
WIDTH = 3.5


def draw(output):
    figure, axes = plt.subplots(figsize=(15, 4.6), dpi=110)
    for place, content in GRAPH.values():
        _draw_node(axes, place, *content)
    for source, output_index, target, name in LINKS:
        _draw_link(axes, source, output_index, target, name)
    axes.set(xlim=(-0.3, 25.3), ylim=(6.0, -0.3), aspect="equal")
    axes.axis("off")
    figure.tight_layout(pad=0.2)
    figure.savefig(output)


def _draw_node(axes, place, title, inputs, widgets, outputs):
    x, y = place
    rows = max(len(inputs), len(outputs)) + len(widgets)
    ours = "Sloth FX" in title or title in NODE_DISPLAY_NAME_MAPPINGS.values()
    box = FancyBboxPatch(
        (x, y),
        WIDTH,
        HEAD + rows * LINE,
        boxstyle="round,pad=0.08",
        facecolor="#e6f0e2" if ours else "#ededed",
        zorder=2,
    )
    box.set_edgecolor("#6b8f5e" if ours else "#999999")
    axes.add_patch(box)
    axes.text(x + 0.1, y + 0.2, title, fontsize=8.5, weight="bold", va="center", zorder=4)
    for row, (name, kind) in enumerate(inputs.items()):
        _draw_port(axes, x - 0.08, y + HEAD + row * LINE, kind)
        axes.text(x + 0.12, y + HEAD + row * LINE, name, fontsize=7, va="center", zorder=4)
    for row, kind in enumerate(outputs):
        _draw_port(axes, x + WIDTH + 0.08, y + HEAD + row * LINE, kind)
        axes.text(x + WIDTH - 0.12, y + HEAD + row * LINE, kind, fontsize=7, va="center", ha="right", zorder=4)
    for row, (name, value) in enumerate(widgets.items(), start=max(len(inputs), len(outputs))):
        axes.text(x + 0.2, y + HEAD + row * LINE, name, fontsize=7, va="center", color="#555555", zorder=4)
        axes.text(x + WIDTH - 0.2, y + HEAD + row * LINE, str(value), fontsize=7, va="center", ha="right", zorder=4)


def _draw_port(axes, x, y, kind):
    axes.plot(x, y, "o", color=COLOURS[kind], markersize=5, zorder=5)


def _draw_link(axes, source, index, target, name):
    (x, y), (_, _, _, outputs) = GRAPH[source]
    (to_x, to_y), (_, inputs, _, _) = GRAPH[target]
    start = (x + WIDTH + 0.08, y + HEAD + index * LINE)
    end = (to_x - 0.08, to_y + HEAD + list(inputs).index(name) * LINE)
    middle = (start[0] + end[0]) / 2
    path = Path([start, (middle, start[1]), (middle, end[1]), end], [Path.MOVETO, *[Path.CURVE4] * 3])
    axes.add_patch(PathPatch(path, facecolor="none", edgecolor=COLOURS[outputs[index]], lw=1.8, zorder=1))


if __name__ == "__main__":
    draw(File(__file__).with_suffix("").with_name("comfyui.png"))
