"""The graph passes, each on a module small enough to read: what goes where, and that nothing else changes."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sloth_fx.capture import Skeleton, capture
from sloth_fx.operators import KeyLayout, Pooling
from sloth_fx.passes.canonicalise import canonicalise
from sloth_fx.passes.core import attention_cores
from sloth_fx.passes.reduce_kv import KeyValueReduction, reduce_kv
from sloth_fx.passes.simplify import simplify
from sloth_fx.passes.tile_queries import TiledAttention, tile_queries
from sloth_fx.rewrite import generate

CHANNELS, HEADS = 12, 2
GRID = (5, 7)
HALVED = KeyLayout(GRID, window=(2, 2))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(CHANNELS, CHANNELS) for _ in range(3))
        self.norm_k = nn.LayerNorm(CHANNELS // HEADS)

    def heads(self, x):
        return x.view(x.shape[0], -1, HEADS, CHANNELS // HEADS).transpose(1, 2)

    def forward(self, x):
        q, k, v = self.heads(self.to_q(x)), self.norm_k(self.heads(self.to_k(x))), self.heads(self.to_v(x))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Folded(Attention):
    """Heads in the batch, softmax spelled out."""

    def heads(self, x):
        return super().heads(x).reshape(-1, x.shape[1], CHANNELS // HEADS)

    def scores(self, q, k):
        empty = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype, device=q.device)
        return torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=(CHANNELS // HEADS) ** -0.5)

    def forward(self, x):
        q, k, v = self.heads(self.to_q(x)), self.norm_k(self.heads(self.to_k(x))), self.heads(self.to_v(x))
        out = torch.bmm(self.scores(q, k).softmax(dim=-1).to(v.dtype), v)
        return out.unflatten(0, (-1, HEADS)).transpose(1, 2).flatten(2)


class Matmul(Folded):
    """The same with matmul, scaling and an upcast."""

    def scores(self, q, k):
        return (q @ k.transpose(-2, -1) * (CHANNELS // HEADS) ** -0.5).float()


class FixedReshape(Attention):
    """Reshapes keys by the number of queries, so that fewer keys do not fit."""

    def forward(self, x):
        tokens = x.shape[1]
        q, k, v = (each(x).view(x.shape[0], tokens, HEADS, -1) for each in (self.to_q, self.to_k, self.to_v))
        return F.scaled_dot_product_attention(*(each.transpose(1, 2) for each in (q, k, v))).transpose(1, 2).flatten(2)


class Fused(Attention):
    def __init__(self):
        super().__init__()
        self.to_qkv = nn.Linear(CHANNELS, 3 * CHANNELS)

    def forward(self, x):
        q, k, v = (self.heads(each) for each in self.to_qkv(x).chunk(3, dim=-1))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Hypernetwork(Attention):
    """Keys and values are made from different tensors."""

    def __init__(self):
        super().__init__()
        self.for_k, self.for_v = nn.Linear(CHANNELS, CHANNELS), nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x):
        q, k, v = self.to_q(x), self.to_k(x + self.for_k(x)), self.to_v(x + self.for_v(x))
        return F.scaled_dot_product_attention(*map(self.heads, (q, k, v))).transpose(1, 2).flatten(2)


class Gate(nn.Module):
    """A softmax that is no attention."""

    def forward(self, x):
        return (x.softmax(dim=-1) * x).sum(1)


def graph_of(module, batch=2, grid=GRID):
    skeleton = Skeleton(module)
    calls = [
        skeleton.fake_inputs(((torch.empty(b, n, CHANNELS),), {})) for b, n in ((batch, grid[0] * grid[1]), (3, 50))
    ]
    result = capture(skeleton, skeleton.model, *calls)
    assert result.any_size
    return result


def tokens(batch=2, grid=GRID):
    return torch.randn(batch, grid[0] * grid[1], CHANNELS)


@pytest.mark.parametrize("kind", [Folded, Matmul])
def test_explicit_softmax_becomes_one_core_with_the_same_bits(kind):
    module, x = kind(), tokens()
    graph = graph_of(module).graph
    assert canonicalise(graph)
    (core,) = attention_cores(graph)
    assert not [node for node in graph.nodes if "softmax" in str(node.target)]
    assert torch.equal(generate(graph, "test")(module, x), module(x))
    q, k, v = torch.randn(3, 4, 6), torch.randn(3, 9, 6), torch.randn(3, 9, 6)
    assert torch.allclose(core.attend(q, k, v), F.scaled_dot_product_attention(q, k, v), atol=1e-6)
    assert not canonicalise(graph)


class OverQueries(Folded):
    """Normalised over the queries: no attention, though it has two products."""

    def forward(self, x):
        q, k, v = self.heads(self.to_q(x)), self.heads(self.to_k(x)), self.heads(self.to_v(x))
        return torch.bmm(self.scores(q, k).softmax(dim=1), v)


@pytest.mark.parametrize("kind", [Gate, OverQueries])
def test_a_softmax_that_is_no_attention_stays(kind):
    graph = graph_of(kind()).graph
    assert not canonicalise(graph)
    assert attention_cores(graph) == []


def test_options_of_the_host_go_with_the_core():
    class Options(Attention):
        def forward(self, x):
            q, k, v = map(self.heads, (self.to_q(x), self.to_k(x), self.to_v(x)))
            return F.scaled_dot_product_attention(q, k, value=v, scale=0.1, is_causal=True)

    (core,) = attention_cores(graph_of(Options()).graph)
    assert core.masked
    q, k, v = (torch.randn(1, 2, 5, 6) for _ in range(3))
    assert torch.equal(core.attend(q, k, v, **core.options), F.scaled_dot_product_attention(q, k, v, scale=0.1))


def reduced(module, layout=HALVED, pooling=None, hoist=True):
    """The module's graph with a reduction, the place of it, and its function."""
    result = graph_of(module)
    canonicalise(result.graph)
    (core,) = attention_cores(result.graph)
    _, place = reduce_kv(result.graph, core, "reduce", result.owner, level=0 if hoist else 2)
    module.add_module("reduce", KeyValueReduction("reduce", pooling or Pooling(), layout))
    return result.graph, place, generate(result.graph, "test")


