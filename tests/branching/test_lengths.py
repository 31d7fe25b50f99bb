"""Numbers that differ between the branches, and what is made of them."""

import copy
import math
import operator
import types

import pytest
import torch
from torch import nn

from sloth_fx.branching import Length, Pair, Tokens, TwoLengths, run_apart, take_lengths
from sloth_fx.branching.lengths import both, bounds
from sloth_fx.branching.values import of


def parts(value):
    return of(value, 0), of(value, 1)


@pytest.mark.parametrize("name", ["add", "sub", "mul", "floordiv", "mod", "pow"])
@pytest.mark.parametrize("other", [3, Length(2, 5)], ids=str)
def test_arithmetic_is_that_of_each(name, other):
    function, length = getattr(operator, name), Length(13, 9)
    others = parts(other)
    assert parts(function(length, other)) == tuple(map(function, (13, 9), others))
    assert parts(function(other, length)) == tuple(map(function, others, (13, 9)))


def test_what_is_the_same_is_a_plain_number():
    assert type(Length(13, 9) - Length(4, 0)) is int
    assert type(both(4, 4)) is int
    assert parts(sum([Length(13, 9), 99])) == (112, 108)
    assert parts(math.prod([2, Length(13, 9)])) == (26, 18)
    assert parts(-Length(13, 9)) == (-13, -9)
    assert parts(copy.deepcopy(Length(13, 9))) == (13, 9)
    assert Length(13, 9) > 8
    assert not Length(13, 9) == 8  # noqa: SIM201
    assert divmod(Length(13, 9), 10) == (both(1, 0), both(3, 9))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda n: n > 10,
        lambda n: n == 13,
        lambda n: {n: 1},
        int,
        float,
        round,
        lambda n: n / 2,
        lambda n: bool(n - 9),
        lambda n: len(Pair(torch.zeros(13, 2), torch.zeros(9, 2))),
        lambda n: list(range(n)),
        lambda n: [0] * n,
        lambda n: list("abc")[:n],
        lambda n: list("abc" * 9)[n],
        math.isqrt,
        lambda n: n.bit_length(),
        lambda n: torch.Size([n, 2]).numel(),
        lambda n: min(n, 10),
    ],
)
def test_python_that_would_go_on_with_one_of_them(wrong):
    """Also what takes the value of an ``int`` without asking."""
    with pytest.raises(TypeError, match="branch"):
        wrong(Length(13, 9))


def test_bounds_of_a_slice():
    start, stop = bounds(slice(None, -99), Length(112, 108))
    assert (start, parts(stop)) == (0, (13, 9))
    start, stop = bounds(slice(Length(13, 9), None), Length(112, 108))
    assert (parts(start), parts(stop)) == ((13, 9), (112, 108))


def test_functions_of_torch_make_a_value_in_each_branch():
    length, table = Length(5, 3), torch.arange(20.0)
    with TwoLengths():
        made = torch.arange(length), table[2 : 2 + length], torch.zeros(2, length)
        assert isinstance(table[:4], torch.Tensor)
    assert [tuple(each.shape for each in parts(value)) for value in made] == [
        ((5,), (3,)),
        ((5,), (3,)),
        ((2, 5), (2, 3)),
    ]
    assert torch.equal(made[1].negative, table[2:5])


def test_a_sequence_with_texts_of_two_lengths():
    text, image = Pair(torch.randn(2, 5, 4), torch.randn(2, 3, 4)), torch.randn(2, 7, 4)
    tokens = torch.cat([text, image], dim=1)
    assert isinstance(tokens, Tokens)
    assert parts(tokens.shape[1]) == (12, 10)
    assert torch.equal(tokens[:, text.shape[1] :], image)
    assert torch.equal(tokens[:, -7:], image)
    assert torch.equal(tokens.negative, torch.cat([text.negative, image], 1))
    heads = tokens.reshape(2, tokens.shape[1], 2, 2).transpose(1, 2)
    assert torch.equal(heads.negative, tokens.negative.unflatten(2, (2, 2)).transpose(1, 2))
    rest = tokens[:, 4:]  # some of the one text, none of the other
    assert all(map(torch.equal, parts(rest), (tokens.positive[:, 4:], tokens.negative[:, 4:])))
    with pytest.raises(TypeError, match=r"of 12 tokens meets 12\|10"):
        tokens * torch.randn(2, 12, 4)  # made for the one text alone


def test_what_is_written_into_a_sequence():
    text, image = Pair(torch.randn(2, 5, 4), torch.randn(2, 3, 4)), torch.randn(2, 7, 4)
    tokens = torch.cat([text, image], dim=1)
    tokens[:, text.shape[1] :] = image * 2
    assert torch.equal(tokens.parts[1], image * 2)
    assert torch.equal(tokens.negative, torch.cat([text.negative, image * 2], 1))


class Positions(nn.Module):
    """Told a length, it makes positions of text and image, and needs a plain number for that."""

    def forward(self, image, length):
        return image.cumsum(0), torch.ones(int(length)).cumsum(0)


def test_modules_that_make_positions_are_called_for_each_branch():
    model = nn.Sequential(Positions())
    take_lengths(model)
    image, text = model[0](torch.ones(7), Length(5, 3))
    assert isinstance(image, torch.Tensor)  # the same in both
    assert [len(each) for each in parts(text)] == [5, 3]
    assert [len(each) for each in model[0](torch.ones(7), 4)] == [7, 4]
    again = copy.deepcopy(model)
    assert again[0].forward.__self__ is again[0]


class Counting(nn.Module):
    def forward(self, tokens):
        return tokens * float(tokens.sum())


@pytest.mark.parametrize("slot", ["forward", "_old_forward"])
@pytest.mark.parametrize("own", [False, True])
def test_a_module_that_is_called_for_each_branch_keeps_its_own_forward(slot, own):
    """As adapters and offloading give it one; in copies it is that of the copy."""
    module = Counting()
    module.factor = 1.0
    if own:
        setattr(module, slot, types.MethodType(lambda self, x: self.factor * Counting.forward(self, x), module))
    if slot == "_old_forward":
        module.__dict__.setdefault(slot, module.forward)
        module._hf_hook = None
        module.forward = types.MethodType(lambda self, x: self._old_forward(x) + 1, module)
    for _ in range(2):
        run_apart(module)
    other = copy.deepcopy(module)
    other.factor = 3.0
    text = Pair(*torch.randn(2, 2, 3, 5))
    for each in (module, other):
        found = each(text)
        for branch, tokens in enumerate((text.positive, text.negative)):
            expected = tokens * tokens.sum() * (each.factor if own else 1.0) + (slot == "_old_forward")
            torch.testing.assert_close(of(found, branch), expected)
            torch.testing.assert_close(each(tokens), expected)
        assert isinstance(getattr(each, slot)(text), Pair)  # what is left when the hook is removed
