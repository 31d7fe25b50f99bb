"""Objects in calls: taken as they come, read, written into, handed on and made anew."""

import functools
import itertools

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

from sloth_fx import SlothError
from sloth_fx.capture import Skeleton, capture
from sloth_fx.capture.call import Handle, labelled_tensors, read_call, substitute
from sloth_fx.capture.generate import generate

SHAPE = (2, 7, 6)


class Cache:
    def __init__(self, scale=1.0):
        self.key = None
        self.bias = torch.randn(6)
        self.scale = scale

    def store(self, key):
        self.key = key


class Child(nn.Module):
    """A leaf that takes an object."""

    def forward(self, x, cache):
        return x * cache.bias + cache.scale


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.child = Child()


def captured(module, *args, again=None):
    """The capture of ``module`` for these arguments, and a function of others."""
    skeleton = Skeleton(module)
    call, other = (skeleton.fake_inputs((each, {})) if each is not None else None for each in (args, again))
    result = capture(skeleton, skeleton.model, call, other)
    function = generate(result.graph, "test")

    def run(*args):
        pattern, tensors = read_call(args, {})
        assert pattern == result.pattern
        return function(module, *tensors)

    return result, run


def targets(result):
    return [getattr(node.target, "__name__", node.target) for node in result.graph.nodes]


class Reads(Base):
    def forward(self, x, cache):
        assert isinstance(cache, Cache)
        x = self.linear(x) + cache.bias if cache.scale > 0 else x
        return self.child(x, cache), x


def test_an_object_is_read_and_handed_on():
    module = Reads()
    result, run = captured(module, torch.randn(SHAPE), Cache(), again=(torch.randn(3, 5, 6), Cache()))
    assert result.any_size
    handed = []
    module.child.register_forward_pre_hook(lambda _, args: handed.append(args[1]))
    x, cache = torch.randn(3, 11, 6), Cache()
    assert all(map(torch.equal, run(x, cache), module(x, cache)))
    assert all(each is cache for each in handed)


class Writes(Base):
    def forward(self, x, cache):
        cache.store(self.linear(x))
        return cache.key * 2 + cache.bias


def test_what_is_written_into_an_object_lies_there_afterwards():
    module = Writes()
    example = Cache()
    _, run = captured(module, torch.randn(SHAPE), example)
    assert example.key is None
    x, cache, expected = torch.randn(SHAPE), Cache(), Cache()
    expected.bias = cache.bias
    assert torch.equal(run(x, cache), module(x, expected))
    assert torch.equal(cache.key, expected.key)


class Nested(Base):
    def forward(self, x, caches):
        for cache in caches["layers"]:
            cache.key = x
        return x + sum(cache.bias for cache in caches["layers"])


def test_objects_in_containers_and_in_objects():
    module = Nested()
    _, run = captured(module, torch.randn(SHAPE), {"layers": [Cache(), Cache()]})
    x, caches = torch.randn(SHAPE), {"layers": [Cache(), Cache()]}
    assert torch.equal(run(x, caches), x + sum(cache.bias for cache in caches["layers"]))
    assert [cache.key is x for cache in caches["layers"]] == [True, True]


class NamedResults(Base):
    """What has a name in the result of a function is handed on like any tensor, also within an object."""

    def forward(self, x):
        highest = x.max(dim=1)
        cache = Cache()
        cache.bias = highest.values
        return torch.cat([highest.values, highest.indices], dim=-1), self.child(highest.values, cache)


def test_named_results_are_handed_on():
    module = NamedResults()
    result, run = captured(module, torch.randn(SHAPE), again=(torch.randn(3, 5, 6),))
    assert result.any_size
    x = torch.randn(3, 11, 6)
    assert all(map(torch.equal, run(x), module(x)))


class Appends(Base):
    def forward(self, x, seen):
        seen.append(x)
        return self.linear(x)


class Deletes(Base):
    def forward(self, x, cache):
        del cache.key
        return self.linear(x)


