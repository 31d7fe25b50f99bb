"""Specs of guidance: what they refuse, the published values, JSON, and when they act."""

import json
import math
from dataclasses import FrozenInstanceError

import pytest

from sloth_fx import NAG, Sigma, SlothError, SlothfulAttention, load_spec
from sloth_fx.schedule import Moment

NOT_NUMBERS = [math.nan, True, False, "1", None, (1,), 1j]
REFUSED = {
    "scale": [0.99, 100.5, 0, -3, math.inf, *NOT_NUMBERS],
    "tau": [0, -2.5, -math.inf, *NOT_NUMBERS],
    "alpha": [-0.01, 1.01, math.inf, *NOT_NUMBERS],
    "start": [-0.01, 1.01, math.inf, Sigma(4.0), *NOT_NUMBERS],
    "stop": [-0.01, 1.01, math.inf, "4.0", *NOT_NUMBERS],
    "norm": ["L1", "l3", "", 1, None],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
def test_refused_values_are_named(name, value):
    with pytest.raises(SlothError, match=rf"^NAG: {name}=.* is refused: {name} takes ") as error:
        NAG(**{name: value})
    assert repr(value)[:80] in str(error.value)


@pytest.mark.parametrize("level", [-0.1, 1e7, math.inf, *NOT_NUMBERS])
def test_refused_noise_levels(level):
    with pytest.raises(SlothError, match=r"^Sigma: level=.* is refused: level takes a number from 0 to 1e\+06"):
        Sigma(level)


@pytest.mark.parametrize(
    "values",
    [
        *({"scale": value} for value in (1, 1.0, 100)),
        *({"tau": value} for value in (1e-6, 10, math.inf)),
        *({"alpha": value} for value in (0, 1)),
        *({"start": 0.4, "stop": value} for value in (0.4, 1, Sigma(0), Sigma(1e6))),
        {"norm": "l2"},
    ],
    ids=str,
)
def test_the_ends_of_the_ranges(values):
    spec = NAG(**values)
    assert {name: getattr(spec, name) for name in values} == values


def test_stop_before_start():
    with pytest.raises(SlothError, match=r"NAG: stop=0\.3 is before start=0\.5"):
        NAG(start=0.5, stop=0.3)


@pytest.mark.parametrize("stop", [{}, {"sigma": 4.0}, {"level": 4.0, "more": 1}, {"level": "4"}, {"level": None}])
def test_json_that_is_no_noise_level(stop):
    data = NAG().to_dict() | {"stop": stop}
    with pytest.raises(SlothError, match=r'as JSON, a noise level is \{"level": 4\.0\}|Sigma: level='):
        load_spec(data)


def test_where_is_checked():
    with pytest.raises(SlothError, match="where=''"):
        NAG(where="")


def test_a_spec_is_a_value():
    assert NAG(stop=Sigma(4.0)) == NAG(stop=Sigma(4.0)) != NAG(stop=Sigma(4.5))
    assert len({NAG(), NAG(scale=5), NAG(where="cross"), NAG(where={"kind": "cross"})}) == 3
    with pytest.raises(FrozenInstanceError):
        NAG().scale = 3.0


def test_defaults_are_those_of_flux():
    assert NAG() == NAG.preset("flux")
    assert (NAG().scale, NAG().tau, NAG().alpha, NAG().norm) == (5.0, 2.5, 0.25, "l1")
    assert (NAG().start, NAG().stop, NAG().where) == (0.0, 1.0, None)


# Of the paper phi, tau and alpha; of the workflows scale, tau, alpha and the noise level at which they end.
PAPER = {
    "flux": (4, 2.5, 0.25),
    "sd3.5": (4, 2.5, 0.125),
    "sana": (4, 2.5, 0.375),
    "pixart-sigma": (4, 2.5, 0.375),
    "wan2.1": (4, 2.5, 0.25),
    "sdxl": (2, 2.5, 0.5),
    "playground": (2, 2.5, 0.5),
    "sd1.5": (2, 2.5, 0.375),
}
WORKFLOWS = {
    "chroma": (5, 2.5, 0.25, 0.75),
    "flux-kontext": (3, 2.5, 0.25, 0.75),
    "sd3.5-turbo": (5, 2.5, 0.25, 0.75),
    "sdxl-dmd2": (3, 2.5, 0.5, 4),
    "hunyuan-video": (9, 2.5, 0.12, 0.9),
    "wan-4-steps": (11, 3.5, 0.5, 0.75),
}


@pytest.mark.parametrize("name", PAPER)
def test_presets_of_the_paper(name):
    phi, tau, alpha = PAPER[name]
    assert NAG.preset(name) == NAG(scale=phi + 1, tau=tau, alpha=alpha, norm="l1", start=0.0, stop=1.0)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_presets_of_the_workflows(name):
    scale, tau, alpha, end = WORKFLOWS[name]
    level = end if end > 1 else round(end / (1 - end), 9)  # the share of noise, of flows
    assert NAG.preset(name) == NAG(scale=scale, tau=tau, alpha=alpha, stop=Sigma(level))


def test_presets_take_a_selector_and_there_are_no_others():
    assert NAG.preset("sdxl", where="cross").where == "cross"
    with pytest.raises(SlothError, match=r"preset 'sdlx' is unknown, nearest: sdxl.*known: ") as error:
        NAG.preset("sdlx")
    known = str(error.value).partition("known: ")[2].rstrip(")").split(", ")
    assert sorted(known) == sorted([*PAPER, *WORKFLOWS])


@pytest.mark.parametrize(
    "spec",
    [
        NAG(),
        NAG(scale=11, tau=3.5, alpha=0.5, norm="l2", start=0.1, stop=0.6, where=(1, 2)),
        NAG(stop=Sigma(4.0), where={"kind": "cross", "path": ["a*", "b*"]}),
        NAG.preset("hunyuan-video"),
    ],
    ids=str,
)
def test_there_and_back(spec, tmp_path):
    data = spec.to_dict()
    assert (data["version"], data["type"]) == (1, "NAG")
    path = tmp_path / "spec.json"
    path.write_text(json.dumps([data, SlothfulAttention().to_dict()]), encoding="utf-8")
    assert load_spec(data) == spec
    assert load_spec(path) == [spec, SlothfulAttention()]


def test_the_form_of_a_noise_level():
    assert NAG(stop=Sigma(4.0)).to_dict()["stop"] == {"level": 4.0}
    assert isinstance(load_spec(NAG(stop=Sigma(4.0)).to_dict()).stop, Sigma)


def test_an_unlimited_tau_as_strict_json():
    spec = NAG(tau=math.inf)
    assert load_spec(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize("steps", [1, 4, 8, 50])
def test_in_which_steps_it_acts(steps):
    """From start on, and before stop; with stop=1 in the last one too, and with stop=start in none."""

    def acting(**values):
        return [i for i in range(steps) if NAG(**values).acts(Moment(i / steps))]

    assert acting() == list(range(steps))
    assert acting(stop=0.25) == list(range(math.ceil(steps / 4)))
    assert acting(start=0.25) == list(range(math.ceil(steps / 4), steps))
    assert acting(start=0.25, stop=0.5) == list(range(math.ceil(steps / 4), math.ceil(steps / 2)))
    assert acting(start=0.5, stop=0.5) == acting(stop=0.0) == []
    assert acting(scale=1) == acting(alpha=0) == []


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_the_ends_of_the_run(progress):
    assert NAG().acts(Moment(progress))
    assert NAG(start=progress).acts(Moment(progress))
    assert NAG(stop=progress).acts(Moment(progress)) == (progress == 1)


@pytest.mark.parametrize("steps", [1, 4, 8, 50])
def test_until_a_noise_level(steps):
    """While sigma is at least the level; 0 is never reached."""
    sigmas = [14.6 * (1 - i / steps) ** 3 for i in range(steps)]

    def acting(level, start=0.0):
        spec = NAG(start=start, stop=Sigma(level))
        return [i for i, sigma in enumerate(sigmas) if spec.acts(Moment(i / steps, sigma))]

    assert acting(0) == list(range(steps))
    assert acting(sigmas[steps // 2]) == list(range(steps // 2 + 1))
    assert acting(14.7) == []
    assert acting(4.0, start=0.1) == [i for i in acting(4.0) if i >= steps / 10]


@pytest.mark.parametrize("sigma", [None, math.nan])
def test_a_moment_without_sigma(sigma):
    with pytest.raises(SlothError, match=r"NAG ends at Sigma\(level=4.0\).*give stop=0\.\.1"):
        NAG(stop=Sigma(4.0)).acts(Moment(0.5, sigma))
    assert not NAG(start=0.6, stop=Sigma(4.0)).acts(Moment(0.5, sigma))  # not asked for


def test_clocks():
    assert NAG().clocks == frozenset()
    assert NAG(start=0.1).clocks == NAG(stop=0.9).clocks == {"progress"}
    assert NAG(stop=Sigma(4.0)).clocks == {"sigma"}
    assert NAG(start=0.1, stop=Sigma(4.0)).clocks == {"progress", "sigma"}
