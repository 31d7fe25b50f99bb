"""Every spelling of attention ends as one core with the host's bits, whose function serves other tensors as well."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from sloth_fx.capture import Skeleton, capture
from sloth_fx.capture.generate import generate
from sloth_fx.passes.canonicalise import canonicalise
from sloth_fx.passes.core import attention_cores
from tests.passes import spellings
from tests.passes.spellings import CHANNELS, EXPLICIT, HEAD_DIM, HEADS, MASKED

B, N = 3, 7


def captured(module, *tensors):
    skeleton = Skeleton(module)
    call = skeleton.fake_inputs((tensors, {}))
    return capture(skeleton, skeleton.model, call, None)


def canonical(module, *tensors):
    """The core of ``module`` and its function, from a capture at these inputs."""
    graph = captured(module, *tensors).graph
    canonicalise(graph)
    (core,) = attention_cores(graph)
    assert not [node for node in graph.nodes if "softmax" in str(node.target)]
    return core, generate(graph, "test")


def by_hand(query, key, value, scale, mask=None, cap=None):
    """Attention from its definition, in float64, a query at a time."""
    query, key, value = (each.double() for each in (query, key, value))
    out = torch.empty(*query.shape[:-1], value.shape[-1], dtype=torch.float64)
    for n in range(query.shape[-2]):
        scores = ((query[..., n, None, :] * key).sum(-1, keepdim=True) * scale)[..., 0]
        scores = scores if cap is None else torch.tanh(scores / cap) * cap
        if mask is not None:
            hidden = mask[..., n, :]
            scores = scores.where(hidden, -torch.inf) if mask.dtype is torch.bool else scores + hidden
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        out[..., n, :] = (weights[..., None] * value).sum(-2) / weights.sum(-1, keepdim=True)
    return out


def others(core, tokens=4, keys=9):
    """Query, key and value of another batch and other numbers of tokens, as the core takes them."""
    shapes = [each.meta["hint"].shape for each in (core.query, core.key, core.value)]
    return [
        torch.randn(2 * shape[0], *shape[1:-2], count, shape[-1])
        for shape, count in zip(shapes, (tokens, keys, keys), strict=True)
    ]


SCALES = {"GuidedDiffusion": 1.0, "FeatureMap": CHANNELS**-0.5, "VisionTransformer": 1.0}


@pytest.mark.parametrize("kind", EXPLICIT)
def test_spelled_out_attention_keeps_its_bits(kind):
    module = kind().eval()
    x = torch.randn(B, N, CHANNELS)
    core, function = canonical(module, x)
    assert torch.equal(function(module, x), module(x))
    assert core.refusal is None
    assert core.mask is None
    folded = core.query.meta["hint"].ndim == 3
    heads = 1 if kind is spellings.FeatureMap else HEADS
    assert core.query.meta["hint"].shape == ((B * heads, N, CHANNELS // heads) if folded else (B, HEADS, N, HEAD_DIM))


def options(core, module, *inputs):
    """The values of a core's options in a run of ``module``."""
    graph = copy.deepcopy(core.node.graph)
    nodes = {node.name: node for node in graph.nodes}
    graph.output({name: nodes[each.name] if isinstance(each, fx.Node) else each for name, each in core.options.items()})
    graph.erase_node(next(node for node in graph.nodes if node.op == "output"))
    return generate(graph, "test")(module, *inputs)


@pytest.mark.parametrize("kind", EXPLICIT)
@pytest.mark.parametrize("mask", [None, torch.rand(4, 9) > 0.4, torch.randn(4, 9)], ids=["none", "boolean", "added"])
def test_the_core_attends_over_other_tensors(kind, mask):
    module, x = kind().eval(), torch.randn(B, N, CHANNELS)
    core, _ = canonical(module, x)
    query, key, value = others(core)
    if mask is not None and mask.dtype is torch.bool:
        mask[:, 0] = True  # a query that attends to nothing has no defined result
    given = () if mask is None else (mask,)
    out = core.attend(query, key, value, *given, **options(core, module, x))
    scale = SCALES.get(kind.__name__, HEAD_DIM**-0.5)
    cap = None
    if kind is spellings.LearnedScale:
        scale, cap = module.temperature.exp(), 5
    assert torch.allclose(out.double(), by_hand(query, key, value, scale, *given, cap=cap), atol=1e-5)


