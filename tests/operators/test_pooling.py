import pytest
import torch
import torch.nn.functional as F

from sloth_fx.errors import SlothError
from sloth_fx.operators import KeyLayout, Pooling, axis_strides, flat_stride, reduce_tokens
from tests.operators import by_hand

LAYOUTS = {
    "plain": KeyLayout((13, 9), window=(3, 2)),
    "divides": KeyLayout((12, 8), window=(3, 2)),
    "window-over-grid": KeyLayout((7, 11), window=(9, 4)),
    "flat": KeyLayout((7, 11), window=(1, 5), flat=True),
    "tiles": KeyLayout((13, 9), window=(2, 2), tile=(5, 5)),
    "tiles-unpooled": KeyLayout((7, 11), tile=(4, 4), pad=(1, 0), samples=(3, 4)),
    "tiles-that-divide": KeyLayout((12, 8), window=(2, 2), tile=(6, 4), samples=(4, 4), sample_window=(2, 2)),
    "tiles-that-divide-one-axis": KeyLayout((12, 13), window=(2, 2), tile=(6, 5), samples=(4, 4), sample_window=(2, 2)),
    "tiles-padded": KeyLayout((13, 9), window=(2, 3), tile=(5, 5), pad=(1, 1), samples=(5, 4), sample_window=(2, 3)),
    "window-over-edge-tile": KeyLayout(
        (9, 11), window=(4, 4), tile=(4, 4), pad=(2, 0), samples=(6, 5), sample_window=(5, 7)
    ),
    "tiles-flat": KeyLayout(
        (13, 9), window=(1, 4), tile=(5, 5), pad=(0, 1), samples=(1, 10), sample_window=(1, 4), flat=True
    ),
    "samples-overlap": KeyLayout((10, 13), window=(4, 3), tile=(5, 7), samples=(2, 2), sample_window=(4, 3)),
    "samples-overlap-flat": KeyLayout(
        (7, 11), window=(1, 5), tile=(4, 6), samples=(1, 3), sample_window=(1, 5), flat=True
    ),
    "samples-untiled": KeyLayout((7, 11), samples=(2, 3)),
    "frames": KeyLayout((5, 7), window=(2, 3), frames=3),
    "frames-pooled": KeyLayout((5, 7), window=(2, 2), frames=5, frame_window=2),
    "frames-pooled-alone": KeyLayout((5, 7), frames=5, frame_window=3),
    "frames-flat": KeyLayout((5, 7), window=(1, 4), frames=3, frame_window=2, flat=True),
    "frames-tiled": KeyLayout(
        (5, 7), window=(2, 2), tile=(3, 4), pad=(0, 1), samples=(2, 3), sample_window=(2, 2), frames=3
    ),
    "frames-tiled-evenly": KeyLayout(
        (4, 6), window=(2, 3), tile=(2, 3), samples=(3, 2), frames=5, frame_window=2, sample_window=(2, 1)
    ),
    "audio": KeyLayout((1, 23), window=(1, 3), tile=(1, 8), pad=(0, 1), samples=(1, 5)),
}
BLENDS = [(0.0, 0.0), (1.0, 1.0), (0.3, 0.8), (0.0, 1.0), (0.5, 0.0)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("blends", BLENDS)
@pytest.mark.parametrize("border", ["keep", "crop"])
@pytest.mark.parametrize("kind", ["avg", "max"])
def test_reduction_equals_the_formula(layout, blends, border, kind):
    pooling = Pooling(kind, *blends, border)
    # Below zero throughout: a zero that leaks in from padding would win every maximum and shift every average.
    tokens = torch.randn(2, layout.tokens, 3, dtype=torch.float64) - 5
    expected = [torch.from_numpy(by_hand.reduce(tokens.numpy(), layout, pooling, blend)) for blend in blends]
    for dtype, error in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        for result, correct in zip(reduce_tokens(tokens.to(dtype), layout, pooling), expected, strict=True):
            assert result.dtype == dtype
            assert result.shape[1] == layout.gathered_tokens(border)
            torch.testing.assert_close(result, correct.to(dtype), atol=error, rtol=error)


def test_a_neutral_layout_returns_the_tokens_themselves():
    tokens = torch.randn(2, 77, 3)
    keys, values = reduce_tokens(tokens, KeyLayout((7, 11)), Pooling("avg", 0.3, 0.8))
    assert keys is tokens
    assert values is tokens


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_equal_blends_are_computed_once(layout):
    keys, values = reduce_tokens(torch.randn(2, layout.tokens, 3), layout, Pooling("avg", 0.3, 0.3))
    assert keys is values


def test_only_what_the_blends_need_is_computed(monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError

    tokens, layout = torch.randn(2, 117, 3), LAYOUTS["tiles-padded"]
    with monkeypatch.context() as patch:
        patch.setattr(F, "avg_pool2d", forbidden)
        reduce_tokens(tokens, layout, Pooling("avg", 0.0, 0.0))
    monkeypatch.setattr(torch, "lerp", forbidden)
    reduce_tokens(tokens, layout, Pooling("avg", 1.0, 0.0))


def test_nothing_but_the_result_is_written():
    tokens = torch.randn(2, 64 * 64, 32)
    layout = KeyLayout((64, 64), window=(2, 2), tile=(32, 32), samples=(8, 8), sample_window=(2, 2))
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        reduced, _ = reduce_tokens(tokens, layout, Pooling("avg", 1.0, 1.0))
    written = sum(event.self_cpu_memory_usage for event in profile.events() if event.self_cpu_memory_usage > 0)
    assert written <= 3 * reduced.nbytes < tokens.nbytes


@pytest.mark.parametrize("kind", ["avg", "max"])
@pytest.mark.parametrize("name", ["plain", "tiles-padded", "tiles-flat", "samples-overlap", "frames-tiled-evenly"])
def test_gradients(kind, name):
    layout = LAYOUTS[name]
    tokens = torch.randn(1, layout.tokens, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: reduce_tokens(x, layout, Pooling(kind, 0.3, 1.0)), tokens)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["plain", "tiles-padded", "tiles-flat", "samples-overlap", "frames-pooled"])
@pytest.mark.parametrize("kind", ["avg", "max"])
def test_half_precision_is_close(dtype, name, kind):
    layout, pooling = LAYOUTS[name], Pooling(kind, 0.3, 0.8)
    tokens = torch.randn(2, layout.tokens, 3).to(dtype)
    for result, correct in zip(
        reduce_tokens(tokens, layout, pooling), reduce_tokens(tokens.float(), layout, pooling), strict=True
    ):
        assert result.dtype == dtype
        torch.testing.assert_close(result.float(), correct, atol=4 * torch.finfo(dtype).eps, rtol=0.02)


@pytest.mark.parametrize(
    ("stride", "grid", "long_axis", "expected"),
    [
        (6.0, (64, 64), "y", (3, 2)),
        (6.0, (64, 64), "x", (2, 3)),
        (4.0, (7, 11), "y", (2, 2)),
        (2.5, (7, 11), "x", (2, 2)),
        (2.0, (7, 11), "y", (2, 1)),
        (1.0, (7, 11), "y", (1, 1)),
        (0.2, (7, 11), "y", (1, 1)),
        (0.0, (7, 11), "x", (1, 1)),
        (50.0, (4, 100), "y", (4, 13)),  # 8 rows clipped to 4, so 13 columns and not 7
        (50.0, (4, 100), "x", (4, 8)),  # 8 columns, 7 rows clipped to 4
        (1000.0, (4, 5), "y", (4, 5)),
    ],
)
def test_axis_strides(stride, grid, long_axis, expected):
    assert axis_strides(stride, grid, long_axis) == expected


@pytest.mark.parametrize(("stride", "expected"), [(0.0, 1), (0.5, 1), (1.0, 1), (1.01, 2), (6.0, 6), (500.0, 77)])
def test_flat_stride(stride, expected):
    assert flat_stride(stride, 77) == (1, expected)


def test_errors_name_the_numbers():
    tokens, pooling = torch.randn(1, 78, 2), Pooling()
    with pytest.raises(SlothError, match=r"78 tokens do not fit a grid of \(7, 11\), which has 77"):
        reduce_tokens(tokens, LAYOUTS["flat"], pooling)
    with pytest.raises(SlothError, match=r"78 tokens do not fit 3 frames of a grid of \(5, 7\), which has 105"):
        reduce_tokens(tokens, LAYOUTS["frames"], pooling)
    with pytest.raises(SlothError, match="kind='median'"):
        reduce_tokens(tokens, LAYOUTS["flat"], Pooling("median"))
    with pytest.raises(SlothError, match="border='wrap'"):
        reduce_tokens(tokens, LAYOUTS["flat"], Pooling(border="wrap"))
    with pytest.raises(SlothError, match="'z'"):
        axis_strides(2.0, (7, 11), "z")
