"""Draw how the losses of the lab's trainings went: logs/*.json in logs/curves.png.

python examples/lab/curves.py
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

LOGS = Path(__file__).parent / "logs"
ORDER = ("text", "vae", "judge", "unet", "unet-student", "dit", "dit-student")


def main() -> None:
    names = [name for name in ORDER if (LOGS / f"{name}.json").exists()]
    figure, row = plt.subplots(1, len(names), figsize=(2.6 * len(names), 2.6), layout="constrained", squeeze=False)
    for axes, name in zip(row[0], names, strict=True):
        found = json.loads((LOGS / f"{name}.json").read_text(encoding="utf-8"))
        axes.plot([each["step"] for each in found["log"]], [each["loss"] for each in found["log"]], color="#2a6f97")
        axes.set_yscale("log")
        axes.set_title(f"{name}\n{found['steps']} steps of {found['batch']}", fontsize=10, loc="left")
        axes.tick_params(labelsize=8, which="both")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", which="both", color="#9a9aae", alpha=0.25)
    row[0][0].set_ylabel("loss")
    figure.savefig(LOGS / "curves.png", dpi=110)


if __name__ == "__main__":
    main()