@pytest.mark.parametrize("kind", MASKED)
def test_a_mask_is_the_cores(kind):
    module = kind().eval()
    x, mask = torch.randn(B, N, CHANNELS), torch.rand(B, N) > 0.5
    mask[:, 0] = True
    core, function = canonical(module, x, mask)
    assert torch.equal(function(module, x, mask), module(x, mask))
    assert core.refusal is None
    assert core.mask is not None
    boolean = kind in (spellings.LatentDiffusion, spellings.Chosen)
    assert core.mask.meta["hint"].dtype is (torch.bool if boolean else torch.float32)


@pytest.mark.parametrize("kind", [spellings.SlicedSamples, spellings.SlicedQueries])
@pytest.mark.parametrize("masked", [False, True])
def test_slices_are_one_attention(kind, masked):
    module = kind().eval()
    inputs = [torch.randn(B, N, CHANNELS)]
    if masked:
        inputs.append(torch.rand(B, N) > 0.5)
        inputs[1][:, 0] = True
    core, function = canonical(module, *inputs)
    assert torch.equal(function(module, *inputs), module(*inputs))
    assert core.refusal is None
    assert (core.mask is not None) is masked
    assert core.calls == 3
    query, key, value = others(core)
    mask = torch.rand(*query.shape[:-2], 4, 9) > 0.4
    mask[..., 0] = True
    for given in ((), (mask,)):
        out = core.attend(query, key, value, *given, **options(core, module, *inputs))
        assert torch.allclose(out.double(), by_hand(query, key, value, HEAD_DIM**-0.5, *given), atol=1e-5)


class Differential(spellings.Projections):
    """Slices that overlap are no slices of one attention."""

    def forward(self, x):
        q, k, v = map(self.heads, self.project(x))
        parts = [F.scaled_dot_product_attention(q[:, :, a:b], k, v) for a, b in ((0, 4), (3, 7))]
        return torch.cat(parts, dim=2)


def test_what_is_no_slice_stays():
    module, x = Differential(), torch.randn(B, N, CHANNELS)
    graph = captured(module, x).graph
    assert not canonicalise(graph)
    assert len(attention_cores(graph)) == 2
    assert torch.equal(generate(graph, "test")(module, x), module(x))


@pytest.mark.parametrize("batch_first", [True, False])
def test_multi_head_attention_is_opened(batch_first):
    module = nn.MultiheadAttention(CHANNELS, HEADS, batch_first=batch_first).eval()
    query, keys = torch.randn(B, N, CHANNELS), torch.randn(B, 5, CHANNELS)
    if not batch_first:
        query, keys = query.transpose(0, 1), keys.transpose(0, 1)
    skeleton = Skeleton(module)
    call = skeleton.fake_inputs(((query, keys, keys), {"need_weights": False}))
    result = capture(skeleton, skeleton.model, call, None)
    canonicalise(result.graph)
    (core,) = attention_cores(result.graph)
    assert core.query.meta["hint"].shape == (B, HEADS, N, HEAD_DIM)
    assert core.key.meta["hint"].shape == (B, HEADS, 5, HEAD_DIM)
    assert result.inexact  # whether two arguments are the same tensor changes how the host projects them
    out, weights = generate(result.graph, "test")(module, query, keys, keys)
    assert weights is None
    assert torch.allclose(out, module(query, keys, keys, need_weights=False)[0], atol=1e-6)
    values = keys + 0
    skeleton = Skeleton(module)
    call = skeleton.fake_inputs(((query, keys, values), {"need_weights": False}))
    result = capture(skeleton, skeleton.model, call, None)
    assert result.inexact is batch_first
    canonicalise(result.graph)
    out, _ = generate(result.graph, "test")(module, query, keys, values)
    assert torch.equal(out, module(query, keys, values, need_weights=False)[0])


