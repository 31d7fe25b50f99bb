"""Captured graphs: the idioms that symbolic tracing stumbles over, at sizes and types other than those captured."""

import dataclasses
import math
import sys
import types

import einops
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sloth_fx import SlothError
from sloth_fx.capture import Skeleton, capture
from sloth_fx.rewrite import generate


def captured(module, *shapes, other=None, **kwargs):
    """The capture of ``module`` for tensors of these shapes, and its function."""
    skeleton = Skeleton(module)
    call = skeleton.fake_inputs((tuple(map(torch.empty, shapes)), kwargs))
    again = skeleton.fake_inputs((tuple(map(torch.empty, other)), kwargs)) if other else None
    result = capture(skeleton, skeleton.model, call, again)
    return result, generate(result.graph, "test")


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("offset", torch.randn(6))


class ShapeUnpacking(Base):
    def forward(self, x):
        batch, tokens, channels = x.shape
        if x.ndim == 3 and channels % 2 == 0:
            x = self.linear(x).view(batch, tokens, 2, channels // 2)
        return x.transpose(1, 2).reshape(batch * 2, -1, channels // 2)


class TracedSizes(Base):
    def forward(self, x):
        scores = torch.empty(x.shape[0], x.shape[1], x.shape[1], dtype=x.dtype, device=x.device)
        return torch.baddbmm(scores, x, x.transpose(-1, -2), beta=0, alpha=0.5)


class InPlace(Base):
    def forward(self, x):
        out = torch.zeros_like(x)
        for i in range(2):
            out[:, i::2] = self.linear(x[:, i::2])
        out += self.offset
        return out


class WritesMethods(Base):
    """What a method writes into a tensor counts, whether its result is used or not."""

    def forward(self, x):
        x = self.linear(x)
        x.masked_fill_(x < 0, 0.5).mul_(2)
        view = x[:, 1:]
        view.add_(self.offset)
        return x


class Numbers(Base):
    """Scalars of NumPy, rounding, and a scalar where torch's own parser looks for a tensor first."""

    def forward(self, x):
        x = self.linear(x) * np.sqrt(np.float64(2.0)) + math.floor(x.shape[1] / 3) + round(x.shape[1] / 4)
        return torch.where(x > 0, x, -math.ceil(x.shape[1] / 5))


class OwnParametersFirst(Base):
    """A function of parameters alone, with a traced size."""

    def forward(self, x):
        offset = torch.cat([self.offset, self.linear.bias]).repeat(x.shape[1], 1)
        return self.linear(x) + offset[None, :, :6]


class Chosen(Base):
    """How many rows are chosen depends on the data; nothing else does."""

    def forward(self, x):
        rows = torch.nonzero(x.sum(-1).flatten() > 0).flatten()
        chosen = self.linear(x.flatten(0, 1)[rows])
        return F.pad(chosen, (0, 0, 0, x.shape[0] * x.shape[1] - chosen.shape[0]))


class ChosenByMask(Base):
    def forward(self, x):
        return self.linear(x[x.sum(-1) > 0])


class Einops(Base):
    def forward(self, x):
        x = einops.rearrange(self.linear(x), "b n (h d) -> b h n d", h=2)
        return einops.rearrange(x, "b h n d -> b n (h d)") * x.shape[-1] ** -0.5


class OwnParameters(Base):
    def forward(self, x):
        weight = self.linear.weight.t() * 2
        return torch.matmul(x.to(self.linear.weight.dtype), weight) + self.offset.view(1, 1, -1)


class Arange(Base):
    def forward(self, x):
        return x + torch.arange(x.shape[1], device=x.device).to(x.dtype)[None, :, None]


class PlainTensor(Base):
    def __init__(self):
        super().__init__()
        self.table = torch.arange(6.0)

    def forward(self, x):
        return self.linear(x) * self.table


class Tables:
    """An object that is no module, with tensors in a list and in a dict of lists."""

    def __init__(self):
        self.by_axis = [torch.randn(20), torch.randn(20, 6)]
        self.by_name = {"offsets": [torch.randn(6)]}
        self.owner = self


class TensorsInObjects(Base):
    def __init__(self):
        super().__init__()
        self.tables = Tables()
        self.pair = (torch.randn(6), self.offset)

    def forward(self, x):
        places = torch.arange(x.shape[1], device=x.device)
        tables = self.tables.by_axis[1][places] * self.tables.by_axis[0][places, None]
        return self.linear(x) * tables + self.tables.by_name["offsets"][0] - self.pair[0] * self.pair[1]


class KeepsResults(Base):
    """Its buffer is computed anew in every call."""

    def forward(self, x):
        self.offset = self.offset * 0 + torch.arange(x.shape[-1], device=x.device)
        return self.linear(x) + self.offset


ANY_SIZE = [
    *(ShapeUnpacking, TracedSizes, InPlace, WritesMethods, Numbers, OwnParametersFirst, Chosen, ChosenByMask, Einops),
    *(OwnParameters, Arange, PlainTensor, TensorsInObjects, KeepsResults),
]


@pytest.mark.parametrize("kind", ANY_SIZE)
def test_one_capture_serves_every_size(kind):
    module = kind()
    result, function = captured(module, (2, 4, 6), other=[(3, 10, 6)])
    assert result.any_size
    for shape in ((2, 4, 6), (1, 7, 6), (5, 12, 6)):
        x = torch.randn(shape)
        assert torch.equal(function(module, x), module(x))


@pytest.mark.parametrize("kind", [ShapeUnpacking, TracedSizes, InPlace, Einops, OwnParameters, Arange])
def test_capture_follows_types(kind):
    module = kind()
    result, function = captured(module, (2, 4, 6), other=[(3, 10, 6)])
    assert result.any_type
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    assert torch.equal(function(module.double(), x), module.double()(x))


class LargestNumber(Base):
    def forward(self, x):
        return x.clamp(max=torch.finfo(x.dtype).max)


def test_types_that_cannot_be_followed_are_noticed():
    module = LargestNumber()
    result, function = captured(module, (2, 4, 6), other=[(3, 10, 6)])
    assert result.any_size
    assert not result.any_type
    x = torch.randn(2, 5, 6)
    assert torch.equal(function(module, x), module(x))


class BranchOnType(Base):
    def forward(self, x):
        return x.float() if x.dtype == torch.float16 else self.linear(x)


def test_branch_on_type_is_noticed():
    assert not captured(BranchOnType(), (2, 4, 6), other=[(3, 10, 6)])[0].any_type


class BranchOnSize(Base):
    def forward(self, x):
        return self.linear(x) * 2 if x.shape[1] > 5000 else self.linear(x)


class BranchOnParity(Base):
    def forward(self, x):
        return self.linear(x) * 2 if x.shape[1] % 2 else self.linear(x)


class BranchOnChannels(Base):
    def forward(self, x):
        return self.linear(x) * x.shape[-1] ** -0.5 if x.shape[-1] > 3 else x


@pytest.mark.parametrize(
    ("kind", "any_size"), [(BranchOnSize, False), (BranchOnParity, False), (BranchOnChannels, True)]
)
def test_branch_on_size_is_noticed(kind, any_size):
    assert captured(kind(), (2, 4, 6), other=[(3, 10, 6)])[0].any_size is any_size


class Dropping(Base):
    def forward(self, x):
        return F.dropout(self.linear(x), 0.5, training=self.training)


@pytest.mark.parametrize(("kind", "any_mode"), [(Dropping, False), (ShapeUnpacking, True)])
def test_forward_that_differs_in_training_is_noticed(kind, any_mode):
    module = kind()
    assert captured(module, (2, 4, 6), other=[(3, 10, 6)])[0].any_mode is any_mode
    assert module.training


class BakedSize(Base):
    def forward(self, x):
        return F.pad(self.linear(x), (0, 0, 0, 10 - int(x.shape[1])))


def test_baked_size_is_noticed():
    module = BakedSize()
    result, function = captured(module, (2, 4, 6), other=[(2, 5, 6)])
    assert not result.any_size
    x = torch.randn(2, 4, 6)
    assert torch.equal(function(module, x), module(x))


def test_children_stay_leaves_and_can_be_replaced():
    module = ShapeUnpacking()
    result, function = captured(module, (2, 4, 6), other=[(3, 10, 6)])
    assert [node.target for node in result.graph.nodes if node.op == "call_module"] == ["linear"]
    module.linear = nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 6))
    x = torch.randn(3, 7, 6)
    assert torch.equal(function(module, x), module(x))


