"""Several masks, and masks over regrouped scores: one mask for the operators, the host's bits for the host."""

import itertools

import pytest
import torch
from torch import nn

from sloth_fx.passes.masks import no_scores, without_blind
from tests.passes import spellings
from tests.passes.spellings import CHANNELS, HEAD_DIM, HEADS, SCALE
from tests.passes.test_canonicalise import by_hand, canonical, options, others

B, WINDOWS, N = 3, 5, 6  # samples, windows of each, tokens of a window
ROWS, COLUMNS = 2, 3


class Windows(spellings.Projections):
    """A bias for each pair of places in a window from a table, and a mask for each window of a sample."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn((2 * ROWS - 1) * (2 * COLUMNS - 1), HEADS))
        places = torch.cartesian_prod(torch.arange(ROWS), torch.arange(COLUMNS))
        down, across = (places[:, None] - places[None]).unbind(-1)
        self.register_buffer("index", (down + ROWS - 1) * (2 * COLUMNS - 1) + across + COLUMNS - 1)

    def bias(self):
        return self.table[self.index.view(-1)].view(N, N, -1).permute(2, 0, 1).contiguous()

    def forward(self, x, mask):
        windows = mask.shape[0]
        q, k, v = map(self.heads, self.project(x))
        scores = (q * SCALE) @ k.transpose(-2, -1) + self.bias().unsqueeze(0)
        scores = scores.view(x.shape[0] // windows, windows, HEADS, N, N) + mask.unsqueeze(1).unsqueeze(0)
        scores = scores.view(-1, HEADS, N, N)
        return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)

    def masks(self, mask):
        return self.bias(), mask.repeat(B, 1, 1)[:, None]


class FoldedHeads(spellings.Projections):
    """Heads are folded into the batch, and have a dimension of their own for the mask alone."""

    def forward(self, x, mask):
        batch = x.shape[0]
        q, k, v = (self.heads(t).reshape(batch * HEADS, -1, HEAD_DIM) for t in self.project(x))
        scores = torch.bmm(q * SCALE, k.transpose(1, 2))
        scores = scores.view(batch, HEADS, *scores.shape[1:]) + mask.repeat(batch // WINDOWS, 1, 1)[:, None]
        weights = scores.view(batch * HEADS, *scores.shape[2:]).softmax(-1)
        return torch.bmm(weights, v).view(batch, HEADS, -1, HEAD_DIM).transpose(1, 2).flatten(2)

    def masks(self, mask):
        return (mask.repeat(B, 1, 1).repeat_interleave(HEADS, 0),)


class AddedAndFilled(spellings.Projections):
    """A float for each key, then a boolean for each pair; what is added is scaled with the scores."""

    def forward(self, x, mask):
        q, k, v = map(self.heads, self.project(x))
        scores = (q @ k.transpose(-1, -2) * HEAD_DIM + x[:, None, None, :, 0]) * (SCALE / HEAD_DIM)
        scores.masked_fill_((mask.repeat(x.shape[0] // WINDOWS, 1, 1) < 0)[:, None], -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def masks(self, x, mask):
        filled = torch.zeros_like(mask).masked_fill(mask < 0, -torch.inf)
        return x[:, None, None, :, 0] * (SCALE / HEAD_DIM), filled.repeat(B, 1, 1)[:, None]


class AddedTwiceByHeadsLast(spellings.Projections):
    """Two float masks where heads come last, one of them with the product."""

    def forward(self, x, mask):
        q, k, v = (t.unflatten(2, (HEADS, -1)) for t in self.project(x))
        scores = torch.einsum("bnhd,bmhd->bnmh", q, k) * SCALE + mask.repeat(x.shape[0] // WINDOWS, 1, 1)[..., None]
        scores += x[:, None, :, :1]
        return torch.einsum("bnmh,bmhd->bnhd", scores.softmax(2), v).flatten(2)

    def masks(self, x, mask):
        return mask.repeat(B, 1, 1)[:, None], x[:, None, None, :, 0]


class AddedByProductAndFilled(spellings.Projections):
    def forward(self, x, mask):
        q, k, v = (self.heads(t).reshape(x.shape[0] * HEADS, -1, HEAD_DIM) for t in self.project(x))
        hidden = mask.repeat(x.shape[0] // WINDOWS, 1, 1).repeat_interleave(HEADS, 0)
        bias = x[:, None, :, 0].repeat_interleave(HEADS, 0)
        scores = torch.baddbmm(bias.expand_as(hidden), q, k.transpose(-1, -2), beta=1, alpha=SCALE)
        scores = torch.where(hidden < 0, torch.finfo(scores.dtype).min, scores)
        return torch.bmm(scores.softmax(-1), v).view(x.shape[0], HEADS, -1, HEAD_DIM).transpose(1, 2).flatten(2)

    def masks(self, x, mask):
        filled = torch.zeros_like(mask).masked_fill(mask < 0, -torch.inf)
        return x[:, None, :, 0].repeat_interleave(HEADS, 0), filled.repeat(B, 1, 1).repeat_interleave(HEADS, 0)


KINDS = [Windows, FoldedHeads, AddedAndFilled, AddedTwiceByHeadsLast, AddedByProductAndFilled]


def built(kind):
    """The module, and its x (B x windows, N, C) and mask (windows, N, N), in which a token always sees itself."""
    module = kind().eval()
    hidden = (torch.rand(WINDOWS, N, N) > 0.6) & ~torch.eye(N, dtype=torch.bool)
    mask = torch.zeros(WINDOWS, N, N).masked_fill(hidden, -torch.inf)
    return module, torch.randn(B * WINDOWS, N, CHANNELS), mask


def sum_of(module, x, mask):
    """What is added to the scores in all, as the definition of the module says."""
    masks = module.masks(mask) if isinstance(module, (Windows, FoldedHeads)) else module.masks(x, mask)
    return sum(each.detach().double() for each in masks)


def core_and_mask(module, *inputs):
    core, function = canonical(module, *inputs)
    values = options(core, module, *inputs)
    return core, function, values


@pytest.mark.parametrize("kind", KINDS)
def test_the_hosts_bits_and_one_mask(kind):
    module, x, mask = built(kind)
    core, function, values = core_and_mask(module, x, mask)
    assert core.refusal is None
    assert torch.equal(function(module, x, mask), module(x, mask))
    assert values["whole_mask"].shape == core.mask.meta["hint"].shape == (*core.query.meta["hint"].shape[:-1], N)
    found, expected = values["whole_mask"].double(), sum_of(module, x, mask)
    lowest = torch.finfo(torch.float32).min / 2
    found = found.masked_fill(found < lowest, -torch.inf)
    assert torch.allclose(found, expected.expand(found.shape), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", ["none", "boolean", "added"])
def test_the_core_attends_over_other_tensors(kind, given):
    module, x, mask = built(kind)
    core, _, values = core_and_mask(module, x, mask)
    query, key, value = others(core)
    masks = {"none": (), "boolean": (torch.rand(4, 9) > 0.4,), "added": (torch.randn(4, 9),)}[given]
    if given == "boolean":
        masks[0][:, 0] = True
    scale = {Windows: 1.0, FoldedHeads: 1.0}.get(kind, SCALE)
    out = core.attend(query, key, value, *masks, **values)
    assert torch.allclose(out.double(), by_hand(query, key, value, scale, *masks), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_keys_with_their_mask(kind):
    module, x, mask = built(kind)
    core, _, values = core_and_mask(module, x, mask)
    query, key, value = (torch.randn(each.meta["hint"].shape) for each in (core.query, core.key, core.value))
    kept = [0, 2, 5]
    whole = values["whole_mask"]
    out = core.attend(query, key[..., kept, :], value[..., kept, :], whole[..., kept], **values)
    scale = {Windows: 1.0, FoldedHeads: 1.0}.get(kind, SCALE)
    expected = by_hand(query, key[..., kept, :], value[..., kept, :], scale, whole[..., kept].double())
    blind = (whole[..., kept] == -torch.inf).all(-1)
    assert kind is AddedByProductAndFilled or blind.any()
    assert torch.allclose(out.double(), expected.masked_fill(blind[..., None], 0.0), atol=1e-5)


def test_masks_are_applied_in_the_hosts_order():
    """The sum of masks has other bits: or the test of the host's bits would say nothing."""
    module, x, _ = built(Windows)
    core, _, values = core_and_mask(module, x, torch.randn(WINDOWS, N, N))
    query, key, value = (torch.randn(each.meta["hint"].shape) for each in (core.query, core.key, core.value))
    whole = values["whole_mask"]
    one_by_one = core.attend(query, key, value, whole, **values)
    at_once = core.attend(query, key, value, whole.clone(), **values)
    assert torch.allclose(one_by_one, at_once, atol=1e-5)
    assert not torch.equal(one_by_one, at_once)


