"""JSON: there and back, and every way it can be wrong."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sloth_fx.errors import SlothError
from sloth_fx.schedule import Constant, Moment, PeakDecay, StepDecay
from sloth_fx.serialize import load_spec
from sloth_fx.spec import (
    HyperTile,
    NearSightedAttention,
    NearSightedTile,
    Reduction,
    SlothfulAttention,
    TokenDownsample,
    TokenMerging,
)

DOCS = Path(__file__).parent.parent / "docs" / "specs.md"
SPECS = [
    SlothfulAttention(),
    SlothfulAttention(schedule=StepDecay(time_decay=0.5), keep_middle=False, where=(1, 2)),
    SlothfulAttention(in_=Reduction(rate=3, mode="1d_max", border="crop", k_blend=0.5), where="down*"),
    NearSightedTile(),
    NearSightedTile(
        peak_tile_size=48, peak_global_ratio=0.1, schedule=PeakDecay(), where={"depth": (1, 2), "kind": "self"}
    ),
    NearSightedAttention(schedule=Constant(), where={"stage": ["in", "out"], "path": ["a*", "b*"]}),
    NearSightedAttention.from_node(release="later", concat_local=True),
    SlothfulAttention(in_=Reduction(rate=3, temporal=4), where="temporal"),
    TokenDownsample(factors=(3, 1), where=(1, 2)),
    HyperTile(tile_size=100, swap_size=3, max_depth=1, scale_depth=False, seed=2**63 - 1, where={"kind": ["self"]}),
    TokenMerging(ratio=0.3, cell=(3, 2), max_depth=2, tokens="q", seed=7, where="down*"),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: type(spec).__name__)
def test_there_and_back(spec: Any, tmp_path: Path) -> None:
    data = spec.to_dict()
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    assert load_spec(data) == load_spec(json.loads(json.dumps(data))) == load_spec(path) == load_spec(str(path)) == spec


def test_a_list_loads_as_a_list(tmp_path: Path) -> None:
    path = tmp_path / "specs.json"
    path.write_text(json.dumps([spec.to_dict() for spec in SPECS]), encoding="utf-8")
    assert load_spec(path) == SPECS


def test_the_form() -> None:
    data = SlothfulAttention(where=(1, 2)).to_dict()
    assert list(data) == ["version", "type", "in_", "out", "schedule", "keep_middle", "where"]
    assert (data["version"], data["type"], data["where"]) == (1, "SlothfulAttention", [1, 2])
    assert data["schedule"] == {"type": "PeakDecay", "peak_time": 0.4, "time_decay": 2.0}
    assert data["in_"]["rate"] == 6.0
    assert "type" not in data["in_"]


def test_the_form_of_a_spec_without_a_schedule() -> None:
    data = TokenMerging(cell=(3, 2)).to_dict()
    assert list(data) == ["version", "type", "ratio", "cell", "max_depth", "tokens", "seed", "where"]
    assert (data["type"], data["cell"], data["where"]) == ("TokenMerging", [3, 2], None)
    assert TokenDownsample().to_dict() == {"version": 1, "type": "TokenDownsample", "factors": [2], "where": None}


def test_fields_left_out_take_their_defaults() -> None:
    data = {"version": 1, "type": "SlothfulAttention", "in_": {"rate": 3}, "schedule": {"type": "StepDecay"}}
    assert load_spec(data) == SlothfulAttention(in_=Reduction(rate=3), schedule=StepDecay())


@pytest.mark.parametrize("kind", [TokenDownsample, HyperTile, TokenMerging])
def test_a_type_alone_is_the_default(kind: Any) -> None:
    assert load_spec({"version": 1, "type": kind.__name__}) == kind()
    with pytest.raises(SlothError, match="spec: key 'schedule' is unknown"):
        load_spec({"version": 1, "type": kind.__name__, "schedule": {"type": "Constant"}})


def test_loading_leaves_its_input_alone() -> None:
    data = NearSightedAttention(where={"kind": ["self"]}).to_dict()
    before = json.dumps(data)
    load_spec(data)
    assert json.dumps(data) == before


class Ramp:
    clock = "progress"

    def ratio(self, moment: Moment) -> float:
        return moment.progress


class MyPeak(PeakDecay):
    pass


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (SlothfulAttention(schedule=Ramp()), "Ramp"),
        (NearSightedTile(schedule=MyPeak()), "MyPeak"),
        (NearSightedAttention(where=lambda site: True), "a function"),
        (TokenDownsample(where=lambda site: True), "a function"),
    ],
)
def test_what_has_no_json_form(spec: Any, message: str) -> None:
    with pytest.raises(SlothError, match=message):
        spec.to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": None}, "spec: the version is missing"),
        ({"version": 2}, "version=2 is newer"),
        ({"version": 0}, "not a version"),
        ({"version": "1"}, "not a version"),
        ({"version": True}, "not a version"),
        ({"type": "SlothfullAttention"}, "nearest: SlothfulAttention"),
        ({"type": ["SlothfulAttention"]}, "type .* is unknown"),
        ({"kep_middle": True}, "spec: key 'kep_middle' is unknown, nearest: keep_middle"),
        ({"in_": {"rate": 1, "mod": "2d_avg"}}, r"spec\.in_: key 'mod' is unknown, nearest: mode"),
        ({"in_": {"mode": "2d_avg"}}, r"spec\.in_: rate is missing"),
        ({"in_": {"rate": 60}}, r"spec\.in_: Reduction: rate=60"),
        ({"out": 4}, r"spec\.out: 4 is not a JSON object"),
        ({"schedule": "PeakDecay"}, r"spec\.schedule: 'PeakDecay' is not a JSON object"),
        ({"schedule": {"peak_time": 0.4}}, r"spec\.schedule: the type is missing"),
        ({"schedule": {"type": "PeekDecay"}}, r"spec\.schedule: type 'PeekDecay' is unknown, nearest: PeakDecay"),
        ({"schedule": {"type": "StepDecay", "peak_time": 0.4}}, r"spec\.schedule: key 'peak_time' is unknown"),
        ({"schedule": {"type": "PeakDecay", "peak_time": 2}}, r"spec\.schedule: PeakDecay: peak_time=2"),
        ({"in_": {"rate": 1, "temporal": 65}}, r"spec\.in_: Reduction: temporal=65"),
        ({"keep_middle": 1}, "spec: SlothfulAttention: keep_middle=1"),
        ({"where": {"stag": "in"}}, "spec: where: key 'stag' is unknown, nearest: stage"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(change: dict[str, Any], message: str) -> None:
    data = {**SlothfulAttention().to_dict(), **change}
    with pytest.raises(SlothError, match=message):
        load_spec(data)
    with pytest.raises(SlothError, match=re.escape("spec[1]")):
        load_spec([SlothfulAttention().to_dict(), data])


def test_a_wrong_factor_is_said_with_its_place() -> None:
    with pytest.raises(SlothError, match=r"spec: TokenDownsample: factors=\(2, 0\) is refused"):
        load_spec({"version": 1, "type": "TokenDownsample", "factors": [2, 0]})


def test_a_missing_version_and_a_missing_type() -> None:
    for key in ("version", "type"):
        data = SlothfulAttention().to_dict()
        del data[key]
        with pytest.raises(SlothError, match=f"spec: the {key} is missing"):
            load_spec(data)


@pytest.mark.parametrize("text", ["{not json", "", b"\xff\xfe\x00", "[" * 100_000])
def test_a_file_that_is_not_json(text: str | bytes, tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SlothError, match=r"spec\.json' is not a JSON file"):
        load_spec(path)


@pytest.mark.parametrize("text", ["3", "null", '"SlothfulAttention"'])
def test_json_that_is_not_a_spec(text: str, tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SlothError, match="is not a JSON object"):
        load_spec(path)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(SlothError, match="cannot read"):
            load_spec(path)
    with pytest.raises(SlothError, match="a string is taken for a path"):
        load_spec(json.dumps(SlothfulAttention().to_dict()))


def test_the_json_of_the_documentation_loads() -> None:
    blocks = re.findall(r"```json\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        assert load_spec(json.loads(block))


def test_the_python_of_the_documentation_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, str(DOCS), "exec"), {})