class Nested(Base):
    def forward(self, x, extra=None, *, scale=1.0, flag=False):
        if extra is not None:
            x = x + extra["bias"] * extra["more"][0]
        return {"sum": self.linear(x) * scale, "pair": (x, -x if flag else x)}


def test_tensors_in_containers_become_placeholders():
    module = Nested()
    skeleton = Skeleton(module)
    extra = {"bias": torch.randn(6), "more": [torch.randn(2, 4, 6)], "name": "text"}
    call = skeleton.fake_inputs(((torch.empty(2, 4, 6), extra), {"scale": 0.5, "flag": True}))
    graph = capture(skeleton, skeleton.model, call, None).graph
    names = [node.target for node in graph.nodes if node.op == "placeholder"]
    assert names == ["x", "extra_bias", "extra_more_0"]
    x = torch.randn(2, 4, 6)
    got = generate(graph, "test")(module, x, extra["bias"], extra["more"][0])
    expected = module(x, extra, scale=0.5, flag=True)
    assert torch.equal(got["sum"], expected["sum"])
    assert torch.equal(got["pair"][1], expected["pair"][1])


class TwoInputs(Base):
    def forward(self, x, other):
        return self.linear(x) - other


def test_one_tensor_in_two_roles_is_two_placeholders():
    module = TwoInputs()
    skeleton = Skeleton(module)
    x = skeleton.fake_inputs(torch.empty(2, 4, 6))
    function = generate(capture(skeleton, skeleton.model, ((x, x), {}), None).graph, "test")
    one, two = torch.randn(2, 4, 6), torch.randn(2, 4, 6)
    assert torch.equal(function(module, one, two), module(one, two))