class HandsOnWritten(Base):
    def forward(self, x, cache):
        cache.key = x
        return self.child(x, cache)


class Storing(nn.Module):
    def forward(self, x, cache):
        cache.key = x
        return x


class ChildWrites(Base):
    def __init__(self):
        super().__init__()
        self.child = Storing()

    def forward(self, x, cache):
        return self.child(x, cache)


@pytest.mark.parametrize(
    ("module", "argument", "reason"),
    [
        (Appends(), [], "writes into a list"),
        (Deletes(), Cache(), "deletes the key of a Cache"),
        (HandsOnWritten(), Cache(), "hands on a Cache after"),
        (ChildWrites(), Cache(), "its child child writes"),
    ],
)
def test_writes_that_would_be_lost_are_refused(module, argument, reason):
    with pytest.raises(SlothError, match=reason):
        captured(module, torch.randn(SHAPE), argument)


def test_the_pattern_tells_objects_apart_by_what_they_hold():
    def pattern(value):
        return read_call((value,), {})[0]

    def scaling(scale, bias):
        return lambda x: x * scale + bias

    bias, other = torch.randn(6), torch.randn(6)
    assert pattern(Cache()) == pattern(Cache())
    assert pattern(Cache()) != pattern(Cache(scale=2.0))
    assert pattern(scaling(2, bias)) == pattern(scaling(2, other))
    assert pattern(scaling(2, bias)) != pattern(scaling(3, bias))
    assert pattern(functools.partial(torch.add, bias)) == pattern(functools.partial(torch.add, other))
    assert pattern(functools.partial(torch.add, bias)) != pattern(functools.partial(torch.sub, bias))
    assert pattern(Cache().store) == pattern(Cache().store)
    assert pattern(nn.Linear(2, 3)) != pattern(nn.Linear(2, 3))  # a module is itself


def test_tensors_handles_and_names_are_in_one_order():
    bias = torch.randn(6)

    def closing(x):
        return x + bias

    args = (torch.randn(SHAPE), {"caches": [Cache()], "call": functools.partial(closing, x=bias)})
    tensors = read_call(args, {})[1]
    named = list(labelled_tensors(lambda x, extra: None, args, {}))
    assert [name for name, _ in named] == [
        "x",
        "extra_caches_0",
        "extra_caches_0_bias",
        "extra_call",
        "extra_call_function",
        "extra_call_function_closure_0",
        "extra_call_keywords_x",
    ]
    values = [
        [each.value if isinstance(each, Handle) else each for each in list_]
        for list_ in (tensors, dict(named).values())
    ]
    assert all(one is other for one, other in zip(*values, strict=True))
    met = []
    substitute(args, lambda tensor: met.append(tensor) or tensor)
    assert list(map(id, met)) == [id(each) for each in tensors if not isinstance(each, Handle)]


def test_fake_objects_leave_the_originals_alone():
    cache = Cache()
    bias = cache.bias
    fake = Skeleton(nn.Linear(2, 2)).fake_inputs(cache)
    assert type(fake) is Cache
    assert type(fake.bias) is not torch.Tensor
    assert cache.bias is bias


def test_an_object_that_holds_itself_is_no_endless_matter():
    one = Cache()
    one.other, one.itself = Cache(), one
    one.other.other = one
    pattern, tensors = read_call((one,), {})
    assert pattern == read_call((one,), {})[0]
    assert 2 <= len(tensors) < 100


# Masks made of blocks


def by_frames(frames, length):
    def mask_mod(b, h, query, key):
        return (frames[query] >= frames[key]) & (key < length)

    return mask_mod


def dense(mask):
    return mask.to_dense().bool()