class SlicedAndFilled(spellings.Projections):
    """Two windows at a time; one that sees nothing sees everything alike, because the host's number is finite."""

    def forward(self, x, mask):
        q, k, v = map(self.heads, self.project(x))
        seen = (mask.repeat(x.shape[0] // WINDOWS, 1, 1) == 0)[:, None].expand(-1, HEADS, -1, -1)
        out = torch.zeros_like(q)
        for start in range(0, q.shape[0], 2):
            part = slice(start, start + 2)
            scores = torch.where(seen[part], q[part] @ k[part].transpose(-1, -2) * SCALE, -1e4)
            out[part] = scores.softmax(-1) @ v[part]
        return out


def test_slices_know_the_hosts_own_mask():
    module, x, mask = built(SlicedAndFilled)
    mask[1] = -torch.inf
    core, function, _ = core_and_mask(module, x, mask)
    assert core.refusal is None
    assert core.calls == -(-B * WINDOWS // 2)
    assert torch.equal(function(module, x, mask), module(x, mask))
    assert function(module, x, mask)[1].abs().min() > 0


def test_another_number_of_windows():
    module, x, mask = built(Windows)
    _, function, _ = core_and_mask(module, x, mask)
    x, mask = torch.randn(2 * 4, N, CHANNELS), torch.randn(4, N, N)
    assert torch.equal(function(module, x, mask), module(x, mask))


@pytest.mark.parametrize("kind", [Windows, AddedAndFilled])
def test_masks_compile_without_a_break(kind):
    module, x, mask = built(kind)
    _, function, _ = core_and_mask(module, x, mask)
    with torch.no_grad():
        compiled = torch.compile(function, backend="eager", fullgraph=True)
        assert torch.equal(compiled(module, x, mask), module(x, mask))
    torch.compiler.reset()


class SoftmaxInWindows(Windows):
    """The softmax has another dimension than the product."""

    def forward(self, x, mask):
        q, k, v = map(self.heads, self.project(x))
        scores = (q @ k.transpose(-2, -1)).unflatten(0, (-1, WINDOWS)) + mask[:, None]
        return scores.softmax(-1).flatten(0, 1) @ v


def test_a_mask_of_other_dimensions_than_the_core_is_refused():
    module, x, mask = built(SoftmaxInWindows)
    core, function, _ = core_and_mask(module, x, mask)
    assert "other dimensions" in core.refusal
    assert torch.equal(function(module, x, mask), module(x, mask))


def test_no_scores_have_the_shape_of_the_product():
    for left, right in itertools.product([(2, 1, 5, 4), (3, 5, 4)], [(2, 3, 7, 4), (1, 7, 4)]):
        a, b = torch.randn(left), torch.randn(right)
        letters = "ABnd"[-a.ndim :], "ABmd"[-b.ndim :], "ABnm"[-max(a.ndim, b.ndim) :]
        assert no_scores(a, b, letters).shape == (a @ b.mT).shape


def test_who_sees_nothing_gets_zeros():
    scores = torch.tensor([[0.0, -torch.inf], [-torch.inf, -torch.inf], [1.0, torch.nan]])
    probs = without_blind(scores.softmax(-1), scores, -1)
    assert torch.equal(probs[:2], torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert probs[2].isnan().all()