@dataclasses.dataclass
class Output:
    sample: torch.Tensor
    size: int = 0


class Returning(Base):
    def forward(self, x):
        return Output(self.linear(x), x.shape[1])


def test_a_dataclass_is_returned_as_one():
    module = Returning()
    _, function = captured(module, (2, 4, 6), other=[(3, 10, 6)])
    x = torch.randn(2, 5, 6)
    out = function(module, x)
    assert type(out) is Output
    assert torch.equal(out.sample, module(x).sample)
    assert out.size == 5


def test_a_hosts_attention_function_is_a_leaf(monkeypatch):
    def flash_attn_func(q, k, v, causal=False):
        assert type(q) is torch.Tensor
        return q + k + v

    class Host(Base):
        def forward(self, x):
            x = x.unflatten(2, (2, 3))
            return host.flash_attn_func(x, x, x, causal=True).flatten(2)

    host = types.ModuleType("some_host")
    host.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "some_host", host)
    module = Host()
    result, function = captured(module, (2, 4, 6), other=[(3, 10, 6)])
    assert flash_attn_func in [node.target for node in result.graph.nodes]
    x = torch.randn(2, 5, 6)
    assert torch.equal(function(module, x), module(x))


class HandsOnItself(Base):
    def forward(self, x):
        return torch.vmap(lambda row: self.linear(row))(x)


class BranchesOnChoice(Base):
    def forward(self, x):
        return x * 2 if torch.nonzero(x).shape[0] > 3 else x


@pytest.mark.parametrize(
    ("kind", "reason"), [(HandsOnItself, "holds a module"), (BranchesOnChoice, "depends on the data")]
)
def test_reasons_are_given(kind, reason):
    with pytest.raises(SlothError, match=f"{kind.__name__} cannot be captured.*{reason}"):
        captured(kind(), (2, 4, 6))


class DataDependent(Base):
    def forward(self, x):
        return self.linear(x) if x.sum() > 0 else x


def test_what_depends_on_data_cannot_be_captured():
    with pytest.raises(SlothError, match="DataDependent cannot be captured"):
        captured(DataDependent(), (2, 4, 6))


def test_skeleton_leaves_the_model_alone_and_holds_no_data():
    module = Base()
    called = []
    module.register_forward_hook(lambda *_: called.append(1))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    skeleton = Skeleton(module)
    assert not skeleton.model._forward_hooks
    assert len(module._forward_hooks) == 1
    assert type(skeleton.model.linear.weight.data) is not torch.Tensor
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert not called
