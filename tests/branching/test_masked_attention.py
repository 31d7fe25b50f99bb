"""Attention of two branches with a mask: what both hide alike is attended once, and the rest is as in two calls."""

import pytest
import torch
import torch.nn.functional as F

from sloth_fx.branching import Pair, Tokens, attend_branches
from sloth_fx.branching.values import of
from tests.branching.test_attention import Pairs

BATCH, HEADS, IMAGE, SIZE = 2, 3, 11, 8
LENGTHS = [(5, 5), (7, 4)]


def noise(tokens):
    return torch.randn(BATCH, HEADS, tokens, SIZE)


def sequence(lengths):
    return Tokens([Pair(*map(noise, lengths)), noise(IMAGE)], 2)


def hides(lengths, *, image=True, rows=1, additive=False):
    """A mask for each branch, which hides some of the text from the second sample, and with ``image`` False some of the
    image."""
    masks = []
    for length in lengths:
        mask = torch.ones(BATCH, 1, length + IMAGE if rows > 1 else 1, length + IMAGE, dtype=torch.bool)
        mask[1, ..., 2:length] = False
        if not image:
            mask[0, ..., -3:] = False
        masks.append(torch.zeros(mask.shape).masked_fill(~mask, -torch.inf) if additive else mask)
    return Pair(*masks)


def expected(query, key, value, mask, branch):
    q, k, v, m = (of(each, branch) for each in (query, key, value, mask))
    scores = q.double() @ k.double().mT * SIZE**-0.5
    scores = scores.masked_fill(~m, -torch.inf) if m.dtype == torch.bool else scores + m
    return (scores.softmax(-1) @ v.double()).float()


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(
    "options", [{}, {"additive": True}, {"rows": 2}, {"image": False}, {"image": False, "additive": True}], ids=str
)
def test_it_equals_two_calls_and_attends_once_to_the_image(lengths, options):
    query, key, value, mask = sequence(lengths), sequence(lengths), sequence(lengths), hides(lengths, **options)
    with torch.no_grad(), Pairs() as counter:
        found = attend_branches(F.scaled_dot_product_attention, query, key, value, mask)
    for branch in range(2):
        torch.testing.assert_close(of(found, branch), expected(query, key, value, mask, branch))
    text, both = sum(lengths), sum(length + IMAGE for length in lengths)
    each = sum(length * (length + IMAGE) for length in lengths)
    assert counter.pairs == BATCH * HEADS * (each + IMAGE * (IMAGE + text))
    assert counter.pairs < BATCH * HEADS * (each + IMAGE * both)


def test_an_image_that_is_hidden_in_one_branch_only():
    lengths = (5, 5)
    query, key, value = (sequence(lengths) for _ in range(3))
    mask = Pair(hides(lengths).positive, hides(lengths, image=False).negative)
    with torch.no_grad():
        found = attend_branches(F.scaled_dot_product_attention, query, key, value, mask)
    for branch in range(2):
        torch.testing.assert_close(of(found, branch), expected(query, key, value, mask, branch))


def test_a_text_that_is_hidden_as_a_whole():
    lengths = (5, 4)
    query, key, value, mask = sequence(lengths), sequence(lengths), sequence(lengths), hides(lengths)
    mask.negative[..., :4] = False
    with torch.no_grad():
        found = attend_branches(F.scaled_dot_product_attention, query, key, value, mask)
    for branch in range(2):
        torch.testing.assert_close(of(found, branch), expected(query, key, value, mask, branch))


def two_images(hidden):
    """A text of five tokens, of which some are ``hidden``, an image, and a reference as large that does not see it."""
    length = 5
    mask = torch.zeros(BATCH, 1, length + 2 * IMAGE, length + 2 * IMAGE)
    mask[..., length - hidden : length] = -torch.inf
    mask[..., length + IMAGE :, length : length + IMAGE] = -torch.inf
    return mask


def test_images_of_one_size_under_a_mask_that_goes_by_queries():
    query, key, value = (Tokens([Pair(noise(5), noise(5)), noise(IMAGE), noise(IMAGE)], 2) for _ in range(3))
    mask = Pair(two_images(1), two_images(0))
    with torch.no_grad():
        found = attend_branches(F.scaled_dot_product_attention, query, key, value, mask)
    for branch in range(2):
        torch.testing.assert_close(of(found, branch), expected(query, key, value, mask, branch))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("in_parts", [False, True])
def test_a_mask_that_was_written_into_since(mode, in_parts):
    with mode():
        query, key, value, mask = sequence((5, 5)), sequence((5, 5)), sequence((5, 5)), hides((5, 5), rows=2)
        if in_parts:
            texts, image = (each[..., :5].clone() for each in (mask.positive, mask.negative)), mask.positive[..., 5:]
            mask = Tokens([Pair(*texts), image.clone()], 3)
        for hidden in (slice(5, 7), slice(9, 12)):
            attend_branches(F.scaled_dot_product_attention, query, key, value, mask)
            mask[..., hidden] = False
            found = attend_branches(F.scaled_dot_product_attention, query, key, value, mask)
            for branch in range(2):
                torch.testing.assert_close(of(found, branch), expected(query, key, value, mask, branch))
