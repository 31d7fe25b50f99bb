import pytest
import torch
import torch.nn.functional as F

from sloth_fx.errors import SlothError
from sloth_fx.operators import KeyLayout, Pooling, near_sighted_attention, reduce_tokens
from tests.operators import by_hand

SIZES = {"q": 4, "k": 4, "v": 6}  # channels of a head; values have a size of their own
LAYOUTS = {
    "one-tile": KeyLayout((7, 11)),
    "tiles": KeyLayout((12, 8), tile=(6, 4)),
    "edge-tiles": KeyLayout((13, 9), tile=(5, 5), samples=(4, 3)),
    "padded-above": KeyLayout((13, 9), tile=(5, 6), pad=(1, 2), samples=(2, 5)),
    "flat-samples": KeyLayout((7, 11), tile=(4, 6), pad=(0, 1), samples=(1, 7), flat=True),
    "frames": KeyLayout((5, 7), tile=(3, 4), pad=(0, 1), samples=(2, 3), frames=3),
    "frames-flat": KeyLayout((5, 7), tile=(3, 4), samples=(1, 6), frames=2, flat=True),
    "audio": KeyLayout((1, 23), tile=(1, 8), samples=(1, 5)),
}
POOLED = {
    "untiled": KeyLayout((13, 9), window=(2, 3)),
    "tiles": KeyLayout((12, 8), window=(2, 2), tile=(6, 4), samples=(4, 4), sample_window=(2, 2)),
    "edge-tiles": KeyLayout((13, 9), window=(2, 2), tile=(5, 5), samples=(5, 4), sample_window=(2, 2)),
    "padded-around": KeyLayout((7, 11), window=(2, 1), tile=(3, 4), pad=(1, 1), samples=(3, 2), sample_window=(2, 1)),
    "flat": KeyLayout((13, 9), window=(1, 4), tile=(5, 5), pad=(2, 0), samples=(1, 9), sample_window=(1, 4), flat=True),
    "no-samples": KeyLayout((13, 9), window=(3, 2), tile=(5, 5), pad=(1, 1)),
    "frames": KeyLayout((5, 7), (2, 1), (3, 4), (1, 0), samples=(3, 2), sample_window=(2, 1), frames=3, frame_window=2),
}
POOLINGS = [Pooling(), Pooling("avg", 1.0, 1.0), Pooling("max", 0.3, 0.8), Pooling("avg", 0.3, 0.8, "crop")]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def site(layout, batch=2, heads=2, channels=5):
    """Tokens (B, N, C) and the projections of each head."""
    tokens = torch.randn(batch, layout.tokens, channels, dtype=torch.float64)
    weights = {name: torch.randn(heads, channels, size, dtype=torch.float64) for name, size in SIZES.items()}
    return tokens, weights


def project(tokens, weight):
    """(B, N, C) -> (B, H, N, D), with the strides that a linear layer and a view of its heads leave."""
    return torch.einsum("bnc,hcd->bnhd", tokens, weight.to(tokens.dtype)).contiguous().transpose(1, 2)


def rewritten(tokens, weights, layout, pooling=None, **options):
    keys, values = reduce_tokens(tokens, layout, pooling) if pooling else (tokens, tokens)
    tensors = [project(x, weights[name]) for name, x in (("q", tokens), ("k", keys), ("v", values))]
    return near_sighted_attention(*tensors, layout, gathered=pooling is not None, **options)


def expected(tokens, weights, layout, pooling=None, **options):
    heads = [{name: weight[h].numpy() for name, weight in weights.items()} for h in range(len(weights["q"]))]
    each = [by_hand.near_sighted(tokens.numpy(), head, layout, pooling or Pooling(), **options) for head in heads]
    return torch.stack([torch.from_numpy(out) for out in each], 1)


def assert_equals_the_formula(layout, pooling=None, batch=2, **options):
    tokens, weights = site(layout, batch)
    correct = expected(tokens, weights, layout, pooling, **options)
    for merge in ("concat", "lse"):
        for dtype, error in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
            result = rewritten(tokens.to(dtype), weights, layout, pooling, merge=merge, **options)
            torch.testing.assert_close(result, correct.to(dtype), atol=error, rtol=error)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_whole_keys_equal_the_formula(layout):
    assert_equals_the_formula(layout)


