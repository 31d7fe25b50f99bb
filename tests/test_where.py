"""Selectors: what each form selects, what is refused, what is suggested."""

from typing import NamedTuple

import pytest

from sloth_fx.errors import SlothError
from sloth_fx.where import Where, as_json, matches, nearest, validate


class Site(NamedTuple):
    path: str
    stage: str
    kind: str
    depth: float


SITES = [
    Site("down.0.attn1", "in", "self", 1),
    Site("down.0.attn2", "in", "cross", 1),
    Site("down.1.attn1", "in", "self", 2),
    Site("mid.attn1", "middle", "self", 4),
    Site("up.0.attn1", "out", "self", 2),
    Site("up.0.attn2", "out", "cross", 2),
]
OTHERS = [Site("blocks.0.attn", "in", "temporal", 1), Site("blocks.1.attn", "in", "linear", 1)]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (None, [0, 1, 2, 3, 4, 5]),
        ("in", [0, 1, 2]),
        ("middle", [3]),
        ("out", [4, 5]),
        ("cross", [1, 5]),
        ("joint", []),
        ("*.attn1", [0, 2, 3, 4]),
        ("down.[0]*", [0, 1]),
        ("DOWN.*", []),
        ("attn1", []),
        ((1, 2), [0, 1, 2, 4, 5]),
        ([2, 4], [2, 3, 4, 5]),
        ((1.5, 1.9), []),
        ({"stage": "in", "kind": "self"}, [0, 2]),
        ({"stage": ["in", "out"], "depth": (2, 2)}, [2, 4, 5]),
        ({"path": ["mid.*", "up.*"], "kind": "self"}, [3, 4]),
        ({"path": "in"}, []),
        (lambda site: site.depth == 4, [3]),
    ],
)
def test_matches(where: Where, expected: list[int]) -> None:
    assert [index for index, site in enumerate(SITES) if matches(where, site)] == expected


@pytest.mark.parametrize("kind", ["temporal", "linear"])
def test_kinds_that_unets_do_not_have(kind: str) -> None:
    for where in (kind, {"kind": kind}, {"kind": ["cross", kind]}):
        assert [site.kind for site in OTHERS if matches(where, site)] == [kind]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("", "selects nothing"),
        ({}, "no condition"),
        (3, "not a selector"),
        ({"in", "out"}, "not a selector"),
        ((1, 2, 3), "depth range"),
        ((2, 1), "depth range"),
        ((0, float("inf")), "depth range"),
        ((float("nan"), 1), "depth range"),
        ((True, 2), "depth range"),
        (("in", "out"), "depth range"),
        ({"depth": 2}, "depth range"),
        ({"stges": "in"}, "'stges' is unknown, nearest: stage"),
        ({3: "in"}, "3 is unknown"),
        ({"stage": "inn"}, "'inn' is unknown, nearest: in"),
        ({"kind": ["self", "crss"]}, "'crss' is unknown, nearest: cross"),
        ({"kind": []}, "list of alternatives"),
        ({"path": 7}, "list of alternatives"),
        ({"path": ["a", ""]}, "list of alternatives"),
    ],
)
def test_bad_selectors_are_refused(where: Where, message: str) -> None:
    for call in (lambda: validate(where), lambda: matches(where, SITES[0])):
        with pytest.raises(SlothError, match=message):
            call()


@pytest.mark.parametrize("answer", [1, None, "yes"])
def test_a_function_must_return_a_bool(answer: object) -> None:
    with pytest.raises(SlothError, match=r"down\.0\.attn1: it must return True or False"):
        matches(lambda site: answer, SITES[0])  # type: ignore[arg-type, return-value]


def test_validate_keeps_a_copy_of_its_own() -> None:
    mine = {"kind": ["self"], "depth": [1, 2]}
    kept = validate(mine)
    mine["kind"].append("cross")
    assert kept == {"kind": ("self",), "depth": (1, 2)}
    assert validate([1, 2]) == (1, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("midle", ["middle"]),
        ("down.0.attn11", ["down.0.attn1", "down.1.attn1"]),
        ("joint", ["self", "cross"]),
        ((8, 16), ["depth 1", "depth 2", "depth 4"]),
        ({"kind": "temporal", "stage": "in"}, ["self", "cross"]),
        ({"kind": "cross", "stage": "middle", "path": "mid.*"}, ["mid.attn1"]),
        (lambda site: False, ["down.0.attn1"]),
    ],
)
def test_nearest_begins_with(where: Where, expected: list[str]) -> None:
    assert nearest(where, SITES)[: len(expected)] == expected


def test_nearest_without_sites_is_empty() -> None:
    assert nearest("attn*", []) == nearest(None, []) == nearest((1, 2), []) == []


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (None, None),
        ("in", "in"),
        ((1, 2), [1, 2]),
        ({"kind": ("self",), "depth": (1, 2)}, {"kind": ["self"], "depth": [1, 2]}),
    ],
)
def test_as_json(where: Where, expected: object) -> None:
    assert as_json(where) == expected


def test_a_function_has_no_json_form() -> None:
    with pytest.raises(SlothError, match="a function"):
        as_json(lambda site: True)
