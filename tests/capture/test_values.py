"""Hosts that steer by the values of an argument: what they read becomes part of the capture, and is known."""

import pytest
import torch
from torch import nn

from sloth_fx import SlothError
from sloth_fx.bind import Variant, Variants, make_forward, read_form
from sloth_fx.capture import Skeleton, capture
from sloth_fx.capture.generate import generate

B, N, C = 2, 7, 6


def captured(module, *tensors):
    """The capture of ``module`` for these tensors, and its function."""
    skeleton = Skeleton(module)
    result = capture(skeleton, skeleton.model, skeleton.fake_inputs((tensors, {})), None)
    return result, generate(result.graph, "test")


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(C, C)


class ByGrid(Base):
    """A loop over grids of whole numbers, each with a tail that is left as it is."""

    def forward(self, x, grids):
        out = []
        for index, (rows, columns) in enumerate(grids.tolist()):
            image = self.linear(x[index, : rows * columns]).view(rows, columns, -1).transpose(0, 1)
            out.append(torch.cat([image.flatten(0, 1), x[index, rows * columns :]]))
        return torch.stack(out)


class ByItem(Base):
    def forward(self, x, lengths):
        longest = lengths.max().item()
        return self.linear(x[:, :longest]) * (1 + int(lengths.sum()) % 2)


class ByMask(Base):
    """Masks that hide nothing are left out."""

    def forward(self, x, mask):
        if mask.all():
            return self.linear(x)
        return self.linear(x) * mask[..., None]


class ByWritten(Base):
    """What is written into a tensor, through a view, counts."""

    def forward(self, x, lengths):
        hidden = torch.zeros(x.shape[0], x.shape[1], dtype=torch.bool, device=x.device)
        for index, length in enumerate(lengths):
            row = hidden[index]
            row[int(length) :] = True
        return self.linear(x) if hidden.any() else x


class ByArray(Base):
    def forward(self, x, lengths):
        return self.linear(x) * float(lengths.cpu().numpy().mean()) + lengths.bool().tolist()[0]


class BySlice(Base):
    """Tensors say where to cut, in what is read and in what is written."""

    def forward(self, x, lengths):
        x = self.linear(x[:, : lengths.max()])
        seen = torch.zeros(x.shape[:2], dtype=x.dtype, device=x.device)
        for index in range(x.shape[0]):
            seen[index, : lengths[index]] = 1
        return x * seen[..., None]


class ByRows(Base):
    """How many rows a mask picks."""

    def forward(self, x, mask):
        picked = torch.nonzero(mask)
        return self.linear(x) * 2 if picked.shape[0] > 3 else x


GRIDS = torch.tensor([[2, 3], [3, 1]]), torch.tensor([[1, 5], [2, 2]])
LENGTHS = torch.tensor([5, 3]), torch.tensor([6, 7])
ALL, SOME = torch.ones(B, N, dtype=torch.bool), torch.arange(B * N).view(B, N) < 3
CASES = [
    (ByGrid, *GRIDS),
    (ByItem, *LENGTHS),
    (ByMask, ALL, SOME),
    (ByMask, SOME, ALL),
    (ByWritten, LENGTHS[0], torch.tensor([7, 7])),
    (ByArray, *LENGTHS),
    (BySlice, *LENGTHS),
    (ByRows, ALL, SOME),
    (ByRows, SOME, ALL),
]
every_case = pytest.mark.parametrize(("kind", "value", "other"), CASES)


@every_case
def test_values_become_part_of_the_capture(kind, value, other):
    module, x = kind(), torch.randn(B, N, C)
    result, function = captured(module, x, value)
    assert list(result.values) == [1]
    assert torch.equal(result.values[1], value)
    assert torch.equal(function(module, x, value), module(x, value))
    again, _ = captured(module, x, other)
    assert again.graph.python_code("self").src != result.graph.python_code("self").src


def test_the_values_are_a_copy():
    module, lengths = ByItem(), LENGTHS[0].clone()
    result, _ = captured(module, torch.randn(B, N, C), lengths)
    lengths += 1
    assert torch.equal(result.values[1], LENGTHS[0])


class Unsteered(Base):
    """Whole numbers that only tensors are computed from."""

    def forward(self, x, lengths, mask):
        seen = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        return self.linear(x) * (seen & mask)[..., None] if mask.shape[1] > 1 and mask.ndim == 2 else x


def test_values_that_do_not_steer_are_free():
    module, x = Unsteered(), torch.randn(B, N, C)
    result, function = captured(module, x, LENGTHS[0], SOME)
    assert result.values == {}
    assert torch.equal(function(module, x, LENGTHS[1], ALL), module(x, LENGTHS[1], ALL))


class ByFloat(Base):
    def forward(self, x, scale):
        return self.linear(x) if scale.max() > 0 else x


class ByResult(Base):
    def forward(self, x, lengths):
        return x * 2 if (self.linear(x).argmax(-1) == lengths[0]).any() else x


@pytest.mark.parametrize(("kind", "value"), [(ByFloat, torch.randn(B)), (ByResult, LENGTHS[0])])
def test_values_that_are_computed_from_tokens_cannot_be_captured(kind, value):
    with pytest.raises(SlothError, match="depends on the data in its inputs"):
        captured(kind(), torch.randn(B, N, C), value)


def bound(module, x, value):
    """``module`` with a forward that captures what it does not know; and the list of what it knows."""

    def variant(owner, calls):
        (args, kwargs), skeleton = calls[0], Skeleton(owner)
        skeleton.model.__dict__.pop("forward", None)
        result = capture(skeleton, skeleton.model, skeleton.fake_inputs((args, kwargs)), None)
        return Variant(read_form(args, kwargs)[0], generate(result.graph, "test"), values=result.values)

    variants = Variants([variant(module, [((x, value), {})])], (), variant)
    return make_forward(variants).__get__(module), variants.known


@every_case
def test_a_call_with_other_values_is_captured_anew(kind, value, other):
    module, x = kind(), torch.randn(B, N, C)
    forward, known = bound(module, x, value)
    for given, count in ((value, 1), (other, 2), (value.clone(), 2), (other.clone(), 2)):
        assert torch.equal(forward(x, given), module(x, given))
        assert len(known) == count


def test_values_of_another_type_or_size_are_other_values():
    module, x = ByItem(), torch.randn(B, N, C)
    forward, known = bound(module, x, LENGTHS[0])
    for lengths in (LENGTHS[0].int(), LENGTHS[0][:1], torch.cat(LENGTHS)):
        assert torch.equal(forward(x, lengths), module(x, lengths))
    assert len(known) == 4


def test_values_are_compared_outside_of_a_compiled_graph():
    module, x = ByItem(), torch.randn(B, N, C)
    forward, known = bound(module, x, LENGTHS[0])
    module.forward = forward
    with torch.no_grad():
        compiled = torch.compile(module, backend="eager")
        for lengths in LENGTHS:
            assert torch.equal(compiled(x, lengths), ByItem.forward(module, x, lengths))
    assert len(known) == 2
    torch.compiler.reset()
