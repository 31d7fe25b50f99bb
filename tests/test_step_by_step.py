"""benchmarks/step_by_step.py runs with --tiny, and says what is left of self-attention."""

import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "step_by_step.py"


def test_step_by_step(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    options = ["--tiny", "--device", "cpu", "--steps", 2, "--sizes", 264, "--out", tmp_path, "--markdown", page]
    command = [sys.executable, str(SCRIPT), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = re.findall(
        r"^\| sd15 +\| 264 +\| eager \| (\w+) +\| (\d+) % +\| (\d+) % +\|", page.read_text(), re.MULTILINE
    )
    assert [row[0] for row in rows] == ["1", "2", "all"]

    # In the first step only the first level is pooled, in windows of 2 x 2. Per level: sites, channels, grid.
    levels = [(5, 32, 33), (5, 64, 17), (5, 128, 9), (1, 128, 5)]
    keys = [sites * grid**2 for sites, _, grid in levels]
    pairs = [sites * channels * grid**4 for sites, channels, grid in levels]
    share = 17**2 / 33**2
    assert int(rows[0][1]) == round(100 * (share * keys[0] + sum(keys[1:])) / sum(keys))
    assert int(rows[0][2]) == round(100 * (share * pairs[0] + sum(pairs[1:])) / sum(pairs))
    for column in (1, 2):  # there are two steps
        assert abs(int(rows[2][column]) - (int(rows[0][column]) + int(rows[1][column])) / 2) <= 1
    assert int(rows[1][1]) < int(rows[0][1])
    for name in ("keys_over_steps.png", "near_sighted_tile.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert name in done.stdout