@pytest.mark.parametrize("kind", [Attention, Folded, Matmul])
@pytest.mark.parametrize("hoist", [True, False])
def test_neutral_reduction_keeps_every_bit(kind, hoist):
    module, x = kind(), tokens()
    expected = module(x)
    _, _, function = reduced(module, KeyLayout(GRID), hoist=hoist)
    assert torch.equal(function(module, x), expected)


@pytest.mark.parametrize("kind", [Attention, Folded, Matmul])
def test_reduction_goes_above_both_projections(kind):
    module = kind()
    graph, place, function = reduced(module, pooling=Pooling("max", 1.0, 0.4))
    assert place == "above to_k, to_v"
    nodes = {str(node.target): node for node in graph.nodes if node.op == "call_module"}
    assert nodes["to_k"].args[0].args == (nodes["reduce"], 0)
    assert nodes["to_v"].args[0].args == (nodes["reduce"], 1)
    assert nodes["to_q"].args[0].op == "placeholder"
    x = tokens()
    image = x.transpose(1, 2).unflatten(2, GRID)
    peak = F.max_pool2d(F.pad(image, (0, 1, 0, 1), value=-torch.inf), 2)
    values = 0.6 * image[..., ::2, ::2] + 0.4 * peak
    k, v = (each.flatten(2).transpose(1, 2) for each in (peak, values))
    q, k, v = (Attention.heads(module, each) for each in (module.to_q(x), module.to_k(k), module.to_v(v)))
    expected = F.scaled_dot_product_attention(q, module.norm_k(k), v).transpose(1, 2).flatten(2)
    assert torch.allclose(function(module, x), expected, atol=1e-6)