@pytest.mark.parametrize("layout", POOLED.values(), ids=POOLED.keys())
@pytest.mark.parametrize("pooling", POOLINGS, ids=str)
def test_gathered_keys_equal_the_formula(layout, pooling):
    assert_equals_the_formula(layout, pooling)


@pytest.mark.parametrize("concat_local", [False, True])
@pytest.mark.parametrize("concat_global", [False, True])
@pytest.mark.parametrize(("halves", "batch"), [(1, 3), (2, 4), (3, 3)])
@pytest.mark.parametrize("samples", [None, (3, 4)])
def test_images_of_one_half_meet_as_asked(concat_local, concat_global, halves, batch, samples):
    options = {"halves": halves, "concat_local": concat_local, "concat_global": concat_global}
    layout = KeyLayout((5, 7), tile=(3, 4), pad=(1, 0), samples=samples)
    assert_equals_the_formula(layout, batch=batch, **options)
    assert_equals_the_formula(layout._replace(window=(2, 1)), Pooling("avg", 0.3, 1.0), batch, **options)


def test_a_large_odd_grid():
    layout = KeyLayout((61, 93), window=(3, 2), tile=(31, 31), pad=(1, 0), samples=(7, 6), sample_window=(3, 2))
    tokens, weights = site(layout, batch=1, heads=1)
    pooling = Pooling("avg", 0.3, 0.8)
    result = rewritten(tokens.float(), weights, layout, pooling)
    correct = expected(tokens, weights, layout, pooling).float()
    torch.testing.assert_close(result, correct, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", [KeyLayout((7, 11)), KeyLayout((7, 11), tile=(7, 11))])
def test_one_tile_without_samples_is_plain_attention_bit_for_bit(layout):
    query, key, value = (torch.randn(2, 77, 3 * 8).view(2, 77, 3, 8).transpose(1, 2) for _ in range(3))
    plain = F.scaled_dot_product_attention(query, key, value)
    assert torch.equal(near_sighted_attention(query, key, value, layout, gathered=False), plain)
    assert torch.equal(near_sighted_attention(query, key, value, layout, gathered=True), plain)


def test_gathering_unpooled_tokens_equals_cutting_whole_ones():
    layout = LAYOUTS["padded-above"]
    tokens, weights = site(layout)
    torch.testing.assert_close(rewritten(tokens, weights, layout, Pooling()), rewritten(tokens, weights, layout))


def test_the_result_lies_as_the_output_projection_wants_it():
    out = rewritten(*site(LAYOUTS["edge-tiles"]), LAYOUTS["edge-tiles"])
    assert out.transpose(1, 2).is_contiguous()


def test_scale_and_attend_are_passed_on():
    layout, calls = LAYOUTS["edge-tiles"], []

    def attend(query, key, value, scale=None):
        calls.append((query.shape, key.shape, value.shape, scale))
        return F.scaled_dot_product_attention(query, key, value, scale=scale)

    tokens, weights = site(layout)
    result = rewritten(tokens, weights, layout, attend=attend, scale=1.0)
    # 3 × 2 tiles of 5 × 5 at most, in 2 × 2 groups; 4 × 3 samples.
    assert calls[0] == ((4, 2, 25, 4), (4, 2, 37, 4), (4, 2, 37, 6), 1.0)
    assert [call[0][0] for call in calls] == [4, 4, 2, 2]
    torch.testing.assert_close(result, rewritten(tokens, weights, layout, attend=attend, scale=1.0, merge="lse"))
    assert len(calls) == 4, "lse has kernels of its own"
    weights["q"] = weights["q"] * SIZES["q"] ** 0.5
    torch.testing.assert_close(result, rewritten(tokens, weights, layout))


@pytest.mark.parametrize(("samples", "concat_global"), [(None, False), ((3, 4), True)])
def test_images_that_see_the_same_keys_share_them(samples, concat_global):
    layout, rows = KeyLayout((6, 8), tile=(3, 4), samples=samples), []

    def attend(query, key, value):
        rows.append(key.shape[0])
        return F.scaled_dot_product_attention(query, key, value)

    rewritten(*site(layout, 6), layout, attend=attend, halves=2, concat_local=True, concat_global=concat_global)
    assert rows == [2 * 4]  # halves × tiles, not images × tiles


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("merge", ["concat", "lse"])
def test_half_precision_is_close(dtype, merge):
    layout = POOLED["edge-tiles"]
    query, key, value = (torch.randn(2, 2, n, 8).to(dtype) for n in (layout.tokens, *[layout.gathered_tokens()] * 2))
    result = near_sighted_attention(query, key, value, layout, gathered=True, merge=merge)
    correct = near_sighted_attention(query.float(), key.float(), value.float(), layout, gathered=True)
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), correct, atol=8 * torch.finfo(dtype).eps, rtol=0.02)


