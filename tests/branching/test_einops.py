"""einops on values of two branches: what it gives for each."""

import pytest
import torch
from einops import rearrange, reduce, repeat

from sloth_fx.branching import Pair, Rows
from sloth_fx.branching.einops import tell_einops

tell_einops()


def pair(one, other):
    return Pair(torch.randn(one), torch.randn(other))


CALLS = {
    "rearranged": lambda x: rearrange(x, "b n (h d) -> b h n d", h=2),
    "joined": lambda x: rearrange(x, "b n c -> (b n) c"),
    "repeated": lambda x: repeat(x, "b n c -> b n k c", k=3),
    "new batch": lambda x: repeat(x[:1], "1 n c -> b n c", b=4),
    "reduced": lambda x: reduce(x, "b n c -> b c", "mean"),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("tokens", [5, 7])
def test_a_pair_is_rearranged_in_each_branch(name, tokens):
    """Of other lengths as well, twice: einops remembers how it did it for a shape."""
    call = CALLS[name]
    for x in (pair((3, 5, 6), (3, tokens, 6)), pair((3, 5, 6), (3, 9, 6))):
        found = call(x)
        assert torch.equal(found.positive, call(x.positive))
        assert torch.equal(found.negative, call(x.negative))


def test_rows_stay_rows():
    x = Rows(torch.randn(4, 5, 6), (False, True), parted=False)
    found = rearrange(x, "b n (h d) -> b h n d", h=2)
    assert torch.equal(found.positive, rearrange(x.positive, "b n (h d) -> b h n d", h=2))
    assert torch.equal(found.negative, rearrange(x.negative, "b n (h d) -> b h n d", h=2))


def test_tensors_are_as_before():
    x = torch.randn(3, 5, 6)
    assert type(rearrange(x, "b n c -> b c n")) is torch.Tensor
    with pytest.raises(RuntimeError, match="Tensor type unknown to einops"):
        rearrange(object(), "b n c -> b c n")
