"""Rows in one branch or in both: what torch makes of them is what it makes of the rows of each branch."""

import operator

import pytest
import torch
import torch.nn.functional as F

from sloth_fx.branching import Rows, UnwritableError, by_rows, parted, picked_groups

GROUPS = {
    "all": (True,),
    "last": (False, True),
    "first": (True, False),
    "two of three": (True, False, True),
    "both": (True, True),
}
EACH = 2  # rows of a group


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whole(groups, *shape):
    return noise(EACH * len(groups), *shape)


MATRIX, KERNEL = noise(5, 6, seed=9), noise(8, 4, 3, 3, seed=9)

# (shape of a row, function of the rows and of a plain tensor with one entry for each)
TABLE = {
    "modulated": ((7, 6), lambda x, e: x * (1 + e[:, None]) + 2 - e[:, None]),
    "from the right": ((7, 6), lambda x, e: e[:, None] - x / 2),
    "activation": ((7, 6), lambda x, e: F.gelu(F.silu(x)).clamp(-1, 1)),
    "written into": ((7, 6), lambda x, e: (x + 0).add_(e[:, None]).mul_(2)),
    "parts written into": ((7, 6), lambda x, e: _write(x + 0, e)),
    "compared": ((7, 6), lambda x, e: torch.where(x > e[:, None], x, 0.5)),
    "linear": ((7, 6), lambda x, e: F.linear(x, MATRIX, MATRIX[:, 0])),
    "layer norm": ((7, 6), lambda x, e: F.layer_norm(x, (6,))),
    "heads": ((7, 6), lambda x, e: x.view(x.shape[0], -1, 2, 3).transpose(1, 2)),
    "heads in the batch": ((7, 6), lambda x, e: _fold(x)),
    "and back": ((7, 6), lambda x, e: _fold(x).reshape(x.shape[0], 2, 7, 3).permute(0, 2, 1, 3).flatten(2)),
    "attention": ((7, 6), lambda x, e: _attend(x, x)),
    "to plain keys": ((7, 6), lambda x, e: _attend(x, e[:, None].expand(-1, 4, -1) * noise(4, 1, seed=3))),
    "with a mask": ((7, 6), lambda x, e: _attend(x, x, (e[:, None, None, :1] > 0) | torch.eye(7, dtype=torch.bool))),
    "by products": ((7, 6), lambda x, e: torch.bmm((x @ x.mT).softmax(-1), x)),
    "baddbmm": ((7, 6), lambda x, e: torch.baddbmm(torch.zeros(x.shape[0], 7, 7).double(), x, x.mT, beta=0, alpha=0.3)),
    "einsum": ((7, 6), lambda x, e: torch.einsum("bnc,dc,bc->bdn", x, MATRIX, e)),
    "packed": ((7, 6), lambda x, e: torch.stack(tuple(x.reshape(x.shape[0], 7, 3, 2, 1).permute(2, 0, 3, 1, 4)))),
    "packed and unbound": ((7, 6), lambda x, e: x.unflatten(2, (3, 2)).permute(2, 0, 1, 3).unbind(0)[1]),
    "tokens first": ((7, 6), lambda x, e: x.permute(1, 0, 2).softmax(0).reshape(7, -1, 3, 2).sum((0, 3))),
    "cat": ((7, 6), lambda x, e: torch.cat([x, e[:, None], x[:, 2:4]], dim=1)),
    "chunks": ((7, 6), lambda x, e: torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1)),
    "split": ((7, 6), lambda x, e: x.split([3, 4], dim=1)[1]),
    "sliced": ((7, 6), lambda x, e: x[:, 1:-1, None, ::2]),
    "one token": ((7, 6), lambda x, e: x[:, 2]),
    "by numbers": ((7, 6), lambda x, e: x[:, torch.tensor([3, 1, 1])]),
    "gathered": ((7, 6), lambda x, e: x.gather(1, x.argsort(1)[:, :3])),
    "sorted": ((7, 6), lambda x, e: x.sort(dim=1).values),
    "reduced": ((7, 6), lambda x, e: x.mean(dim=1) + x.amax((1,)) - x.norm(dim=1)),
    "normalised": ((7, 6), lambda x, e: F.normalize(x, dim=-1) + x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True))),
    "rolled": ((7, 6), lambda x, e: torch.roll(x, 1, dims=1).flip(2)),
    "expanded": ((6,), lambda x, e: x[:, None].expand(-1, 7, 6) + x.unsqueeze(1).repeat(1, 7, 1)),
    "repeated": ((7, 6), lambda x, e: x.repeat_interleave(3, dim=0).reshape(-1, 3, 7, 6)),
    "squeezed": ((1, 6), lambda x, e: x.squeeze(1) + e),
    "complex": (
        (7, 6),
        lambda x, e: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (3, 2))) * 1j).flatten(2),
    ),
    "cast": ((7, 6), lambda x, e: x.to(torch.float32).type_as(e)),
    "made like": ((7, 6), lambda x, e: torch.zeros_like(x) + x.new_ones(x.shape[0], 1, 1)),
    "convolution": ((4, 5, 7), lambda x, e: F.conv2d(x, KERNEL, padding=1)),
    "strided": ((4, 5, 7), lambda x, e: F.conv2d(F.pad(x, (0, 1, 0, 1)), KERNEL, stride=2)),
    "group norm": ((4, 5, 7), lambda x, e: F.group_norm(x, 2)),
    "scaled": ((4, 5, 7), lambda x, e: F.avg_pool2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), 3)),
    "unfolded": ((4, 6, 8), lambda x, e: _patches(x)),
    "frames": ((4, 3, 5, 7), lambda x, e: x.permute(0, 2, 1, 3, 4).reshape(-1, 4, 5, 7).unflatten(0, (-1, 3)).mean(1)),
    "over frames": ((3, 4, 5), lambda x, e: x.permute(0, 3, 1, 2).reshape(-1, 3, 4).cumsum(1)),
    "one long map": ((4, 5, 7), lambda x, e: x.reshape(1, -1, 5, 7).square().view(x.shape)),
}


