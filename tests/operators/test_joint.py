"""Image tokens among others, and masks: against dense attention in which every key weighs as often as it is seen."""

import pytest
import torch
import torch.nn.functional as F

from sloth_fx.errors import SlothError
from sloth_fx.operators import (
    KeyLayout,
    Pooling,
    both_masks,
    causal_mask,
    join_image,
    near_sighted_attention,
    reduce_mask,
    reduce_tokens,
    split_image,
)
from sloth_fx.site import Place
from tests.operators import by_hand

LAYOUTS = {
    "whole": KeyLayout((5, 7)),
    "tiles": KeyLayout((5, 7), tile=(3, 4), pad=(1, 0), samples=(2, 3)),
    "flat": KeyLayout((5, 7), tile=(3, 4), samples=(1, 4), flat=True),
    "frames": KeyLayout((3, 5), tile=(2, 3), samples=(2, 2), frames=3),
}
POOLED = {
    "untiled": KeyLayout((5, 7), window=(2, 3)),
    "tiles": KeyLayout((5, 7), window=(2, 2), tile=(3, 4), samples=(2, 3), sample_window=(2, 2)),
    "frames": KeyLayout((3, 5), (2, 1), (2, 3), samples=(2, 2), sample_window=(2, 1), frames=3, frame_window=2),
}
# (others before and after the queries, their place), and the same of the keys
SEQUENCES = {
    "text-first": (((4, 0), Place(4, alone=False)), ((4, 0), Place(4, alone=False))),
    "text-last": (((0, 4), Place(0, alone=False)), ((0, 4), Place(0, alone=False))),
    "from-the-end": (((3, 2), Place(2, from_end=True, alone=False)), ((3, 2), Place(2, from_end=True, alone=False))),
    "keys-only": (((0, 0), Place()), ((3, 1), Place(1, from_end=True, alone=False))),
}
MASKS = {
    "none": (),
    "padding": (1, 0, 0, 1),
    "dense": (1, 0, 1, 1),
    "heads": (1, 1, 1, 1),
    "queries": (1, 0, 1, 0),
    "shared": (0, 0, 1, 1),
}
BATCH, HEADS, SIZE = 3, 2, 4


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def mask_of(axes, shape, additive):
    """A mask (1 where an axis is not in `axes`); every query sees its first key."""
    if not axes:
        return None
    mask = torch.rand([size if axis else 1 for axis, size in zip(axes, shape, strict=True)]) < 0.6
    mask[..., 0] = True
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -9.0) if additive else mask


def added(mask):
    if mask is None:
        return 0.0
    return (torch.zeros(mask.shape).masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask).numpy()


CASES = [(layout, None) for layout in LAYOUTS.values()] + [(p, b) for p in POOLED.values() for b in ("keep", "crop")]


