"""Attention that is spoilt on purpose, and what is steered away from it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sloth_fx.errors import SlothError
from sloth_fx.operators.blur import blur_grid
from sloth_fx.operators.hashing import hashed
from sloth_fx.operators.lse import attention_with_lse, merge_attention
from sloth_fx.operators.masks import additive
from sloth_fx.operators.sequence import split_image
from sloth_fx.site import Place


def identity_attention(value: Tensor, heads: int) -> Tensor:
    """Attention whose matrix is the identity: each token reads its own value.

    Args:
        value: (B, Hkv, N, Dv).
        heads: of the queries, a multiple of Hkv: the groups of queries that share a head read the same.

    Returns:
        (B, heads, N, Dv).
    """
    return value if value.shape[1] == heads else value.repeat_interleave(heads // value.shape[1], dim=1)


def joint_identity_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    place: Place,
    tokens: int,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """What image tokens read in a sequence with others if each sees itself and the others, but no other image token.

    Args:
        query: (B, H, M, D), of the image's tokens alone.
        key, value: (B, Hkv, N, D) and (B, Hkv, N, Dv), of the whole sequence.
        place, tokens: where in it the M = ``tokens`` of the image lie.
        scale: D ** -0.5 when None.
        mask: (1 or B, 1 or H, 1 or M, N): added to the scores, or True where a key is seen.

    Returns:
        (B, H, M, Dv). softmax over [own key ; others] is the merge of both: no M x M scores are made.
    """
    key, value = (identity_attention(each, query.shape[1]) for each in (key, value))
    (left, own, right), (left_value, own_value, right_value) = (
        split_image(each, place, tokens, 2) for each in (key, value)
    )
    others, other_values = torch.cat([left, right], 2), torch.cat([left_value, right_value], 2)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    precision = torch.promote_types(query.dtype, torch.float32)
    score = (query.to(precision) * own.to(precision)).sum(-1) * scale
    if mask is None:
        found, lse = attention_with_lse(query, others, other_values, scale)
        return merge_attention(own_value, score, found, lse)
    bias = additive(mask, precision).expand(-1, -1, tokens, -1)
    left_mask, own_mask, right_mask = split_image(bias, place, tokens, 3)
    scores = (query.to(precision) * scale) @ others.to(precision).mT + torch.cat([left_mask, right_mask], 3)
    score = score + own_mask.diagonal(dim1=2, dim2=3)
    weights = torch.cat([score.unsqueeze(-1), scores], -1).softmax(-1).to(value.dtype)
    return own_value * weights[..., :1] + weights[..., 1:] @ other_values


def blur_queries(query: Tensor, grid: tuple[int, int], sigma: float, frames: int = 1) -> Tensor:
    """Queries smoothed over rows and columns by a Gaussian, which smooths the scores of each key likewise.

    Args:
        query: (B, H, N, D) with N = frames * rows * columns, row-major.
        grid: (rows, columns) of a frame.
        sigma: in tokens, above 0; math.inf gives each the mean of its frame.

    Returns:
        (B, H, N, D). The kernel is ceil(6 sigma) long, made odd, but no longer than a side (made odd likewise); the
        border is reflected. Source: Smoothed Energy Guidance, its authors' code; rows and columns need not be equal.
    """
    image = torch.unflatten(query, 2, (frames, *grid)).movedim(-1, 3)
    if sigma == math.inf:
        return image.mean((-2, -1), keepdim=True).expand(image.shape).movedim(3, -1).reshape(query.shape)
    radius = math.ceil(6 * sigma) // 2
    radii = tuple(min(radius, side // 2) for side in grid)
    return blur_grid(image, sigma, (radii[0], radii[1])).movedim(3, -1).reshape(query.shape)


def shuffle_tokens(x: Tensor, seed: int | Tensor, dim: int = 1) -> Tensor:
    """Tokens in another order, the same for all of a batch.

    ``seed`` is an int, or a tensor of one integer, so that another seed is no new graph. Source: Token Perturbation
    Guidance (arXiv 2506.10036), where the order is drawn anew for each layer and step.
    """
    return x.index_select(dim, permutation(x.shape[dim], seed, x.device))


def permutation(size: int, seed: int | Tensor, device: torch.device) -> Tensor:
    """(size,) the indices below ``size`` in an order that looks random."""
    return hashed(torch.arange(size, device=device), seed).argsort(stable=True)


def guided(
    prediction: Tensor,
    perturbed: Tensor,
    rows: tuple[bool, ...] = (True,),
    *,
    scale: float,
    rescale: float = 0.0,
    share: float = 1.0,
    spread: bool = True,
) -> Tensor:
    """The prediction p, steered away from the perturbed one p': p + d with d = scale * (p - p').

    Args:
        prediction: (B, ...), B a multiple of the number of ``rows``: groups of the batch, one after another.
        perturbed: of the groups that are True in ``rows`` alone, in their order.
        rows: for each group, whether it is guided. Where one of several is, the others get the same d: classifier-free
            guidance of any kind is a sum of the groups' predictions with factors that add up to 1, so the result gets
            d as it is: u + w * (c - u) + d.
        scale, rescale: as in :class:`sloth_fx.perturbation_specs.PerturbationSpec`.
        share: the part of d that is added, of :func:`share_of`.
        spread: whether the others get it. Otherwise each group that is guided has its own, and the others none.

    Returns:
        (B, ...) in the dtype of ``prediction``. Raises SlothError where d is spread of some of several groups, not one.
    """
    count = sum(rows)
    if spread and count not in (1, len(rows)):
        raise SlothError(
            f"{count} of the {len(rows)} groups of this batch are guided: all, each by itself, or one, whose "
            'change the others get: say what they are with rows of the context, as in ("uncond", "cond")'
        )
    if count == len(rows):
        return prediction + share * difference(prediction, perturbed, scale=scale, rescale=rescale)
    groups = prediction.chunk(len(rows))
    own = torch.cat([group for group, here in zip(groups, rows, strict=True) if here])
    change = share * difference(own, perturbed, scale=scale, rescale=rescale)
    if spread:
        return prediction + change.repeat(len(rows), *[1] * (change.ndim - 1))
    changes = iter(change.chunk(count))
    return torch.cat([group + next(changes) if here else group for group, here in zip(groups, rows, strict=True)])


def difference(prediction: Tensor, perturbed: Tensor, *, scale: float, rescale: float = 0.0) -> Tensor:
    """d = result - p with result = g * (rescale * std(p) / std(g) + 1 - rescale) and g = p + scale * (p - p').

    Both (B, ...), the deviation over all but the batch. Source of the rescaling: Common Diffusion Noise Schedules and
    Sample Steps are Flawed (arXiv 2305.08891), equations 15 and 16.
    """
    change = (prediction - perturbed) * scale
    if rescale == 0:
        return change
    result = prediction + change
    own, theirs = (each.flatten(1).std(1).view(-1, *[1] * (each.ndim - 1)) for each in (prediction, result))
    return result * (rescale * own / theirs + 1 - rescale) - prediction


def share_of(guidance_scale: float | None) -> float:
    """The part of d for conditional rows alone, if classifier-free guidance with ``guidance_scale`` w comes after it:
    u + w * (c + d / w - u) = u + w * (c - u) + d, rescaled or not. None: nothing comes, or its w is not known."""
    return 1.0 if guidance_scale is None else 1 / guidance_scale
