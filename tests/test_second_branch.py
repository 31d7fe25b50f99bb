"""What a model that is asked once more costs, counted by hand and in the attention kernels."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import sloth_fx
from sloth_fx import PAG, SAG, SEG, SLG, TPG, Perturb, TokenDownsample
from sloth_fx.cost import estimate

ROWS, COLUMNS, TEXT, HEADS, DIM = 5, 7, 3, 2, 12
N = ROWS * COLUMNS
ALL = N + TEXT


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(DIM, DIM) for _ in range(3))

    def forward(self, x):
        heads = (each(x).unflatten(2, (HEADS, -1)).transpose(1, 2) for each in (self.to_q, self.to_k, self.to_v))
        return x + F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


class Host(nn.Module):
    """Four blocks of self-attention, or of joint attention with ``text``; ``mixed`` is not known to work by row."""

    def __init__(self, mixed=False):
        super().__init__()
        self.embed, self.out = nn.Conv2d(4, DIM, 1), nn.Linear(DIM, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.mixed = mixed

    def forward(self, sample, timestep, text=None):
        x = self.embed(sample).flatten(2).transpose(1, 2)
        x = x if text is None else torch.cat([text, x], 1)
        if self.mixed:
            x = torch.fft.ifft(torch.fft.fft(x)).real
        for block in self.blocks:
            x = block(x)
        return self.out(x[:, -N:]).transpose(1, 2).unflatten(2, sample.shape[2:])


def inputs(joint=False, batch=2):
    given = {"sample": torch.randn(batch, 4, ROWS, COLUMNS), "timestep": torch.tensor(500.0)}
    return {**given, "text": torch.randn(batch, TEXT, DIM)} if joint else given


def counted(spec, joint=False, mixed=False, steps=1):
    return estimate(Host(mixed), spec, (ROWS, COLUMNS), steps=steps, number_bytes=2, example_inputs=inputs(joint))


# By kind: the spec, and how many pairs of image tokens the perturbed branch has in blocks 0 to 3.
BY_HAND = {
    "PAG": (PAG(), (0, 0, 0, N * N)),  # block 2 is the middle one, and each token there reads itself
    "SEG": (SEG(), (0, 0, N * N, N * N)),
    "TPG": (TPG(where="blocks.1"), (0, N * N, N * N, N * N)),
    "SLG": (SLG(layers=(1, 3)), (0, 0, N * N, 0)),
    "Perturb": (Perturb(lambda q, k, v: (q * 0, k, v)), (0, 0, N * N, N * N)),
    "SAG": (SAG(), (N * N,) * 4),
}


@pytest.mark.parametrize("kind", BY_HAND)
def test_each_kind_by_hand(kind):
    spec, again = BY_HAND[kind]
    cost = counted(spec)
    assert cost.flops_before() == 4 * DIM * 4 * N * N
    assert [each.steps[0].pairs - each.before.pairs for each in cost.sites] == list(again)
    assert cost.flops(0) == 4 * DIM * (4 * N * N + sum(again))
    assert cost.bytes(0) == 2 * 2 * DIM * (4 + sum(pairs > 0 for pairs in again)) * N


class Kernels(TorchDispatchMode):
    """Pairs of a query and a key in the attention kernels."""

    pairs = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.startswith("_scaled_dot_product"):
            self.pairs += len(args[0]) * args[0].shape[2] * args[1].shape[2]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", BY_HAND)
def test_kernels_are_asked_once_more_for_one_row_of_two(kind):
    spec, again = BY_HAND[kind]
    model = sloth_fx.transform(Host(), spec, example_inputs=inputs())
    context = sloth_fx.context(model)
    context.rows, context.prediction = ("uncond", "cond"), "epsilon"
    context.at(0.1, sigma=1.5)
    with torch.no_grad(), Kernels() as kernels:
        model(**inputs())
    assert kernels.pairs == 2 * 4 * N * N + sum(again)


def test_tokens_that_read_themselves_and_the_text():
    cost = counted(PAG(), joint=True)
    perturbed = N * (1 + TEXT) + TEXT * ALL
    assert [each.steps[0].pairs for each in cost.sites] == [ALL**2, ALL**2, ALL**2 + perturbed, 2 * ALL**2]
    assert cost.bytes(0) == 2 * 2 * DIM * 6 * ALL


def test_a_host_that_is_called_twice_is_counted_whole():
    cost = counted(PAG(), mixed=True)
    assert cost.flops(0) == 4 * DIM * (4 + 3) * N * N


def test_other_operators_act_in_both_branches():
    cost = counted([PAG(), TokenDownsample(factors=(2,))])
    thin = N * math.ceil(ROWS / 2) * math.ceil(COLUMNS / 2)
    assert [each.steps[0].pairs for each in cost.sites] == [thin, thin, N * N, 2 * thin]
    assert [each.once[0].pairs for each in cost.sites] == [thin, thin, N * N, thin]


def test_the_steps_at_which_it_acts():
    late = counted(SEG(start=0.5), steps=5)
    assert [late.flops(step) > late.flops_before() for step in range(5)] == [False] * 3 + [True] * 2
    early = counted(SLG(layers=(1,), start=0.05, stop=0.2), steps=3)  # all within the first step
    assert [early.flops(step) > early.flops_before() for step in range(3)] == [True, False, False]
    assert (early.graphs, [len(span) for span in early.spans()]) == (2, [1, 2])


@pytest.mark.parametrize("kind", ["PAG", "SEG", "SLG"])
def test_with_a_negative_text_in_joint_attention(kind):
    """All is asked once more, with both texts; later, when that guides no more, from the perturbed site on."""
    spec = {"PAG": PAG(), "SEG": SEG(), "SLG": SLG(layers=(2,), start=0.0, stop=1.0)}[kind]
    texts = sloth_fx.NAG(stop=0.5)
    cost = counted([texts, spec], joint=True, steps=2)
    both = N * N + 2 * TEXT * (N + ALL)  # image tokens read the image once, all else is done for each text
    spoilt = {"PAG": N * (1 + TEXT) + TEXT * ALL, "SEG": ALL**2, "SLG": 0}[kind]
    assert [each.steps[0].pairs for each in cost.sites] == [2 * both, 2 * both, both + 2 * spoilt, 2 * both]
    assert [each.steps[1].pairs for each in cost.sites] == [ALL**2, ALL**2, ALL**2 + spoilt, 2 * ALL**2]
    if kind == "PAG":
        return  # what each token reads of itself is no attention kernel
    model = sloth_fx.transform(Host(), [texts, spec], example_inputs=inputs(joint=True))
    context = sloth_fx.context(model)
    context.set_negative(text=torch.randn(2, TEXT, DIM))
    for step, progress in enumerate((0.0, 0.5)):
        context.at(progress)
        with torch.no_grad(), Kernels() as kernels:
            model(**inputs(joint=True))
        assert kernels.pairs == 2 * sum(each.steps[step].pairs for each in cost.sites)
