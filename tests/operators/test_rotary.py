"""Rotations at the centre of windows: against e^{i angle} of the centre, worked out window by window."""

import numpy as np
import pytest
import torch

from sloth_fx.operators import KeyLayout, Pooling
from sloth_fx.operators.rotary import centre_rotation, rotation_of_reduced
from sloth_fx.site import Place
from tests.operators import by_hand

LAYOUTS = {
    "odd": KeyLayout((7, 11), window=(3, 1)),
    "even": KeyLayout((7, 11), window=(2, 4)),
    "frames": KeyLayout((3, 5), window=(2, 3), frames=5, frame_window=2),
    "tiles": KeyLayout((7, 9), window=(2, 2), tile=(4, 5), pad=(1, 0), samples=(3, 4), sample_window=(2, 3)),
    "samples-overlap": KeyLayout((7, 9), window=(2, 2), tile=(4, 5), samples=(1, 2), sample_window=(2, 3)),
    "audio": KeyLayout((1, 23), window=(1, 4)),
}
FREQUENCIES = np.array([[2.9, 0, 0], [0.3, 0, 0], [0, 3.0, 0], [0, 0.2, 0], [0, 0, 2.7], [0, 0, 0.1]])  # of each axis
BATCH = 2


def angles(places):
    """(n, 3) places as (frame, row, column) -> (n, channel pairs)."""
    return torch.from_numpy(places @ FREQUENCIES.T)


def positions(layout):
    return np.stack(np.meshgrid(*map(np.arange, (layout.frames, *layout.grid)), indexing="ij"), -1).reshape(1, -1, 3)


def centres(layout, border):
    """The middle between the first and the last token of each window."""
    place = positions(layout).astype(float)
    last = by_hand.reduce(place, layout, Pooling("max", border=border), 1.0)[0]
    first = by_hand.reduce(place, layout, Pooling("avg", border=border), 0.0)[0]
    return (first + last) / 2, first


def as_factors(kind, angle):
    """Of (n, pairs) angles, with the tokens along axis 1 of all."""
    angle = angle[None].expand(BATCH, -1, -1)
    if kind == "complex":
        return [torch.polar(torch.ones_like(angle), angle)]
    cos, sin = angle.cos(), angle.sin()
    if kind == "pair":
        return [cos, sin]
    return [torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("kind", ["pair", "complex", "matrix"])
@pytest.mark.parametrize("border", ["keep", "crop"])
def test_the_factor_of_the_centre_is_that_of_its_angle(layout, kind, border):
    centre, _ = centres(layout, border)
    factors = as_factors(kind, angles(positions(layout)[0]))
    expected = as_factors(kind, angles(centre))
    for scale in (1.0, 1.3):  # of a host that scales its rotation
        found = centre_rotation([scale * x for x in factors], kind, layout, Place(), 1, border)
        for result, correct in zip(found, expected, strict=True):
            torch.testing.assert_close(result / scale, correct, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("blend", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("name", ["even", "tiles"])
def test_factors_follow_the_keys_and_others_keep_theirs(blend, name):
    layout = LAYOUTS[name]
    centre, first = centres(layout, "keep")
    others = angles(np.random.default_rng(0).normal(size=(3, 3)))
    factors = as_factors("pair", torch.cat([others, angles(positions(layout)[0])]))
    found = rotation_of_reduced(factors, "pair", layout, Pooling("avg", blend, 0.7), Place(3, alone=False), 1)
    kept = {0.0: [first], 1.0: [centre]}.get(blend, [first, centre])
    expected = as_factors("pair", torch.cat([others, *map(angles, kept)]))
    for result, correct in zip(found, expected, strict=True):
        torch.testing.assert_close(result, correct, atol=1e-9, rtol=1e-9)


def test_tokens_may_lie_along_any_axis_and_in_any_precision():
    layout = LAYOUTS["even"]
    cos, sin = as_factors("pair", angles(positions(layout)[0]))
    expected = centre_rotation([cos, sin], "pair", layout, Place(), 1)
    moved = centre_rotation([x[0][:, None].bfloat16() for x in (cos, sin)], "pair", layout, Place(), 0)
    for result, correct in zip(moved, expected, strict=True):
        assert result.dtype == torch.bfloat16
        torch.testing.assert_close(result[:, 0].double(), correct[0], atol=0.2, rtol=0.05)


def test_windows_along_flattened_tokens_are_centred_along_them():
    layout = KeyLayout((5, 7), window=(1, 4), flat=True)
    turns = torch.linspace(0, 3, 35, dtype=torch.float64)[:, None]
    (result,) = centre_rotation([torch.polar(torch.ones_like(turns), turns)], "complex", layout, Place(), 0)
    middles = [(turns[i] + turns[min(i + 3, 34)]) / 2 for i in range(0, 35, 4)]
    torch.testing.assert_close(result.angle(), torch.stack(middles))