@pytest.mark.parametrize("kind", [spellings.LatentDiffusion, spellings.SlicedSamples])
def test_cores_compile_without_a_break(kind):
    module, x, mask = kind().eval(), torch.randn(B, N, CHANNELS), torch.rand(B, N) > 0.5
    mask[:, 0] = True
    _, function = canonical(module, x, mask)
    with torch.no_grad():
        compiled = torch.compile(function, backend="eager", fullgraph=True)
        assert torch.equal(compiled(module, x, mask), module(x, mask))
    torch.compiler.reset()


def test_dropout_follows_the_mode():
    module, x = spellings.VisionTransformer(), torch.randn(B, N, CHANNELS)
    _, function = canonical(module, x)
    for training in (True, False):
        module.train(training)
        torch.manual_seed(1)
        expected = module(x)
        torch.manual_seed(1)
        assert torch.equal(function(module, x), expected)
    module.train()
    assert not torch.equal(function(module, x), expected)


class Gate(spellings.Projections):
    """Two softmaxes that are no attention: over what is no key, and with no product behind it."""

    def forward(self, x):
        q, k, v = map(self.heads, self.project(x))
        over_queries = (q @ k.transpose(-1, -2)).softmax(-2) @ v
        return over_queries + (q.softmax(-1) * v)


def test_a_softmax_that_is_no_attention_stays():
    module, x = Gate(), torch.randn(B, N, CHANNELS)
    graph = captured(module, x).graph
    assert not canonicalise(graph)
    assert attention_cores(graph) == []
    assert torch.equal(generate(graph, "test")(module, x), module(x))


class Exposed(spellings.Projections):
    """The attention map is part of the result."""

    def forward(self, x):
        q, k, v = map(self.heads, self.project(x))
        weights = (q @ k.transpose(-1, -2)).softmax(-1)
        return weights @ v, weights


class CappedBetween(spellings.Projections):
    """A mask, then something that a sum of masks cannot go through, then a mask."""

    def forward(self, x, mask):
        q, k, v = map(self.heads, self.project(x))
        scores = torch.tanh(q @ k.transpose(-1, -2) + x[:, None, None, :, 0])
        return scores.masked_fill(~mask[:, None, None], -1e4).softmax(-1) @ v


@pytest.mark.parametrize(
    ("kind", "reason"), [(Exposed, "map is used elsewhere"), (CappedBetween, "2 masks, and tanh in between")]
)
def test_what_operators_cannot_work_on_is_refused_and_kept(kind, reason):
    module, inputs = kind(), [torch.randn(B, N, CHANNELS)]
    if kind is CappedBetween:
        inputs.append(torch.rand(B, N) > 0.5)
    graph = captured(module, *inputs).graph
    assert canonicalise(graph)
    (core,) = attention_cores(graph)
    assert reason in core.refusal
    out, expected = generate(graph, "test")(module, *inputs), module(*inputs)
    for one, other in zip(*((each if isinstance(each, tuple) else (each,)) for each in (out, expected)), strict=True):
        assert torch.equal(one, other)


def test_a_core_is_given_other_tensors():
    module, x, mask = spellings.Added().eval(), torch.randn(B, N, CHANNELS), torch.rand(B, N) > 0.5
    mask[:, 0] = True
    graph = captured(module, x, mask).graph
    canonicalise(graph)
    (core,) = attention_cores(graph)
    with graph.inserting_before(core.node):
        fewer = [graph.call_method("narrow", (node, -2, 0, 3)) for node in (core.key, core.value)]
        hidden = graph.call_method("narrow", (core.mask, -1, 0, 3))
    core = core.replace(key=fewer[0], value=fewer[1], mask=hidden)
    assert (core.key, core.value, core.mask) == (*fewer, hidden)
    graph.lint()
    q, k, v = map(module.heads, module.project(x))
    bias = torch.zeros(B, N).masked_fill(~mask, -10000.0)[:, None, None, :3].expand(-1, -1, N, -1)
    expected = by_hand(q, k[:, :, :3], v[:, :, :3], HEAD_DIM**-0.5, bias).transpose(1, 2).flatten(2)
    assert torch.allclose(generate(graph, "test")(module, x, mask).double(), expected, atol=1e-5)
