"""The README's code runs as it stands, and its links lead somewhere."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_code_blocks_run_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, object] = {}
    blocks = list(re.finditer(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE))
    try:
        for block in blocks:
            line = README.count("\n", 0, block.start(1))
            exec(compile("\n" * line + block[1], ROOT / "README.md", "exec"), namespace)
    finally:
        torch.compiler.reset()
    printed = capsys.readouterr().out
    assert len(blocks) == 4
    assert "SlothfulAttention" in printed
    assert "0.4 [" in printed
    assert 1 <= namespace["graphs"] <= 2
    assert namespace["noise"].shape == (1, 4, 32, 32)


def test_first_code_is_near_the_top() -> None:
    assert README[: README.index("sloth_fx.transform(")].count("\n") < 20


def test_links_lead_to_files() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_folders_that_it_names_exist() -> None:
    folders = re.findall(r"`(sloth_fx/[\w/.]*)`", README) + re.findall(r"^(\w+/) ", README, re.MULTILINE)
    assert len(folders) >= 8
    assert [folder for folder in folders if not (ROOT / folder).exists()] == []
