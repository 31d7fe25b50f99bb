"""Attention functions of hosts become cores in one layout, with the host's bits."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sloth_fx import SlothError
from sloth_fx.capture import Skeleton, capture
from sloth_fx.capture.evaluate import evaluate
from sloth_fx.capture.generate import generate
from sloth_fx.passes.canonicalise import canonicalise
from sloth_fx.passes.core import attention_cores

B, N, M, CHANNELS, HEADS = 3, 7, 5, 12, 2
HEAD_DIM = CHANNELS // HEADS


def forbidden(tensor):
    """Kernels look at data: no capture may call them."""
    return type(tensor) is not torch.Tensor


def dispatch(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, *, backend=None):
    assert not forbidden(query)
    q, k, v = (each.transpose(1, 2) for each in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale).transpose(1, 2)


def comfy(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs):
    assert not forbidden(q)
    if not skip_reshape:
        q, k, v = (each.unflatten(2, (heads, -1)).transpose(1, 2) for each in (q, k, v))
    mask = mask[:, None] if mask is not None and mask.ndim == 3 else mask
    out = F.scaled_dot_product_attention(q, k, v, mask)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def flash(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
    return dispatch(q, k, v, is_causal=causal, scale=softmax_scale)


def xformers(query, key, value, attn_bias=None, p=0.0, scale=None):
    if query.ndim == 4:
        return dispatch(query, key, value, attn_bias, scale=scale)
    assert not forbidden(query)
    return F.scaled_dot_product_attention(query, key, value, attn_bias, scale=scale)


def sage(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None):
    assert not forbidden(q)
    return F.scaled_dot_product_attention(q, k, v) if tensor_layout == "HND" else dispatch(q, k, v)


@pytest.fixture
def host(monkeypatch):
    module = types.ModuleType("some_host")
    module.dispatch_attention_fn, module.optimized_attention, module.flash_attn_func = dispatch, comfy, flash
    module.memory_efficient_attention, module.sageattn = xformers, sage
    monkeypatch.setitem(sys.modules, "some_host", module)
    return module


class Attention(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(CHANNELS, CHANNELS) for _ in range(3))
        self.call = call

    def forward(self, x, text, mask=None):
        return self.call(self.to_q(x), self.to_k(text), self.to_v(text), mask)


def apart(*tensors):
    return [each.unflatten(2, (HEADS, -1)) for each in tensors]


def first(*tensors):
    return [each.transpose(1, 2) for each in apart(*tensors)]


def folded(*tensors):
    return [each.flatten(0, 1) for each in first(*tensors)]


def calls(host):
    """Name: a call as a host writes it, what it hands over besides, and whether it gives a mask."""
    return {
        "diffusers": (
            lambda q, k, v, m: host.dispatch_attention_fn(*apart(q, k, v), backend=None).flatten(2),
            {},
            False,
        ),
        "diffusers mask": (
            lambda q, k, v, m: host.dispatch_attention_fn(*apart(q, k, v), attn_mask=m[:, None, None], scale=0.3),
            {"scale": 0.3},
            True,
        ),
        "comfy": (lambda q, k, v, m: host.optimized_attention(q, k, v, HEADS), {"heads": HEADS}, False),
        "comfy mask": (
            lambda q, k, v, m: host.optimized_attention(q, k, v, HEADS, m[:, None].expand(-1, q.shape[1], -1)),
            {"heads": HEADS},
            True,
        ),
        "comfy apart": (
            lambda q, k, v, m: host.optimized_attention(*first(q, k, v), HEADS, skip_reshape=True),
            {"heads": HEADS, "skip_reshape": True},
            False,
        ),
        "comfy out": (
            lambda q, k, v, m: host.optimized_attention(q, k, v, heads=HEADS, skip_output_reshape=True),
            {"heads": HEADS, "skip_output_reshape": True},
            False,
        ),
        "flash": (
            lambda q, k, v, m: host.flash_attn_func(*apart(q, k, v), softmax_scale=0.2),
            {"softmax_scale": 0.2},
            False,
        ),
        "xformers": (lambda q, k, v, m: host.memory_efficient_attention(*apart(q, k, v)), {}, False),
        "xformers folded": (lambda q, k, v, m: host.memory_efficient_attention(*folded(q, k, v)), {}, False),
        "sage": (lambda q, k, v, m: host.sageattn(*first(q, k, v)), {}, False),
        "sage tokens first": (
            lambda q, k, v, m: host.sageattn(*apart(q, k, v), tensor_layout="NHD"),
            {"tensor_layout": "NHD"},
            False,
        ),
    }


@pytest.mark.parametrize("name", list(calls(None)))
def test_calls_become_cores(host, name):
    call, expected_options, masked = calls(host)[name]
    module = Attention(call)
    inputs = [torch.randn(B, N, CHANNELS), torch.randn(B, M, CHANNELS)]
    if masked:
        inputs.append(torch.rand(B, M) > 0.4)
        inputs[2][:, 0] = True
    skeleton = Skeleton(module)
    graph = capture(skeleton, skeleton.model, skeleton.fake_inputs((tuple(inputs), {})), None).graph
    assert canonicalise(graph)
    assert not canonicalise(graph)
    (core,) = attention_cores(graph)
    lead = (B * HEADS,) if name == "xformers folded" else (B, HEADS)
    shapes = [tuple(each.meta["hint"].shape) for each in (core.query, core.key, core.value, core.node)]
    assert shapes == [(*lead, tokens, HEAD_DIM) for tokens in (N, M, M, N)]
    assert core.refusal is None
    assert core.options == expected_options
    assert (core.mask is not None) is masked
    if masked:
        assert core.mask.meta["hint"].ndim == 4
    assert torch.equal(generate(graph, "test")(module, *inputs), module(*inputs))
    assert evaluate(core.node, skeleton.model, skeleton.mode).shape == core.node.meta["hint"].shape

    query, key = (
        torch.randn(*[2 * each for each in lead[:1]], *lead[1:], 4, HEAD_DIM),
        torch.randn(2 * lead[0], *lead[1:], 9, HEAD_DIM),
    )
    scale = expected_options.get("scale", expected_options.get("softmax_scale"))
    expected = F.scaled_dot_product_attention(query.double(), key.double(), key.double(), scale=scale)
    assert torch.allclose(core.attend(query, key, key, **core.options).double(), expected, atol=1e-5)


def test_causal_and_masks_are_the_cores(host):
    module = Attention(lambda q, k, v, m: host.flash_attn_func(*apart(q, k, v), causal=True))
    inputs = torch.randn(B, N, CHANNELS), torch.randn(B, N, CHANNELS)
    skeleton = Skeleton(module)
    graph = capture(skeleton, skeleton.model, skeleton.fake_inputs((inputs, {})), None).graph
    canonicalise(graph)
    (core,) = attention_cores(graph)
    assert core.causal
    assert core.options == {}
    assert torch.equal(generate(graph, "test")(module, *inputs), module(*inputs))
    query = torch.randn(B, HEADS, N, HEAD_DIM)
    with pytest.raises(SlothError, match="flash_attn_func takes no mask"):
        core.attend(query, query, query, torch.ones(N, N, dtype=torch.bool))


def test_what_operators_cannot_work_on_is_refused(host):
    module = Attention(lambda q, k, v, m: host.flash_attn_func(*apart(q, k, v), window_size=(2, 2)))
    inputs = torch.randn(B, N, CHANNELS), torch.randn(B, N, CHANNELS)
    skeleton = Skeleton(module)
    graph = capture(skeleton, skeleton.model, skeleton.fake_inputs((inputs, {})), None).graph
    canonicalise(graph)
    (core,) = attention_cores(graph)
    assert "within a window" in core.refusal
