"""Attention functions of hosts: recognised by name, read in one layout, and put back as they were."""

import sys
import threading
import types

import pytest
import torch
import torch.nn.functional as F

from sloth_fx import SlothError
from sloth_fx.capture import host_functions
from sloth_fx.capture.host_functions import HostCall, entry_for, intercept, register_attention_function

B, N, M, H, D = 3, 7, 5, 2, 6


def sdpa(query, key, value):
    return F.scaled_dot_product_attention(query, key, value)


def dispatch_attention_fn(query, key, value, attn_mask=None, **options):
    return sdpa(*(each.transpose(1, 2) for each in (query, key, value))).transpose(1, 2)


ORIGINAL = dispatch_attention_fn  # this module's global of that name is replaced as well


def optimized_attention(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False):
    if not skip_reshape:
        q, k, v = (each.unflatten(2, (heads, -1)).transpose(1, 2) for each in (q, k, v))
    out = sdpa(q, k, v)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
    return sdpa(query, key, value) if query.ndim == 3 else dispatch_attention_fn(query, key, value)


def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False):
    return sdpa(q, k, v) if tensor_layout == "HND" else dispatch_attention_fn(q, k, v)


def bhnd():
    return torch.randn(B, H, N, D), torch.randn(B, H, M, D), torch.randn(B, H, M, D + 3)


def bnhd():
    return tuple(each.transpose(1, 2) for each in bhnd())


def bnc():
    return tuple(each.flatten(2) for each in bnhd())


def folded():
    return tuple(each.flatten(0, 1) for each in bhnd())


CALLS = [
    (dispatch_attention_fn, bnhd, (), {}),
    (optimized_attention, bnc, (H,), {}),
    (optimized_attention, bnc, (), {"heads": H, "skip_output_reshape": True}),
    (optimized_attention, bhnd, (H,), {"skip_reshape": True}),
    (optimized_attention, bhnd, (H, None, None, True, True), {}),
    (memory_efficient_attention, bnhd, (), {}),
    (memory_efficient_attention, folded, (), {}),
    (sageattn, bhnd, (), {}),
    (sageattn, bnhd, ("NHD",), {}),
]


@pytest.mark.parametrize(("function", "tensors", "args", "kwargs"), CALLS)
def test_calls_are_read_in_one_layout(function, tensors, args, kwargs):
    given = tensors()
    entry = entry_for(function.__name__, function)
    call = HostCall.read(entry, (*given, *args), kwargs)
    heads = (B * H, 1) if tensors is folded else (B, H)
    assert [tuple(each.shape) for each in (call.query, call.key, call.value)] == [
        (*heads, N, D),
        (*heads, M, D),
        (*heads, M, D + 3),
    ]
    assert call.query.data_ptr() == given[0].data_ptr()
    expected = function(*given, *args, **kwargs)
    assert call.empty().shape == expected.shape
    assert torch.allclose(sdpa(call.query, call.key, call.value).sum(), expected.sum(), atol=1e-4)
    assert call.refusal is None


def test_what_operators_cannot_work_on_is_said():
    given = bhnd()
    assert "blocks" in HostCall.read(_flex(), given, {"block_mask": object()}).refusal
    packed = entry_for("flash_attn_varlen_func", lambda q, k, v, **_: q)
    call = HostCall.read(packed, tuple(torch.randn(11, H, D) for _ in range(3)), {"cu_seqlens_q": None})
    assert "one sequence" in call.refusal
    assert call.query.shape == (1, H, 11, D)
    biased = entry_for("memory_efficient_attention", memory_efficient_attention)
    assert "mask is a" in HostCall.read(biased, bnhd(), {"attn_bias": object()}).refusal


def _flex():
    return entry_for("flex_attention", lambda query, key, value: query)


@pytest.fixture
def host():
    module = types.ModuleType("a_host")
    other = types.ModuleType("another_host")
    module.dispatch_attention_fn = other.dispatch_attention_fn = ORIGINAL
    module.optimized_attention = lambda x: x  # of that name, and something else
    module.sageattn = torch.nn.Identity()
    sys.modules.update(a_host=module, another_host=other)
    yield module
    del sys.modules["a_host"], sys.modules["another_host"]


def test_calls_are_intercepted_and_everything_is_put_back(host):
    before = dict(vars(host))
    seen = []

    def handler(entry, function, args, kwargs):
        seen.append((entry.name, function))
        return function(*args, **kwargs)

    with intercept(handler):
        assert host.dispatch_attention_fn is sys.modules["another_host"].dispatch_attention_fn
        host.dispatch_attention_fn(*bnhd())
        host.optimized_attention(1)
        with intercept(lambda *_: "inner"):
            assert host.dispatch_attention_fn(*bnhd()) == "inner"
        host.dispatch_attention_fn(*bnhd())
    assert seen == [("dispatch_attention_fn", ORIGINAL)] * 2
    assert dict(vars(host)) == before
    assert sys.modules["another_host"].dispatch_attention_fn is ORIGINAL


def test_after_an_error_everything_is_put_back(host):
    def fail(*_):
        raise RuntimeError

    with pytest.raises(RuntimeError), intercept(fail):
        host.dispatch_attention_fn(*bnhd())
    assert host.dispatch_attention_fn is ORIGINAL
    with intercept(lambda *_: 1):
        host.dispatch_attention_fn = sdpa
    assert host.dispatch_attention_fn is sdpa


def test_other_threads_meet_nothing(host):
    results, inside, done = [], threading.Event(), threading.Event()

    def elsewhere():
        with intercept(lambda *_: "theirs"):
            inside.set()
            done.wait(5)
            results.append(host.dispatch_attention_fn(*bnhd()))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    inside.wait(5)
    assert host.dispatch_attention_fn is not ORIGINAL
    assert host.dispatch_attention_fn(*bnhd()).shape == (B, N, H, D + 3)
    with intercept(lambda *_: "mine"):
        done.set()
        thread.join()
        assert host.dispatch_attention_fn(*bnhd()) == "mine"
    assert results == ["theirs"]
    assert host.dispatch_attention_fn is ORIGINAL


def test_functions_can_be_registered():
    name = "my_attention"
    with pytest.raises(SlothError, match="layout 'BDHN' is none of"):
        register_attention_function(name, layout="BDHN")
    with pytest.raises(SlothError, match="needs heads="):
        register_attention_function(name, layout="BNC")
    with pytest.raises(SlothError, match="query, key and value come first"):
        register_attention_function(name, layout="BHND", parameters=("q",))
    try:
        entry = register_attention_function(name, layout="BNC", parameters=("k1", "k2", "k3", "n"), heads="n")
        assert entry_for(name, lambda k1, k2, k3, n: k1) is entry
        assert entry_for(name, lambda q, k, v: q) is None
        with pytest.raises(SlothError, match="without 'n'"):
            HostCall.read(entry, bnc(), {})
        with pytest.raises(SlothError, match="not 5 heads"):
            HostCall.read(entry, bnc(), {"n": 5})
    finally:
        del host_functions._TABLE[name]
