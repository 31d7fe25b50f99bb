"""Specs of guidance by perturbed attention: what they refuse, JSON, and when they act."""

import json
import math
from dataclasses import FrozenInstanceError

import pytest

from sloth_fx import PAG, SAG, SEG, SLG, TPG, Moment, Perturb, SlothError, load_spec

NOT_NUMBERS = [math.nan, True, "1", None, (1,), 1j]
KINDS = [PAG, SEG, TPG, SAG]
REFUSED = {
    "scale": [-0.1, 100.5, math.inf, *NOT_NUMBERS],
    "start": [-0.01, 1.01, *NOT_NUMBERS],
    "stop": [-0.01, 1.01, *NOT_NUMBERS],
    "rescale": [-0.01, 1.01, *NOT_NUMBERS],
}
OWN = [
    *((PAG, "adaptive", value) for value in (-0.1, 1.1, *NOT_NUMBERS)),
    *((SEG, "blur_sigma", value) for value in (-1.0, *NOT_NUMBERS)),
    *((SAG, "blur_sigma", value) for value in (-1.0, *NOT_NUMBERS)),
    *((SAG, "threshold", value) for value in (-1.0, math.inf, *NOT_NUMBERS)),
    *((TPG, "seed", value) for value in (-1, 2**31, 0.5, True, None)),
    *((SLG, "layers", value) for value in ((), [], 7, "7", [-1], [True], [0.5], [""], [None])),
    *((Perturb, "fn", value) for value in (None, 3, "fn")),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
def test_refused_values_are_named(kind, name, value):
    with pytest.raises(SlothError, match=rf"^{kind.__name__}: {name}=.* is refused: {name} takes "):
        kind(**{name: value})


@pytest.mark.parametrize(("kind", "name", "value"), OWN)
def test_refused_values_of_one_kind(kind, name, value):
    with pytest.raises(SlothError, match=rf"^{kind.__name__}: {name}=.* is refused: {name} takes "):
        kind(**{name: value})


@pytest.mark.parametrize("kind", KINDS)
def test_stop_before_start(kind):
    with pytest.raises(SlothError, match=rf"{kind.__name__}: stop=0\.3 is before start=0\.5"):
        kind(start=0.5, stop=0.3)


def test_layers_and_a_function_have_to_be_given():
    with pytest.raises(TypeError, match="layers"):
        SLG()
    with pytest.raises(TypeError, match="fn"):
        Perturb()


def test_defaults_are_the_published_ones():
    assert (SAG().scale, SAG().blur_sigma, SAG().threshold, SAG().where) == (0.75, 1.0, 1.0, "middle")
    assert (PAG().scale, PAG().adaptive, PAG().where) == (3.0, 0.0, "middle")
    assert (SEG().scale, SEG().blur_sigma, SEG().where) == (3.0, math.inf, "middle")
    assert (SLG(layers=[7]).scale, SLG(layers=[7]).start, SLG(layers=[7]).stop) == (2.8, 0.01, 0.2)
    assert (TPG().scale, TPG().where) == (3.0, "in")


def test_a_spec_is_a_value():
    assert SLG(layers=[7, 8]) == SLG(layers=(7, 8)) != SLG(layers=(7, 9))
    assert len({PAG(), PAG(scale=3), PAG(scale=4), SEG()}) == 3
    with pytest.raises(FrozenInstanceError):
        PAG().scale = 2.0


SPECS = [
    SAG(scale=0.5, blur_sigma=2.0, start=0.1, stop=0.9, rescale=0.7),
    PAG(adaptive=0.01, where={"kind": "self", "depth": (1, 2)}),
    SEG(blur_sigma=10.0),
    SEG(),
    SLG(layers=[7, "blocks.8"]),
    TPG(seed=3),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_json_and_back(spec):
    assert load_spec(json.loads(json.dumps(spec.to_dict()))) == spec


def test_a_function_has_no_json_form():
    with pytest.raises(SlothError, match=r"Perturb: fn=.* has no JSON form"):
        Perturb(lambda query, key, value: value).to_dict()


def acting(spec, steps):
    """The steps of a run that it acts in."""
    moments = [Moment(i / steps, step=(i / steps, (i + 1) / steps)) for i in range(steps)]
    return [i for i, moment in enumerate(moments) if spec.acts(moment)]


@pytest.mark.parametrize("steps", [1, 4, 8, 50])
@pytest.mark.parametrize("kind", KINDS)
def test_all_of_a_run_by_default(kind, steps):
    assert acting(kind(), steps) == list(range(steps))


@pytest.mark.parametrize(
    ("start", "stop", "expected"),
    [
        (0.01, 0.2, {1: [0], 4: [0], 8: [1], 50: list(range(1, 10))}),
        (0.0, 0.25, {1: [0], 4: [0], 8: [0, 1], 50: list(range(13))}),
        (0.25, 0.5, {1: [0], 4: [1], 8: [2, 3], 50: list(range(13, 25))}),
        (0.5, 1.0, {1: [0], 4: [2, 3], 8: [4, 5, 6, 7], 50: list(range(25, 50))}),
        (0.99, 1.0, {1: [0], 4: [3], 8: [7], 50: [49]}),
        (0.3, 0.3, {1: [], 4: [], 8: [], 50: []}),
    ],
)
def test_a_part_of_a_run_however_short(start, stop, expected):
    assert {steps: acting(PAG(start=start, stop=stop), steps) for steps in expected} == expected


def test_no_interval_is_lost_and_none_acts_twice_in_a_step():
    for steps in (1, 3, 7, 20):
        for first in range(40):
            interval = first / 40, (first + 1) / 40
            found = acting(PAG(start=interval[0], stop=interval[1]), steps)
            begins = [i for i in range(steps) if interval[0] <= i / steps < interval[1]]
            assert found == (begins or found), (steps, interval)
            assert len(found) >= 1


def test_where_nobody_knows_how_long_a_step_is():
    spec = PAG(start=0.01, stop=0.2)
    assert [spec.acts(Moment(progress)) for progress in (0.0, 0.01, 0.1, 0.2, 1.0)] == [False, True, True, False, False]
    assert PAG(start=0.5).acts(Moment(1.0))  # to the very end


def test_scales():
    moment = Moment(0.25)
    assert PAG(scale=3.0).scale_at(moment) == 3.0
    assert PAG(scale=3.0, adaptive=0.01).scale_at(moment) == pytest.approx(3.0 - 0.01 * (1000 - 750))
    assert PAG(scale=3.0, adaptive=0.02).scale_at(moment) == 0.0
    assert not PAG(scale=3.0, adaptive=0.02).acts(moment)
    assert PAG(start=0.3).scale_at(moment) == 0.0
    for spec in (PAG(scale=0), SEG(blur_sigma=0), SAG(blur_sigma=0.0), SLG(layers=[1], scale=0)):
        assert not spec.acts(moment)


def test_clocks():
    assert PAG().clocks == frozenset()
    assert PAG(adaptive=0.1).clocks == PAG(start=0.1).clocks == SLG(layers=[1]).clocks == {"progress"}