@pytest.mark.parametrize("concat", [False, True])
def test_gradients(concat):
    layout = KeyLayout((3, 4), tile=(2, 3), pad=(0, 1), samples=(2, 2))
    tensors = [torch.randn(2, 1, 12, 1, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def attention(*tensors):
        return near_sighted_attention(*tensors, layout, gathered=False, concat_local=concat)

    assert torch.autograd.gradcheck(attention, tensors)


def test_gradients_of_gathered_keys():
    layout = KeyLayout((3, 4), window=(2, 1), tile=(2, 3), samples=(2, 2), sample_window=(2, 1))
    tensors = [
        torch.randn(1, 1, n, 1, dtype=torch.float64, requires_grad=True) for n in (12, *[layout.gathered_tokens()] * 2)
    ]
    assert torch.autograd.gradcheck(lambda *x: near_sighted_attention(*x, layout, gathered=True), tensors)


class Site(torch.nn.Module):
    def __init__(self, layout, merge):
        super().__init__()
        self.layout, self.merge = layout, merge

    def forward(self, tokens):
        keys, values = reduce_tokens(tokens, self.layout, Pooling("avg", 0.3, 0.8))
        query, key, value = (torch.unflatten(x, 2, (2, 4)).transpose(1, 2) for x in (tokens, keys, values))
        return near_sighted_attention(query, key, value, self.layout, gathered=True, merge=self.merge)


@pytest.mark.parametrize("merge", ["concat", "lse"])
def test_one_full_graph_for_each_distinct_layout(merge):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    module = Site(POOLED["edge-tiles"], merge)
    compiled, tokens = torch.compile(module, fullgraph=True, backend=counter), torch.randn(2, 117, 8)
    windows = [(2, 2), (3, 1)]
    with torch.no_grad():
        for window in windows + windows:
            module.layout = module.layout._replace(window=window)
            torch.testing.assert_close(compiled(tokens), module(tokens))
    assert counter.frame_count == len(windows)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch warns of itself
@pytest.mark.parametrize("merge", ["concat", "lse"])
def test_inductor(merge):
    torch._dynamo.reset()
    layout = KeyLayout((6, 7), window=(2, 1), tile=(3, 4), samples=(3, 3), sample_window=(2, 1))
    module, tokens = Site(layout, merge), torch.randn(2, 42, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(module, fullgraph=True)(tokens), module(tokens))


@pytest.mark.parametrize("merge", ["concat", "lse"])
def test_export(merge):
    module, tokens = Site(POOLED["padded-around"], merge), torch.randn(2, 77, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(module, (tokens,)).module()(tokens), module(tokens))


def test_errors_name_the_numbers():
    layout = LAYOUTS["edge-tiles"]
    query = torch.randn(3, 2, 117, 4)

    def attend(*tensors, layout=layout, gathered=False, **options):
        return near_sighted_attention(*tensors, layout, gathered=gathered, **options)

    with pytest.raises(SlothError, match="batch of 3 cannot be divided into 2 halves"):
        attend(query, query, query, halves=2)
    with pytest.raises(SlothError, match=r"116 queries do not fit a grid of \(13, 9\), which has 117"):
        attend(query[:, :, 1:], query, query)
    with pytest.raises(SlothError, match=r"116 keys do not fit .* takes 117"):
        attend(query, query[:, :, 1:], query)
    with pytest.raises(SlothError, match=r"116 values do not fit .* takes 117"):
        attend(query, query, query[:, :, 1:])
    with pytest.raises(SlothError, match=r"117 keys do not fit .* takes 129"):
        attend(query, query, query, gathered=True)
    with pytest.raises(SlothError, match=r"window of \(2, 2\) needs gathered keys"):
        attend(query, query, query, layout=POOLED["edge-tiles"])
    with pytest.raises(SlothError, match="'sum'"):
        attend(query, query, query, merge="sum")
    with pytest.raises(SlothError, match="no gradient"):
        attend(query.clone().requires_grad_(), query, query, merge="lse")