def _write(x, e):
    x[:, 2:4] = e[:, None]
    x[..., 0] = 3.0
    x += 1
    return x


def _fold(x):
    return x.reshape(x.shape[0], -1, 2, 3).permute(0, 2, 1, 3).reshape(x.shape[0] * 2, -1, 3)


def _attend(x, y, mask=None):
    q, k = (each.unflatten(2, (2, 3)).transpose(1, 2) for each in (x, y))
    return F.scaled_dot_product_attention(q, k, k, attn_mask=mask).transpose(1, 2).flatten(2)


def _patches(x):
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(b, -1, 4 * c)


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("name", TABLE)
def test_each_branch_is_as_if_it_were_alone(name, groups):
    shape, function = TABLE[name]
    x, e = whole(groups, *shape), noise(EACH * len(groups), 6, seed=5)
    other = noise(EACH * sum(groups), *shape, seed=2)
    for rows, negative in ((Rows(x, groups), picked_groups(x, groups)), (parted(x, other, groups), other)):
        found = function(rows, e)
        assert isinstance(found, Rows)
        assert found.parted is rows.parted
        expected = function(x.clone(), e), function(negative.clone(), picked_groups(e, groups))
        assert found.shape == expected[0].shape
        torch.testing.assert_close(found.positive, expected[0])
        torch.testing.assert_close(found.negative, expected[1])


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_what_both_have_meets_what_differs(groups):
    x, other = whole(groups, 7, 6), noise(EACH * sum(groups), 7, 6, seed=2)
    same, apart = Rows(whole(groups, 7, 6), groups), parted(x, other, groups)
    for function in (torch.add, lambda a, b: torch.cat([a, b], 1), lambda a, b: a @ b.mT, _attend):
        for found, expected in (
            (function(same, apart), (function(same.positive, x), function(same.negative, other))),
            (function(apart, same), (function(x, same.positive), function(other, same.negative))),
        ):
            assert found.parted
            torch.testing.assert_close(found.positive, expected[0])
            torch.testing.assert_close(found.negative, expected[1])
    assert torch.equal(same.to(apart).positive, same.positive)
    assert isinstance(x.type_as(apart), torch.Tensor)


def _residual(x, y):
    r = x
    x += y
    return x + r


def _by_method(x, y):
    r = x.contiguous()
    x.mul_(y)
    return r


def _a_part(x, y):
    r = x
    x[:, 2:4] = y[:, :2]
    return r


def _operators(x, y):
    r, _ = x, F.silu(x)
    x -= y
    x /= 2
    return r


def _view_of_both(x, y):
    x = x + y
    first, _ = x.split([3, 4], dim=1)
    first += 1
    return x


WRITERS = (_residual, _by_method, _a_part, _operators, _view_of_both)


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("function", WRITERS)
def test_what_is_written_is_seen_under_all_names(function, groups):
    other, more = noise(EACH * sum(groups), 7, 6, seed=2), noise(EACH * len(groups), 7, 6, seed=3)
    x = whole(groups, 7, 6)
    found = function(Rows(x.clone(), groups), parted(more, other, groups))
    assert found.parted
    torch.testing.assert_close(found.positive, function(x.clone(), more))
    torch.testing.assert_close(found.negative, function(picked_groups(x, groups).clone(), other))


def test_one_row_without_guidance_is_folded_and_comes_back():
    """(1, N, C) -> (N, C) -> (1, N, C): tokens of the only image are no rows, and frames are none."""
    x, other = noise(1, 7, 6), noise(1, 7, 6, seed=1)
    for rows, negative in ((Rows(x, (True,)), x), (parted(x, other, (True,)), other)):
        back = rows.reshape(7, 6).view(1, 7, 6)
        assert back.axis == 0
        found = F.group_norm(back.transpose(1, 2) * noise(1, 6, 1), 2)
        torch.testing.assert_close(found.negative, F.group_norm(negative.mT * noise(1, 6, 1), 2))


