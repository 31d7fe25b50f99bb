"""Whatever is done to values that differ between branches, each branch is what it would be by itself."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sloth_fx.branching import Pair, Tokens, UnwritableError, positive_of
from sloth_fx.branching.values import of

TEXT, IMAGE, MORE = 5, 7, 3
TABLE = torch.randn(TEXT + IMAGE + MORE, 6)
VECTOR = torch.randn(2, 1, 6)
MATRIX = torch.randn(4, 6)


def noise(*shape):
    return torch.randn(*shape)


def sequence():
    """Text, an image, and more text: (2, 15, 6), of which the image is the same in both branches."""
    parts = [Pair(noise(2, TEXT, 6), noise(2, TEXT, 6)), noise(2, IMAGE, 6), Pair(noise(2, MORE, 6), noise(2, MORE, 6))]
    return Tokens(parts, 1)


def both(value):
    return of(value, 0), of(value, 1)


def heads(x):
    """(2, 15, 6) as (2, 2, 15, 3)."""
    return x.unflatten(-1, (2, 3)).transpose(1, 2)


def rotated(x):
    one, other = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return x * TABLE + torch.stack([-other, one], dim=-1).flatten(2) * TABLE


PART_BY_PART = {
    "linear": lambda x: F.linear(x, MATRIX),
    "layer": lambda x: nn.Linear(6, 4, bias=False, dtype=x.dtype).requires_grad_(False).train(False)(x * 0),
    "layer_norm": lambda x: F.layer_norm(x, (6,)),
    "rms_norm": lambda x: nn.RMSNorm(6)(x),
    "by hand": lambda x: x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6),
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "modulated": lambda x: x * (1 + VECTOR) + VECTOR,
    "a table": lambda x: x * TABLE - 2.0 / (TABLE.abs() + 1),
    "both": lambda x: x + x * x,
    "from the right": lambda x: 1 - 2 * x,
    "rotated": rotated,
    "heads": heads,
    "heads by view": lambda x: x.view(2, -1, 2, 3).permute(0, 2, 1, 3),
    "and back": lambda x: heads(x).transpose(1, 2).reshape(2, TEXT + IMAGE + MORE, -1),
    "flattened": lambda x: heads(x).transpose(1, 2).flatten(2, 3),
    "halves": lambda x: torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1),
    "split": lambda x: torch.cat([each * 2 for each in x.split([2, 4], dim=-1)], dim=2),
    "a new axis": lambda x: x.unsqueeze(1).squeeze(1),
    "sliced channels": lambda x: x[..., 1:4],
    "one channel": lambda x: x[:, :, 2],
    "an axis by None": lambda x: x[:, None, :, ::2],
    "one head": lambda x: heads(x)[:, 1],
    "another type": lambda x: x.to(torch.float64).type_as(TABLE),
    "softmax": lambda x: x.softmax(dim=-1),
    "clamped": lambda x: x.clamp(min=-0.5).contiguous(),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "of a number": lambda x: 1 / (2 + abs(x)) + 2**x,
    "by NumPy's names": lambda x: torch.cat(tensors=[x, x * x.mean(axis=-1, keepdims=True)], axis=-1),
    "named input": lambda x: F.layer_norm(input=x, normalized_shape=(6,)),
    "a norm, and no dimension": lambda x: heads(x).norm(2, 1),
    "a variance, and a dimension": lambda x: heads(x).var(1, True, True),
    "narrow": lambda x: x.narrow(length=2, start=1, dim=2),
    "masked": lambda x: torch.where(TABLE > 0, x, 0.1).masked_fill(TABLE[:, :1] > 1, 0.0),
}


@pytest.mark.parametrize("name", PART_BY_PART)
def test_part_by_part(name):
    x = sequence()
    found = PART_BY_PART[name](x)
    assert isinstance(found, Tokens)
    assert isinstance(found.parts[1], torch.Tensor)
    for one, other in zip(both(found), both(x), strict=True):
        expected = PART_BY_PART[name](other)
        assert found.shape == expected.shape
        assert found.dtype == expected.dtype
        torch.testing.assert_close(one, expected)


BRANCH_BY_BRANCH = {
    "mean of tokens": lambda x: x.mean(1),
    "softmax of tokens": lambda x: x.softmax(1),
    "flat": lambda x: x.flatten(1),
    "folded": lambda x: x.reshape(2, 3, 5, 6),
    "matrix": lambda x: x @ x.transpose(1, 2),
    "rolled": lambda x: torch.roll(x, 1, dims=1),
    "flipped": lambda x: x.flip(1),
    "every other": lambda x: x[:, ::2],
    "by number": lambda x: x[:, torch.tensor([3, 8])],
    "einsum": lambda x: torch.einsum("bnc,dc->bdn", x, MATRIX),
    "length of tokens": lambda x: F.normalize(x, dim=1),
    "norm of tokens": lambda x: F.layer_norm(x, tuple(x.shape[1:])),
    "sorted": lambda x: x.sort(dim=1).values,
}


@pytest.mark.parametrize("name", BRANCH_BY_BRANCH)
def test_branch_by_branch(name):
    x = sequence()
    found = BRANCH_BY_BRANCH[name](x)
    for one, other in zip(both(found), both(x), strict=True):
        torch.testing.assert_close(one, BRANCH_BY_BRANCH[name](other))


def test_a_sequence_comes_together_and_apart():
    text, image = Pair(noise(2, TEXT, 6), noise(2, TEXT, 6)), noise(2, IMAGE, 6)
    x = torch.cat([text, image], dim=1)
    assert isinstance(x, Tokens)
    assert x.shape == (2, TEXT + IMAGE, 6)
    assert torch.equal(x[:, TEXT:], image)
    assert all(map(torch.equal, both(x[:, :TEXT]), both(text)))
    one, other = x.split([TEXT, IMAGE], dim=1)
    assert all(map(torch.equal, both(one), both(text)))
    assert torch.equal(other, image)
    assert torch.equal(x.narrow(length=IMAGE, start=TEXT, dim=1), image)
    assert torch.equal(x[:, TEXT + 2 : -1], image[:, 2:-1])
    cut = x[:, 3 : TEXT + 2]
    assert isinstance(cut, Tokens)
    assert all(
        torch.equal(a, torch.cat([b[:, 3:], image[:, :2]], 1)) for a, b in zip(both(cut), both(text), strict=True)
    )
    assert x[:, 4:2].shape == (2, 0, 6)
    assert torch.cat([x, x[:, :2]], dim=1).shape == (2, TEXT + IMAGE + 2, 6)


def test_a_sequence_of_two_types_is_of_one():
    text, image = Pair(noise(2, 5, 6).double(), noise(2, 3, 6).double()), noise(2, IMAGE, 6)
    x = torch.cat([text, image], dim=1)
    assert x.dtype == torch.float64
    assert all(part.dtype == torch.float64 for part in x.parts)


def test_sequences_along_different_axes():
    """Joined, they are no sequence."""
    x = Tokens([Pair(noise(2, 3, 6), noise(2, 3, 6)), noise(2, 3, 6)], 1)
    y = Tokens([noise(2, 4, 3), Pair(noise(2, 4, 3), noise(2, 4, 3))], 2)
    found = torch.cat([x, y], dim=1)
    assert all(
        torch.equal(each, torch.cat([a, b], 1)) for each, a, b in zip(both(found), both(x), both(y), strict=True)
    )


def test_channels_and_samples_are_no_tokens():
    pair, same = Pair(noise(2, 4, 6), noise(2, 4, 6)), noise(2, 4, 6)
    for dim in (0, -1, 2):
        found = torch.cat([pair, same], dim=dim)
        assert isinstance(found, Pair)
        assert all(torch.equal(a, torch.cat([b, same], dim=dim)) for a, b in zip(both(found), both(pair), strict=True))


def test_a_vector_of_the_text_modulates_the_image_as_the_text_does():
    vector, image, text = Pair(noise(2, 1, 6), noise(2, 1, 6)), noise(2, IMAGE, 6), Pair(noise(2, 1, 6), noise(2, 1, 6))
    for found in (image * vector, vector * image, image + vector, torch.addcmul(image, vector, vector)):
        assert isinstance(found, torch.Tensor)
    assert torch.equal(image * (1 + vector), image * (1 + vector.positive))
    assert isinstance(text * vector, Pair)
    mask = Pair(noise(2, 1, 7), noise(2, 1, 7))
    assert isinstance(noise(3, 5, 7) + mask[:, None], Pair)  # of heads, and keys; and of samples
    assert isinstance(torch.zeros(2, 7, 7) + mask, Pair)
    assert isinstance(torch.zeros(2, 1, 7, 7) + mask[:, None], Pair)
    assert isinstance(vector[:, 0] + noise(2, 6), Pair)  # another vector, such as that of the time


def test_results_of_models():
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    pair = Pair(noise(2, 3), noise(2, 3))
    found = positive_of((Transformer2DModelOutput(sample=pair), [pair, 3], {"a": pair}))
    assert found[0].sample is pair.positive
    assert found[0][0] is pair.positive
    assert found[1][0] is pair.positive
    assert found[1][1] == 3
    assert found[2]["a"] is pair.positive


def test_what_is_asked_of_tensors():
    x = sequence()
    assert (x.ndim, x.dim(), len(x), x.size(1), x.size()) == (3, 3, 2, 15, (2, 15, 6))
    assert (x.dtype, x.device, x.is_floating_point()) == (torch.float32, torch.device("cpu"), True)
    assert (x.parts[0].shape, x.requires_grad, x.is_cuda) == ((2, 5, 6), False, False)
    assert heads(x).mT.shape == (2, 2, 3, 15)
    with pytest.raises(AttributeError):
        _ = x.no_such_thing


def test_branches_that_would_part():
    pair = Pair(torch.tensor([1, 1]), torch.tensor([1, 0]))
    assert torch.equal((pair == 1).negative, torch.tensor([True, False]))
    assert (~(pair > 0)).negative.tolist() == [False, True]
    assert pair.sum(dtype=torch.float64).positive.item() == 2
    assert pair[:1].sum().item() == 1
    for wrong in (
        lambda: bool(pair.all()),
        lambda: pair.sum().item() > 1,
        lambda: pair.float().mean().item(),
        lambda: torch.zeros(2).add_(pair),
        lambda: operator.iadd(torch.zeros(2), pair),
        lambda: operator.ior(torch.zeros(2, dtype=torch.bool), pair > 0),
        lambda: torch.zeros(2).__setitem__(0, pair[0]),
        lambda: sequence().__setitem__(0, 1),
        lambda: torch.add(pair, 1, out=torch.zeros(2)),
    ):
        with pytest.raises((TypeError, UnwritableError), match=r"branch|token"):
            wrong()


def test_values_that_are_written_into():
    pair = Pair(torch.zeros(2, 3), torch.zeros(2, 3))
    pair[0] = Pair(torch.ones(3), torch.full((3,), 2.0))
    other, (first, _) = pair, pair.chunk(2)
    pair += 1
    assert other is pair
    assert pair.positive.tolist() == [[2, 2, 2], [1, 1, 1]]
    assert pair.negative.tolist() == [[3, 3, 3], [1, 1, 1]]
    assert first.negative.tolist() == [[3, 3, 3]]


def test_a_sequence_that_is_written_into_is_so_under_all_names():
    x, more = sequence(), sequence()
    before, other = both(x), x
    x += more
    x *= 2
    x.sub_(TABLE)
    assert other is x
    assert isinstance(x.parts[1], torch.Tensor)
    for found, old, new in zip(both(other), before, both(more), strict=True):
        torch.testing.assert_close(found, 2 * (old + new) - TABLE)
