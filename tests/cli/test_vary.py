"""``--vary``: which fields it finds, and what it reads."""

import pytest
import typer

from sloth_fx import Constant, HyperTile, PeakDecay, SlothError, SlothfulAttention, TokenDownsample, TokenMerging
from sloth_fx.cli.vary import Variation

SLOTH = SlothfulAttention()


def vary(text, *specs):
    variation = Variation.parse(text)
    return [variation.apply(specs or [SLOTH], value) for value in variation.values]


def test_a_bare_name_stands_for_both_sides():
    found = [spec for (spec,) in vary("rate=1,2.5,40")]
    assert [(spec.in_.rate, spec.out.rate) for spec in found] == [(1, 1), (2.5, 2.5), (40, 40)]
    assert found[0].in_.mode == "2d_avg"


def test_one_side():
    ((spec,),) = vary("out.rate=9")
    assert (spec.in_.rate, spec.out.rate) == (6.0, 9)


def test_fields_of_the_schedule_and_the_schedule():
    (first,), (second,) = vary("time_decay=0,1.5")
    assert (first.schedule, second.schedule) == (PeakDecay(time_decay=0), PeakDecay(time_decay=1.5))
    ((spec,),) = vary("schedule=Constant")
    assert spec.schedule == Constant()


def test_kinds_of_values():
    assert [spec.keep_middle for (spec,) in vary("keep_middle=true,False")] == [True, False]
    assert [spec.in_.mode for (spec,) in vary("mode=2d_max,1d_avg")] == ["2d_max", "1d_avg"]
    assert [spec.where for (spec,) in vary('where=None,in,(1,2),{"kind":"self","stage":"in"}')] == [
        None,
        "in",
        (1, 2),
        {"kind": "self", "stage": "in"},
    ]
    assert [spec.factors for (spec,) in vary("factors=[2,1],(3,)", TokenDownsample())] == [(2, 1), (3,)]


def test_of_several_specs_those_that_have_it():
    merging, tile = TokenMerging(), HyperTile()
    assert vary("ratio=0.25", tile, merging) == [[tile, TokenMerging(ratio=0.25)]]
    assert vary("seed=5", tile, merging) == [[HyperTile(seed=5), TokenMerging(seed=5)]]
    assert vary("HyperTile.seed=5", tile, merging) == [[HyperTile(seed=5), merging]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("raet=1", "'raet' is unknown, nearest: rate"),
        ("out.raet=1", "nearest: out.rate"),
        ("rate=51", "rate=51 is refused: rate takes a number from 0 to 50"),
        ("rate=fast", "rate='fast' is refused"),
        ("mode=3d", "one of 1d_avg"),
        ("keep_middle=1", "True or False"),
        ("in_=3", "takes a Reduction"),
    ],
)
def test_refused(text, words):
    with pytest.raises(SlothError, match=words):
        vary(text)


@pytest.mark.parametrize("text", ["rate", "=1", "rate=", "rate=1,,2", "rate=1,1"])
def test_no_variation(text):
    with pytest.raises(typer.BadParameter):
        Variation.parse(text)