def test_einsum_with_rows_behind_a_plain_operand():
    matrix, apart = noise(3, 7, seed=4), parted(whole(G, 7, 6), noise(EACH, 7, 6, seed=2), G)
    found = torch.einsum("nm,bmd->bnd", matrix, apart)
    torch.testing.assert_close(found.positive, matrix @ apart.positive)
    torch.testing.assert_close(found.negative, matrix @ apart.negative)


def test_one_row_of_one_group_is_told_from_what_is_the_same_for_all():
    """A text of one row meets rows of both branches: it is that of both."""
    apart = parted(noise(1, 7, 6), noise(1, 7, 6, seed=1), (True,))
    text = noise(1, 4, 6, seed=2)
    assert torch.cat([apart, text], 1).tensor.shape == (2, 11, 6)
    torch.testing.assert_close(_attend(apart, text).negative, _attend(apart.negative, text))
    torch.testing.assert_close((apart + text[:, :1]).negative, apart.negative + text[:, :1])


G = (False, True)
REFUSED = {
    "sum of all": lambda x, y: x.sum(),
    "over rows": lambda x, y: x.softmax(0),
    "mean over rows": lambda x, y: x.mean((0, 1)),
    "cat of rows": lambda x, y: torch.cat([x, x]),
    "one row": lambda x, y: x[0],
    "some rows": lambda x, y: x[:2],
    "rows by a mask": lambda x, y: x[x > 0],
    "rows in another order": lambda x, y: x.flip(0),
    "rows repeated": lambda x, y: x.repeat(2, 1, 1),
    "chunk of rows": lambda x, y: x.chunk(2),
    "tokens to the front": lambda x, y: x.transpose(0, 1).reshape(-1, 6),
    "odd shape": lambda x, y: x.reshape(3, -1),
    "norm of all": lambda x, y: F.layer_norm(x, tuple(x.shape)),
    "an operand of other rows": lambda x, y: x + noise(8, 7, 6)[:, :1].repeat(1, 1, 1)[:3],
    "by weights of its own": lambda x, y: F.linear(noise(3, 6), x[:, 0]),
    "what nobody knows": lambda x, y: torch.fft.fft(x),
    "random": lambda x, y: torch.randn_like(x),
    "asked": lambda x, y: bool(x.mean((1, 2)).sum() > 0),
    "numbers": lambda x, y: x.tolist(),
    "written into shared with a view": lambda x, y: (x[:, 0], x.add_(y)),
    "written into a view": lambda x, y: x.view(4, 7, 2, 3).add_(y.view(4, 7, 2, 3)),
    "part of shared with a view written": lambda x, y: (x.chunk(2, -1), x.__setitem__((slice(None), 0), y[:, 0])),
    "written into plain": lambda x, y: noise(4, 7, 6).add_(x),
    "added to plain": lambda x, y: operator.iadd(noise(4, 7, 6), y),
    "added to plain by and": lambda x, y: operator.iand(noise(4, 7, 6) > 0, y > 0),
    "plain part written": lambda x, y: noise(4, 7, 6).__setitem__(0, x),
    "out": lambda x, y: torch.add(x, 1, out=noise(4, 7, 6)),
    "transposed map": lambda x, y: F.conv1d(x.transpose(0, 1), noise(3, 4, 1)),
    "einsum over rows": lambda x, y: torch.einsum("bnc,bmc->nm", x, x),
    "training": lambda x, y: F.batch_norm(x, torch.zeros(7), torch.ones(7), training=True),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_of_each_row_alone_is_refused(name):
    x = Rows(whole(G, 7, 6), G)
    with pytest.raises((TypeError, UnwritableError)):
        REFUSED[name](x, parted(whole(G, 7, 6), noise(EACH, 7, 6), G))


def test_what_is_asked_of_tensors():
    apart = parted(whole(G, 7, 6), noise(EACH, 7, 6), G)
    assert (apart.shape, apart.size(0), len(apart), apart.ndim, apart.numel()) == ((4, 7, 6), 4, 4, 3, 168)
    assert (apart.dtype, apart.device.type, apart.is_cuda, apart.requires_grad) == (torch.float64, "cpu", False, False)
    assert (apart.positive.shape, apart.negative.shape) == ((4, 7, 6), (2, 7, 6))
    with pytest.raises(AttributeError):
        _ = apart.no_such_thing
    with pytest.raises(TypeError, match="in the one branch"):
        parted(whole(G, 7, 6), noise(EACH + 1, 7, 6), G)


def test_functions_that_are_known_to_work_on_rows():
    x, apart = Rows(whole(G, 7, 6), G), parted(whole(G, 7, 6), noise(EACH, 7, 6), G)
    for given in (x, apart):
        one, two = by_rows(lambda a, b: (torch.fft.fft(a).real, a + b), given, noise(4, 1, 6, seed=4))
        assert torch.equal(one.negative, torch.fft.fft(given.negative).real)
        assert torch.equal(two.negative, given.negative + noise(4, 1, 6, seed=4)[2:])
    assert torch.equal(by_rows(torch.add, noise(3), noise(3)), 2 * noise(3))