@pytest.mark.parametrize(("layout", "border"), CASES)
@pytest.mark.parametrize("sequence", SEQUENCES.values(), ids=SEQUENCES.keys())
@pytest.mark.parametrize("axes", MASKS.values(), ids=MASKS.keys())
def test_every_query_sees_its_tile_the_samples_and_the_others(layout, sequence, axes, border):
    (q_others, q_place), (k_others, k_place) = sequence
    seen = by_hand.times_seen(layout, q_others, k_others, border)
    query, key, value = (
        torch.randn(BATCH, HEADS, n, SIZE, dtype=torch.float64) for n in (len(seen), *seen.shape[1:] * 2)
    )
    for additive in (False, True):
        mask = mask_of(axes, (BATCH, HEADS, *seen.shape), additive)
        result = near_sighted_attention(
            query, key, value, layout, gathered=border is not None, border=border, mask=mask,
            query_place=q_place, key_place=k_place,
        )  # fmt: skip
        if mask is not None and not additive:
            query_sees = torch.from_numpy(seen > 0) & mask
            assert query_sees.any(-1).float().mean() > 0.8
            rows = query_sees.any(-1).expand(BATCH, HEADS, -1)
        else:
            rows = torch.ones(BATCH, HEADS, len(seen), dtype=torch.bool)
        correct = by_hand.dense_attention(*(x.numpy() for x in (query, key, value)), seen, added(mask))
        torch.testing.assert_close(result[rows], torch.from_numpy(correct)[rows], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("sequence", SEQUENCES.values(), ids=SEQUENCES.keys())
@pytest.mark.parametrize("name", LAYOUTS)
def test_merging_by_log_sum_exp_is_the_same(sequence, name):
    layout, ((q_others, q_place), (k_others, k_place)) = LAYOUTS[name], sequence
    q, k, v = (torch.randn(BATCH, HEADS, layout.tokens + sum(n), SIZE) for n in (q_others, k_others, k_others))
    options = {"gathered": False, "query_place": q_place, "key_place": k_place}
    merged = near_sighted_attention(q, k, v, layout, merge="lse", **options)
    torch.testing.assert_close(merged, near_sighted_attention(q, k, v, layout, **options), atol=1e-5, rtol=1e-5)


def test_images_of_a_half_do_not_meet_each_others_text():
    layout, place = LAYOUTS["tiles"], Place(4, alone=False)
    q, k, v = (torch.randn(4, HEADS, 39, SIZE, dtype=torch.float64) for _ in range(3))
    options = {"gathered": False, "query_place": place, "key_place": place, "halves": 2, "concat_local": True}
    before = near_sighted_attention(q, k, v, layout, **options, concat_global=True)
    changed = v.clone()
    changed[1, :, 4:] += 1  # image tokens of the second image: seen by the first one's image, not by its text
    after = near_sighted_attention(q, k, changed, layout, **options, concat_global=True)
    assert torch.equal(before[0, :, :4], after[0, :, :4])
    assert not torch.isclose(before[0, :, 4:], after[0, :, 4:]).any()
    assert torch.equal(before[2:], after[2:])
    changed[1, :, :4] += 1  # its text is seen by no other image
    text = near_sighted_attention(q, k, changed, layout, **options, concat_global=True)
    assert torch.equal(text[0], after[0])


@pytest.mark.parametrize("name", POOLED)
@pytest.mark.parametrize("border", ["keep", "crop"])
@pytest.mark.parametrize("additive", [False, True])
def test_a_window_is_seen_while_one_of_its_tokens_is(name, border, additive):
    layout, others = POOLED[name], (3, 2)
    mask = mask_of((1, 1, 1, 1), (BATCH, 1, 6, layout.tokens + sum(others)), additive)
    places = Place(3, alone=False), Place(2, from_end=True, alone=False)
    image = mask[..., 3:-2].double().reshape(-1, layout.tokens, 1).numpy()
    for blend in (0.0, 0.4):
        correct = by_hand.reduce(image, layout, Pooling("max", border=border), float(blend > 0))
        correct = torch.from_numpy(correct).view(*mask.shape[:3], -1).to(mask.dtype)
        correct = torch.cat([mask[..., :3], correct, mask[..., -2:]], -1)
        for place in places:
            reduced = reduce_mask(mask, layout, Pooling("avg", blend, 0.7, border), place)
            assert reduced.dtype == mask.dtype
            assert torch.equal(reduced, correct)


def test_a_padding_mask_is_never_expanded():
    layout, place, mask = POOLED["tiles"], Place(3, alone=False), torch.ones(BATCH, 1, 1, 38, dtype=torch.bool)
    assert reduce_mask(mask, layout, Pooling("avg", 1.0, 1.0), place).shape == (
        BATCH,
        1,
        1,
        3 + layout.gathered_tokens(),
    )
    assert reduce_mask(mask[..., :1], layout, Pooling(), place).shape == (BATCH, 1, 1, 1)
    shapes = []

    def attend(query, key, value, mask):
        shapes.append(mask.shape)
        return F.scaled_dot_product_attention(query, key, value, mask)

    q = torch.randn(BATCH, HEADS, 38, SIZE)
    options = {"gathered": False, "query_place": place, "key_place": place, "mask": mask, "attend": attend}
    near_sighted_attention(q, q, q, LAYOUTS["tiles"], **options)
    assert {shape[1:3] for shape in shapes} == {(1, 1)}


def test_a_causal_mask_is_that_of_torch():
    q, k = torch.randn(2, 3, 7, 4), torch.randn(2, 3, 11, 4)
    causal = causal_mask(7, 11, q.device)
    expected = F.scaled_dot_product_attention(q, k, k, is_causal=True)
    torch.testing.assert_close(F.scaled_dot_product_attention(q, k, k, causal), expected)
    padding = torch.rand(2, 1, 1, 11) < 0.7
    assert torch.equal(both_masks(None, causal), causal)
    assert torch.equal(both_masks(padding, causal), padding & causal)
    weights = both_masks(torch.full((2, 1, 1, 11), 0.5), causal)
    assert torch.equal(weights.isneginf(), ~causal.expand(2, 1, 7, 11))
    assert weights.amax() == 0.5


def test_the_image_is_split_off_and_joined_again():
    tokens = torch.randn(2, 40, 3)
    for place, others in (
        (Place(3, alone=False), (3, 2)),
        (Place(2, from_end=True, alone=False), (3, 2)),
        (Place(), (0, 0)),
    ):
        joint = tokens[:, : 35 + sum(others)]
        before, image, after = split_image(joint, place, 35, 1)
        assert (before.shape[1], after.shape[1]) == others
        assert torch.equal(image, joint[:, others[0] : others[0] + 35])
        assert torch.equal(join_image(before, image, after, 1), joint)
    assert join_image(tokens[:, :0], tokens, tokens[:, :0], 1) is tokens
    with pytest.raises(SlothError, match="40 tokens do not hold 35 image tokens and no others"):
        split_image(tokens, Place(), 35, 1)
    with pytest.raises(SlothError, match="40 tokens do not hold 39 image tokens and 2 before them"):
        split_image(tokens, Place(2, alone=False), 39, 1)


def test_errors_name_what_does_not_go_together():
    layout, q = LAYOUTS["tiles"], torch.randn(2, 2, 35, 4)
    mask = torch.ones(2, 1, 1, 35, dtype=torch.bool)
    with pytest.raises(SlothError, match="takes no mask; use merge='concat'"):
        near_sighted_attention(q, q, q, layout, gathered=False, mask=mask, merge="lse")
    with pytest.raises(SlothError, match="says nothing about other images' keys"):
        near_sighted_attention(q, q, q, layout, gathered=False, mask=mask, concat_local=True)


def test_a_reduced_sequence_keeps_its_other_tokens():
    layout, place = POOLED["frames"], Place(1, from_end=True, alone=False)
    tokens = torch.randn(2, layout.tokens + 3, 5)
    before, image, after = split_image(tokens, place, layout.tokens, 1)
    keys, _ = reduce_tokens(image, layout, Pooling("max", 0.3, 0.3))
    joined = join_image(before, keys, after, 1)
    assert joined.shape[1] == layout.gathered_tokens() + 3
    assert torch.equal(joined[:, -1], tokens[:, -1])