@pytest.mark.parametrize(("hoist", "where"), [(True, "below the projection"), (False, "at the attention's keys")])
def test_average_at_the_core_is_the_average_above_it(hoist, where):
    module, x = Fused(), tokens()
    _, place, function = reduced(module, pooling=Pooling("avg", 1.0, 1.0), hoist=hoist)
    assert place.startswith(where)
    pooled = F.avg_pool2d(x.transpose(1, 2).unflatten(2, GRID), 2, ceil_mode=True, count_include_pad=False)
    q = module.to_qkv(x).chunk(3, dim=-1)[0]
    k, v = module.to_qkv(pooled.flatten(2).transpose(1, 2)).chunk(3, dim=-1)[1:]
    expected = F.scaled_dot_product_attention(*map(module.heads, (q, k, v))).transpose(1, 2).flatten(2)
    assert torch.allclose(function(module, x), expected, atol=1e-6)


def test_keys_and_values_from_different_tensors_are_each_reduced():
    module, x = Hypernetwork(), tokens()
    graph, place, function = reduced(module, pooling=Pooling("avg", 0.0, 1.0))
    assert place == "above to_k, to_v"
    assert len([node for node in graph.nodes if node.target == "reduce"]) == 2
    image = [(x + each(x)).transpose(1, 2).unflatten(2, GRID) for each in (module.for_k, module.for_v)]
    k = image[0][..., ::2, ::2]
    v = F.avg_pool2d(image[1], 2, ceil_mode=True, count_include_pad=False)
    q, k, v = module.to_q(x), *(to(y.flatten(2).transpose(1, 2)) for to, y in ((module.to_k, k), (module.to_v, v)))
    expected = F.scaled_dot_product_attention(*map(module.heads, (q, k, v))).transpose(1, 2).flatten(2)
    assert torch.allclose(function(module, x), expected, atol=1e-6)


@pytest.mark.parametrize("kind", [Attention, Folded])
def test_tiling_takes_the_place_of_the_core(kind):
    module, x = kind(), tokens()
    expected = module(x)
    result = graph_of(module)
    canonicalise(result.graph)
    (core,) = attention_cores(result.graph)
    assert tile_queries(result.graph, core, "tile") == "in place of the attention"
    assert attention_cores(result.graph) == []
    function = generate(result.graph, "test")
    folded = HEADS if kind is Folded else None
    module.tile = TiledAttention(
        "tile", core.attend, KeyLayout(GRID), folded_heads=folded, concat_local=False, concat_global=False
    )
    assert torch.equal(function(module, x), expected)
    module.tile.set_layout(KeyLayout(GRID, tile=(3, 4)), 1)
    q, k, v = (Attention.heads(module, to(x)) for to in (module.to_q, module.to_k, module.to_v))
    place = torch.arange(35).view(GRID)
    tile_of = (place // 7 // 3 * 10 + place % 7 // 4).flatten()
    same = tile_of[:, None] == tile_of[None]
    tiled = F.scaled_dot_product_attention(q, module.norm_k(k), v, attn_mask=same).transpose(1, 2).flatten(2)
    assert torch.allclose(function(module, x), tiled, atol=1e-6)


class Rescaled(Attention):
    factor, in_place = 1.0, False

    def forward(self, x):
        x = self.to_q(x)
        if self.in_place:
            x[:, 0] = 0
        return (x / self.factor) * 1


@pytest.mark.parametrize(("factor", "in_place", "left"), [(1.0, False, 0), (2.0, False, 1), (1.0, True, 2)])
def test_arithmetic_that_changes_nothing_goes(factor, in_place, left):
    module, x = Rescaled(), tokens()
    module.factor, module.in_place = factor, in_place
    graph = graph_of(module).graph
    assert simplify(graph) is (left < 2)
    assert sum(node.target in (operator.mul, operator.truediv) for node in graph.nodes) == left
    assert torch.equal(generate(graph, "test")(module, x), module(x))


def test_operators_have_no_state_and_show_themselves():
    operator = KeyValueReduction("site", Pooling(), HALVED)
    assert not operator.state_dict()
    assert "window=(2, 2)" in repr(operator)
