"""The code of docs/extending.md runs as it stands, and prints what the page says."""

import re
from pathlib import Path

import pytest
import torch

from sloth_fx.model_adapters import registry

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")


def blocks_of(language: str) -> list[re.Match[str]]:
    return list(re.finditer(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))


@pytest.fixture
def _no_leftovers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})


@pytest.mark.usefixtures("_no_leftovers")
def test_code_blocks_run_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "extending"}
    for block in blocks_of("python"):
        line = PAGE.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], ROOT / "docs/extending.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert printed.startswith(blocks_of("text")[0][1])
    assert printed.splitlines()[-1] == "0.4 (3, 240, 16)"


def test_the_table_has_every_field() -> None:
    rows = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == set(registry._FIELDS)
