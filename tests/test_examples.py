"""Every example runs in seconds with --tiny, in a process of its own, and prints what it is there to show."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
HELPERS = {"unets.py", "pictures.py"}


def run(name: str, *arguments: object) -> str:
    command = [sys.executable, str(EXAMPLES / name), "--tiny", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found, f"{pattern!r} is not in:\n{text}"
    return float(found[1])


def test_sd15_loop() -> None:
    out = run("sd15_loop.py", "--steps", 3)
    assert "8 attention sites (4 self, 4 cross), 3 with operators" in out
    assert "unpatched: " in out
    assert 0 < number(r"relative difference of the results: ([\d.]+)", out) < 1


def test_sdxl_compiled() -> None:
    out = run("sdxl_compiled.py", "--steps", 12, "--phases", 3)
    assert 2 <= number(r"(\d+) sets of strides, all compiled", out) <= 3
    assert re.search(r"12 steps in .*nothing was compiled again", out)


def test_own_schedule() -> None:
    kept = [int(share) for share in re.findall(r"(\d+)% #", run("own_schedule.py"))]
    assert len(kept) == 20
    assert kept[0] == kept[-1] == 100
    assert min(kept) == kept[10] < 30


def test_select_sites() -> None:
    out = run("select_sites.py")
    assert [int(n) for n in re.findall(r"(\d+) sites, ", out)] == [4, 2, 3, 2, 2, 3]
    assert re.search(r"^in .* NearSightedTile ", out, re.MULTILINE)
    assert re.search(r"^out .* SlothfulAttention ", out, re.MULTILINE)
    assert "where='up_block.*' matches no site; nearest: up_blocks." in out


def test_train_through() -> None:
    out = run("train_through.py", "--steps", 6)
    before, after = (float(loss) for loss in re.findall(r"([\d.]+) (?:before|after)", out))
    assert after < before
    assert number(r"original, which shares the weights: ([\d.]+)", out) < before


def test_demo(tmp_path: Path) -> None:
    out = run("demo.py", "--steps", 2, "--out", tmp_path)
    assert "8 attention sites" in out
    rows = re.findall(r"^ +(\w+) +[\d.]+ s +[\d.]+ s +-?\d+% +(\d+)% +(\d+)%$", out, re.MULTILINE)
    assert [row[0] for row in rows] == ["1", "2", "all"]
    assert all(30 < int(keys) < int(work) < 100 for _, keys, work in rows)
    for name in ("keys_over_steps.png", "near_sighted_tile.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert name in out


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_every_example_is_tested(path: Path) -> None:
    assert path.name in HELPERS or f"def test_{path.stem}(" in Path(__file__).read_text(encoding="utf-8")
