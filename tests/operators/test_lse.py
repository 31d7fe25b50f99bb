import math

import pytest
import torch
import torch.nn.functional as F

from sloth_fx.operators import attention_with_lse, lse, merge_attention


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def formula(query, key, value, scale=None):
    """Row by row in float64."""
    query, key, value = query.double(), key.double(), value.double()
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out, sums = query.new_empty(*query.shape[:3], value.shape[-1]), query.new_empty(query.shape[:3])
    for b, h, n in torch.cartesian_prod(*map(torch.arange, query.shape[:3])).tolist():
        scores = scale * key[b, h] @ query[b, h, n]
        weights = (scores - scores.max()).exp()
        sums[b, h, n] = scores.max() + weights.sum().log()
        out[b, h, n] = weights @ value[b, h] / weights.sum()
    return out, sums


def inputs(queries=7, keys=11, size=8, value_size=8, dtype=torch.float32):
    shapes = (queries, size), (keys, size), (keys, value_size)
    return tuple(torch.randn(2, 3, *shape, dtype=torch.float64).to(dtype) for shape in shapes)


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("value_size", [8, 5])  # 5: no kernel takes it
@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 3e-2)]
)
def test_attention_with_lse_equals_the_formula(dtype, error, value_size, scale):
    tensors = inputs(dtype=dtype, value_size=value_size)
    out, sums = attention_with_lse(*tensors, scale)
    expected, expected_sums = formula(*tensors, scale)
    assert out.dtype == dtype
    assert sums.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(out.double(), expected, atol=error, rtol=error)
    torch.testing.assert_close(sums.double(), expected_sums, atol=error, rtol=error)


def test_torch_still_has_the_private_kernel_or_the_plain_softmax_serves(monkeypatch):
    with_kernel = attention_with_lse(*inputs())
    monkeypatch.setattr(lse, "_CPU", None)
    torch.manual_seed(0)
    for plain, fused in zip(attention_with_lse(*inputs()), with_kernel, strict=True):
        torch.testing.assert_close(plain, fused)


@pytest.mark.skipif(lse._CPU is None, reason="this torch has no such kernel")
def test_the_kernel_is_used_where_it_fits(monkeypatch):
    def forbidden(*args):
        raise AssertionError

    monkeypatch.setattr(lse, "_plain", forbidden)
    attention_with_lse(*inputs())
    with pytest.raises(AssertionError):
        attention_with_lse(*inputs(value_size=5))


def test_strided_inputs_as_projections_leave_them():
    tensors = [torch.randn(2, 9, 3 * 8).view(2, 9, 3, 8).transpose(1, 2) for _ in range(3)]
    torch.testing.assert_close(attention_with_lse(*tensors)[0], F.scaled_dot_product_attention(*tensors))


def test_merging_equals_one_attention_over_both_sets():
    query, key, value = inputs(keys=11, dtype=torch.float64)
    left = attention_with_lse(query, key[:, :, :4], value[:, :, :4])
    right = attention_with_lse(query, key[:, :, 4:], value[:, :, 4:])
    expected, _ = formula(query, key, value)
    torch.testing.assert_close(merge_attention(*left, *right), expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(merge_attention(*right, *left), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_merging_in_half_precision_is_close(dtype):
    query, key, value = inputs(keys=40, dtype=dtype)
    left = attention_with_lse(query, key[:, :, :7], value[:, :, :7])
    right = attention_with_lse(query, key[:, :, 7:], value[:, :, 7:])
    merged = merge_attention(*left, *right)
    assert merged.dtype == dtype
    error = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(merged.double(), formula(query, key, value)[0], atol=error, rtol=error)


@pytest.mark.parametrize("kernel", [lse._CPU, None], ids=["fused", "plain"])
def test_large_scores_do_not_overflow(kernel, monkeypatch):
    monkeypatch.setattr(lse, "_CPU", kernel)
    query, key, value = inputs()
    left = attention_with_lse(1e4 * query, key[:, :, :4], value[:, :, :4])
    right = attention_with_lse(1e4 * query, key[:, :, 4:], value[:, :, 4:])
    expected = F.scaled_dot_product_attention(1e4 * query, key, value)
    torch.testing.assert_close(merge_attention(*left, *right), expected)


def test_a_set_without_keys_changes_nothing():
    query, key, value = inputs()
    some, none = attention_with_lse(query, key, value), attention_with_lse(query, key[:, :, :0], value[:, :, :0])
    assert none[0].eq(0).all()
    assert none[1].eq(-math.inf).all()
    assert torch.equal(merge_attention(*some, *none), some[0])
    assert torch.equal(merge_attention(*none, *some), some[0])
    assert torch.equal(merge_attention(*none, *none), none[0])


def test_gradients_flow_through_the_log_sum_exp_too():
    tensors = [x[:1, :1].requires_grad_() for x in inputs(2, 3, 2, 2, torch.float64)]
    assert all(x.requires_grad for x in attention_with_lse(*tensors))  # gradcheck skips those that do not
    assert torch.autograd.gradcheck(attention_with_lse, tensors)
    left, right = attention_with_lse(*tensors), attention_with_lse(*(x.detach() for x in tensors))
    assert torch.autograd.gradcheck(merge_attention, (*[x.detach().requires_grad_() for x in left], *right))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 1e-4), (torch.float16, 5e-3), (torch.bfloat16, 3e-2), (torch.float64, 1e-10)]
)
@pytest.mark.parametrize("size", [8, 40, 12])  # 12: flash does not take it
def test_the_kernels_of_a_gpu(dtype, error, size):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    tensors = inputs(queries=45, size=size, value_size=size, dtype=dtype)
    out, sums = attention_with_lse(*(x.cuda() for x in tensors))
    expected, expected_sums = formula(*tensors)
    torch.testing.assert_close(out.cpu().double(), expected, atol=error, rtol=error)
    torch.testing.assert_close(sums.cpu().double(), expected_sums, atol=error, rtol=error)


@pytest.mark.parametrize("value_size", [8, 5])  # 5: no kernel takes it
@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("rows", [1, 7])
def test_a_mask_hides_keys(rows, additive, value_size):
    query, key, value = inputs(value_size=value_size)
    mask = torch.rand(2, 1, rows, 11) < 0.6
    mask[..., 3] = True
    mask[1, :, -1] = False  # a query that sees nothing, or all of them
    bias = torch.where(mask, torch.randn(mask.shape) if additive else 0.0, -torch.inf)
    out, sums = attention_with_lse(query, key, value, None, bias if additive else mask)
    scores = query.double() @ key.double().mT * 8**-0.5 + bias
    torch.testing.assert_close(sums, scores.logsumexp(-1).float())
    torch.testing.assert_close(out, (scores.softmax(-1).nan_to_num() @ value.double()).float())
