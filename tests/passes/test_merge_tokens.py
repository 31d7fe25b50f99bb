"""Attention over merged tokens, worked out token by token from the map."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sloth_fx.capture import Skeleton, capture
from sloth_fx.errors import SlothError
from sloth_fx.operators import KeyLayout, Pooling, causal_mask
from sloth_fx.operators.merging import merge_map
from sloth_fx.passes.canonicalise import canonicalise
from sloth_fx.passes.core import attention_cores
from sloth_fx.passes.merge_tokens import MergedAttention, Merging, merge_tokens, rotates
from sloth_fx.passes.reduce_kv import KeyValueReduction, reduce_kv
from sloth_fx.passes.tile_queries import TiledAttention, tile_queries
from sloth_fx.rewrite import generate
from sloth_fx.site import Place
from tests.passes.test_reduce_kv import Joint, Rotary, angles, places

CHANNELS, HEADS, GRID, TEXT, BATCH = 16, 2, (5, 7), 3, 2
TOKENS = GRID[0] * GRID[1]
LAYOUT = KeyLayout(GRID)


class Plain(nn.Module):
    causal = False

    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(CHANNELS, CHANNELS) for _ in range(3))

    def heads(self, x):
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    def forward(self, x):
        query, key, value = (self.heads(each(x)) for each in (self.to_q, self.to_k, self.to_v))
        return F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)


class Folded(Plain):
    """Heads in the batch, softmax spelled out."""

    def forward(self, x):
        query, key, value = (self.heads(each(x)).flatten(0, 1) for each in (self.to_q, self.to_k, self.to_v))
        scores = torch.bmm(query, key.transpose(-1, -2)) * 8**-0.5
        return torch.bmm(scores.softmax(dim=-1), value)


class Masked(Plain):
    def forward(self, x, mask):
        query, key, value = (self.heads(each(x)) for each in (self.to_q, self.to_k, self.to_v))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def rewritten(module, inputs, tokens="all", level=0, place=None, ratio=0.5):
    skeleton = Skeleton(module)
    result = capture(skeleton, skeleton.model, skeleton.fake_inputs((inputs, {})), None)
    canonicalise(result.graph)
    (core,) = attention_cores(result.graph)
    where = merge_tokens(result.graph, core, "merge", result.owner, image_tokens=TOKENS, tokens=tokens, level=level)
    folded = HEADS if core.query.meta["hint"].ndim == 3 else None
    options = {"folded_heads": folded, "query_place": place, "key_place": place, "seed": 7}
    module.merge = MergedAttention("site", core.attend, LAYOUT, Merging(ratio, (2, 3), tokens), **options)
    function = generate(result.graph, "test")
    return lambda: function(module, *inputs), where


def matrix_of(x, ratio=0.5, grid=GRID, cell=(2, 3), seed=7):
    """(B, M, N) the mean of what becomes one, and (B, M, N) the pick of its destination."""
    mapping = merge_map(x, grid, cell, ratio, seed)
    belongs = F.one_hot(mapping.target).transpose(1, 2).to(x.dtype)
    return belongs / belongs.sum(-1, keepdim=True), F.one_hot(mapping.chosen, x.shape[1]).to(x.dtype), mapping.target


def by_matrices(query, key, value, q_to, k_to, v_to, target, mask=None):
    """Attention of (B, H, n, D) after (B, 1, M, n) maps, and to each query the row of what it is part of."""
    q, k, v = (each if to is None else to[:, None] @ each for each, to in ((query, q_to), (key, k_to), (value, v_to)))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    out = (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1) @ v
    if q_to is None:
        return out
    return torch.stack([each[:, index] for each, index in zip(out, target, strict=True)])


@pytest.mark.parametrize("kind", [Plain, Folded])
@pytest.mark.parametrize(("tokens", "level"), [("all", 0), ("all", 1), ("q", 0), ("kv", 0)])
def test_the_tokens_that_are_merged_are_those_asked_for(kind, tokens, level):
    module, x = kind(), torch.randn(BATCH, TOKENS, CHANNELS)
    function, where = rewritten(module, (x,), tokens, level)
    above = tokens == "all" and level == 0
    assert where.startswith(
        "tokens merged above to_q, to_k, to_v" if above else {"all": "queries, keys"}.get(tokens, "")
    )
    mean, _, target = matrix_of(x)
    maps = {"all": (mean, mean, mean), "q": (mean, None, None), "kv": (None, mean, mean)}[tokens]
    correct = by_matrices(*(module.heads(each(x)) for each in (module.to_q, module.to_k, module.to_v)), *maps, target)
    correct = correct.flatten(0, 1) if kind is Folded else correct
    torch.testing.assert_close(function(), correct, atol=1e-5, rtol=1e-5)
    module.merge.merging = Merging(0.0)
    assert torch.equal(function(), module(x))


def test_rotated_tokens_are_those_of_their_destination():
    module, x = Rotary(), torch.randn(BATCH, TOKENS, CHANNELS)
    inputs = (x, *module.factors(angles(places())))
    function, where = rewritten(module, inputs)
    assert where.endswith("(rotated queries and keys are those of their destination)")
    mean, pick, target = matrix_of(x)
    query, key = (
        module.rotate(each, *inputs[1:]).transpose(1, 2) for each in (module.heads(module.to_q(x)), module.key(x))
    )
    value = module.heads(module.to_v(x)).transpose(1, 2)
    correct = by_matrices(query, key, value, pick, pick, mean, target)
    torch.testing.assert_close(function(), correct, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("masked", [True, False])
def test_text_is_not_merged(masked):
    module, place = Joint(rotate_text=False), Place(TEXT, alone=False)
    x, text = torch.randn(BATCH, TOKENS, CHANNELS), torch.randn(BATCH, TEXT, CHANNELS)
    mask = torch.rand(BATCH, 1, 1, TEXT + TOKENS) < 0.7
    inputs = (x, text, *module.factors(angles(places())), *([mask] if masked else []))
    function, _ = rewritten(module, inputs, place=place)
    mean, pick, target = matrix_of(x)
    whole = torch.eye(TEXT).expand(BATCH, -1, -1)
    mean, pick = (
        torch.stack([torch.block_diag(t, each) for t, each in zip(whole, to, strict=True)]) for to in (mean, pick)
    )
    target = torch.cat([torch.arange(TEXT).expand(BATCH, -1), target + TEXT], 1)
    image = [module.rotate(each, *inputs[2:4]) for each in (module.heads(module.to_q(x)), module.key(x))]
    image.append(module.heads(module.to_v(x)))
    added = [module.heads(each(text)) for each in (module.add_q, module.add_k, module.add_v)]
    tensors = [torch.cat(both, 1).transpose(1, 2) for both in zip(added, image, strict=True)]
    seen = ((mean[:, None] * mask).sum(-1) > 0)[:, :, None] if masked else None
    correct = by_matrices(*tensors, pick, pick, mean, target, seen)
    torch.testing.assert_close(function(), correct, atol=1e-5, rtol=1e-5)
    module.merge.merging = Merging(0.0)
    assert torch.equal(function(), module(*inputs))


@pytest.mark.parametrize("additive", [True, False])
def test_a_query_keeps_the_mask_of_its_destination(additive):
    module, x = Masked(), torch.randn(BATCH, TOKENS, CHANNELS)
    mask = torch.rand(1, HEADS, TOKENS, TOKENS) < 0.6
    given = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf) if additive else mask
    function, _ = rewritten(module, (x, given))
    mean, pick, target = matrix_of(x)
    seen = (pick[:, None] @ mask.float() @ (mean > 0).float().mT[:, None]) > 0
    tensors = (module.heads(each(x)) for each in (module.to_q, module.to_k, module.to_v))
    correct = by_matrices(*tensors, mean, mean, mean, target, seen)
    torch.testing.assert_close(function(), correct, atol=1e-5, rtol=1e-5)


def test_a_causal_host_stays_so():
    module, x = Plain(), torch.randn(BATCH, TOKENS, CHANNELS)
    module.causal = True
    function, where = rewritten(module, (x,), "q")
    assert where == "queries merged at the attention"
    mean, pick, target = matrix_of(x)
    seen = pick[:, None] @ causal_mask(TOKENS, TOKENS, x.device).float() > 0
    tensors = (module.heads(each(x)) for each in (module.to_q, module.to_k, module.to_v))
    torch.testing.assert_close(function(), by_matrices(*tensors, mean, None, None, target, seen), atol=1e-5, rtol=1e-5)
    module.merge.merging = Merging(0.0, tokens="q")
    assert torch.equal(function(), module(x))


def test_where_keys_are_reduced_queries_alone_are_merged():
    module, x = Plain(), torch.randn(BATCH, TOKENS, CHANNELS)
    skeleton = Skeleton(module)
    result = capture(skeleton, skeleton.model, skeleton.fake_inputs(((x,), {})), None)
    (core,) = attention_cores(result.graph)
    core, _ = reduce_kv(result.graph, core, "reduce", result.owner)
    assert merge_tokens(result.graph, core, "merge", result.owner, tokens="q") == "queries merged at the attention"
    module.reduce = KeyValueReduction("site", Pooling(), KeyLayout(GRID, window=(2, 3)))
    module.merge = MergedAttention("site", core.attend, LAYOUT, Merging(0.5, (2, 3), "q"), seed=7)
    few = x.unflatten(1, GRID)[:, ::2, ::3].flatten(1, 2)
    query, key, value = (module.heads(to(y)) for to, y in ((module.to_q, x), (module.to_k, few), (module.to_v, few)))
    mean, _, target = matrix_of(query.transpose(1, 2).flatten(2))
    correct = by_matrices(query, key, value, mean, None, None, target)
    torch.testing.assert_close(generate(result.graph, "test")(module, x), correct, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rotary", [False, True])
def test_queries_are_merged_within_their_tile(rotary):
    module, x = Rotary() if rotary else Plain(), torch.randn(BATCH, TOKENS, CHANNELS)
    inputs = (x, *module.factors(angles(places()))) if rotary else (x,)
    skeleton = Skeleton(module)
    result = capture(skeleton, skeleton.model, skeleton.fake_inputs((inputs, {})), None)
    (core,) = attention_cores(result.graph)
    assert rotates(core, result.owner) is rotary
    tile_queries(result.graph, core, "tile", rotated=rotary)
    options = {"folded_heads": None, "concat_local": False, "concat_global": False}
    module.tile = TiledAttention("site", core.attend, LAYOUT, merging=Merging(0.5, (2, 2), "q"), seed=7, **options)
    function = generate(result.graph, "test")
    module.tile.set_layout(KeyLayout(GRID, tile=(5, 4)), 1)
    out = function(module, *inputs)
    parts = module.to_q(x), module.to_k(x), module.to_v(x)
    if rotary:
        query, key, value = (
            module.heads(each) for each in (parts[0], module.norm_k(module.heads(parts[1])).flatten(2), parts[2])
        )
        query, key, value = (
            each.transpose(1, 2) for each in (*(module.rotate(e, *inputs[1:]) for e in (query, key)), value)
        )
    else:
        query, key, value = map(module.heads, parts)
    columns = torch.arange(TOKENS) % 7
    for low, high in ((0, 4), (4, 7)):
        here = (columns >= low) & (columns < high)
        q, k, v = (each[:, :, here] for each in (query, key, value))
        mean, pick, target = matrix_of(q.transpose(1, 2).flatten(2), grid=(5, high - low), cell=(2, 2))
        correct = by_matrices(q, k, v, pick if rotary else mean, None, None, target)
        torch.testing.assert_close(out[:, :, here], correct, atol=1e-5, rtol=1e-5)
    module.tile.merging = Merging(0.0)
    module.tile.set_layout(LAYOUT, 1)
    assert torch.equal(function(module, *inputs), module(*inputs))


def test_another_seed_is_no_new_graph():
    from torch._dynamo.testing import CompileCounterWithBackend

    module, x = Plain(), torch.randn(BATCH, TOKENS, CHANNELS)
    function, _ = rewritten(module, (x,))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    results = []
    with torch.no_grad():
        for number in (7, 8, 7):
            module.merge.set_seed(number)
            results.append(compiled())
            torch.testing.assert_close(results[-1], function())
    assert counter.frame_count == 1
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])


def test_operators_have_no_state_and_name_their_site():
    module = MergedAttention("blocks.3", F.scaled_dot_product_attention, LAYOUT, Merging())
    assert not module.state_dict()
    q = torch.randn(1, 2, 34, 4)
    with pytest.raises(SlothError, match="34 tokens"):
        module(q, q, q)
    with pytest.raises(SlothError, match=r"blocks\.3: 34 tokens do not fit 1 x \(5, 7\)"):
        module.tokens(torch.randn(1, 34, 4))
