"""Every spelling of attention ends as one core with the host's bits, whose function serves other tensors as well."""

import copy

import pytest
import torch
from torch import fx

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