class Masked(nn.Module):
    """Makes a mask of a tensor and a size, or of blocks, or takes one, and hands it on to a leaf."""

    def __init__(self):
        super().__init__()
        self.show = Shows()

    def forward(self, x, mask=None):
        tokens = x.shape[1]
        made = create_block_mask(
            by_frames(x[0, :, 0].cumsum(0), tokens - 2), None, None, tokens, tokens, device=x.device, BLOCK_SIZE=16
        )
        assert isinstance(made, BlockMask)
        assert made.dq_write_order is None
        counts = (x[:, None, :3, 0] > 0).sum(-1, keepdim=True).expand(-1, -1, 3).to(torch.int32) + 1
        order = x[:, None, :3, :3].argsort(-1).to(torch.int32)
        blocks = BlockMask.from_kv_blocks(torch.zeros_like(counts), order, counts, order, BLOCK_SIZE=16)
        return [self.show(each) for each in (made, blocks, *([] if mask is None else [mask]))], made.kv_indices + 1


class Shows(nn.Module):
    def forward(self, mask):
        probe = torch.arange(5)
        return mask.to_dense(), mask.mask_mod(probe * 0, probe * 0, probe, probe.flip(0))


def flat(result):
    shown, indices = result
    return [*itertools.chain.from_iterable(shown), indices]


def test_masks_of_blocks_are_made_where_the_graph_runs():
    module = Masked()
    frames = torch.arange(40.0)
    mask = create_block_mask(by_frames(frames, 30), None, None, 40, 40, device="cpu", BLOCK_SIZE=16)
    result, run = captured(module, torch.randn(2, 40, 5), mask, again=(torch.randn(3, 50, 5), mask))
    assert result.any_size
    assert {"create_block_mask", "vmap_impl", "new_BlockMask", "new_mask_mod"} <= set(targets(result))
    x = torch.randn(3, 70, 5)
    mask = create_block_mask(by_frames(frames.flip(0), 30), None, None, 40, 40, device="cpu", BLOCK_SIZE=16)
    for got, expected in zip(flat(run(x, mask)), flat(module(x, mask)), strict=True):
        assert torch.equal(got, expected)


def test_a_mask_of_another_length_is_another_pattern():
    def pattern(length, size=40):
        mod = by_frames(torch.arange(40.0), length)
        return read_call((create_block_mask(mod, None, None, size, size, device="cpu", BLOCK_SIZE=16),), {})[0]

    assert pattern(30) == pattern(30)
    assert pattern(30) != pattern(31)
    assert pattern(30) != pattern(30, 39)


class DenseMask(Base):
    def forward(self, x):
        mask = create_mask(by_frames(x[0, :, 0], x.shape[1] - 1), 1, 1, x.shape[1], x.shape[1], device=x.device)
        return mask[0, 0].to(x.dtype) @ self.linear(x)


class Vectorised(Base):
    """Closes over a size, a tensor and a parameter."""

    def forward(self, x):
        tokens, first, bias = x.shape[1], x[:, 0], self.linear.bias

        def each(row, channel):
            return (row + first.sum()) * tokens + channel * bias[0], row.flip(0)

        return torch.vmap(torch.vmap(each, in_dims=(0, None)), in_dims=(1, 0), out_dims=1)(x, x[0, :, 0])


@pytest.mark.parametrize("kind", [DenseMask, Vectorised])
def test_functions_that_torch_vectorises_natively(kind):
    module = kind()
    result, run = captured(module, torch.randn(SHAPE), again=(torch.randn(3, 10, 6),))
    assert result.any_size
    x = torch.randn(4, 5, 6)
    got, expected = run(x), module(x)
    assert all(map(torch.equal, got, expected)) if isinstance(got, tuple) else torch.equal(got, expected)


class Sets(Base):
    def forward(self, x):
        mask = create_block_mask(by_frames(x[0, :, 0], 3), None, None, 7, 7, device=x.device)
        mask.seq_lengths = (6, 6)
        return self.linear(x)


def test_setting_what_a_leaf_made_is_refused():
    with pytest.raises(SlothError, match="sets the seq_lengths of a BlockMask"):
        captured(Sets(), torch.randn(SHAPE))
