"""The passes that guide, each on a module small enough to read."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sloth_fx.capture import Skeleton, capture
from sloth_fx.errors import SlothError
from sloth_fx.guidance_specs import NAG
from sloth_fx.operators import KeyLayout
from sloth_fx.passes.canonicalise import canonicalise
from sloth_fx.passes.core import attention_cores
from sloth_fx.passes.guide import GuidedAttention, branch, guide
from sloth_fx.passes.one_image import GuidedResult, SharedImage
from sloth_fx.rewrite import generate
from sloth_fx.site import Place
from tests.two_branches import guide as by_hand
from tests.zoo.count import attend

CHANNELS, HEADS = 12, 2
GRID = (5, 7)
IMAGE, TEXT = 35, 6
SPEC = NAG(scale=4.0, tau=1.5, alpha=0.5)
OFF, ON = KeyLayout(GRID), KeyLayout(GRID, guided=True)


class Cross(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(CHANNELS, CHANNELS) for _ in range(3))

    def heads(self, x):
        return x.view(x.shape[0], -1, HEADS, CHANNELS // HEADS).transpose(1, 2)

    def parts(self, x, text):
        return self.heads(self.to_q(x)), self.heads(self.to_k(text)), self.heads(self.to_v(text))

    def forward(self, x, text, mask=None):
        return F.scaled_dot_product_attention(*self.parts(x, text), attn_mask=mask).transpose(1, 2).flatten(2)


class Folded(Cross):
    """Heads in the batch, softmax spelled out."""

    def forward(self, x, text, mask=None):
        q, k, v = (each.reshape(-1, each.shape[2], CHANNELS // HEADS) for each in self.parts(x, text))
        scores = torch.bmm(q, k.transpose(1, 2)) * (CHANNELS // HEADS) ** -0.5
        return torch.bmm(scores.softmax(-1), v).unflatten(0, (-1, HEADS)).transpose(1, 2).flatten(2)


class Causal(Cross):
    """Which no text is; what is asked for is done all the same."""

    def forward(self, x, text, mask=None):
        return F.scaled_dot_product_attention(*self.parts(x, text), is_causal=True).transpose(1, 2).flatten(2)


def tokens(batch, count):
    return torch.randn(batch, count, CHANNELS)


def prepared(model, *args):
    """The graph of a module with its one core."""
    skeleton = Skeleton(model)
    graph = capture(skeleton, skeleton.model, skeleton.fake_inputs((args, {})), None).graph
    canonicalise(graph)
    [core] = attention_cores(graph)
    return graph, core


def guided(model, *args):
    """``model`` by its graph, guided; and the operator."""
    graph, core = prepared(model, *args)
    note = guide(graph, core, "sloth_guide_0")
    assert "guided by a negative text" in note
    folded_heads = HEADS if isinstance(model, Folded) else None
    operator = GuidedAttention("here", core.attend, SPEC, OFF, folded_heads=folded_heads)
    model.add_module("sloth_guide_0", operator)
    return generate(graph, "guided"), operator


@pytest.mark.parametrize("kind", [Cross, Folded])
@pytest.mark.parametrize("rows", [(True,), (False, True), (True, False, True)], ids=str)
@torch.no_grad()
def test_keys_at_hand(kind, rows):
    model = kind()
    batch = 2 * len(rows)
    x, text, other = tokens(batch, IMAGE), tokens(batch, TEXT), tokens(batch, 4)
    function, operator = guided(model, x, text)
    plain = model(x, text)
    assert torch.equal(function(model, x, text), plain)  # off

    operator.set_layout(ON, 1)
    operator.set_rows(rows)
    _, key, value = model.parts(x, other)
    folded = [each.flatten(0, 1) for each in (key, value)] if kind is Folded else [key, value]
    operator.set_negative(*folded, None)
    positive, negative = attend(*model.parts(x, text)), attend(*model.parts(x, other))
    expected = by_hand(positive, negative, SPEC)
    for group, taken in enumerate(rows):
        if not taken:
            expected[2 * group : 2 * group + 2] = positive[2 * group : 2 * group + 2]
    assert torch.allclose(function(model, x, text), expected.transpose(1, 2).flatten(2), atol=1e-5)


@torch.no_grad()
def test_masks_of_both_texts():
    model = Cross()
    x, text, other = tokens(2, IMAGE), tokens(2, TEXT), tokens(2, TEXT)
    masks = [torch.rand(2, 1, 1, TEXT) < 0.6 for _ in range(2)]
    for mask in masks:
        mask[..., 0] = True
    function, operator = guided(model, x, text, masks[0])
    operator.set_layout(ON, 1)
    operator.set_negative(*model.parts(x, other)[1:], masks[1])
    both = [attend(*model.parts(x, each), attn_mask=mask) for each, mask in zip((text, other), masks, strict=True)]
    expected = by_hand(*both, SPEC).transpose(1, 2).flatten(2)
    assert torch.allclose(function(model, x, text, masks[0]), expected, atol=1e-5)


@torch.no_grad()
def test_a_causal_mask_stays():
    model = Causal()
    x, text, other = tokens(2, IMAGE), tokens(2, IMAGE), tokens(2, IMAGE)
    function, operator = guided(model, x, text)
    assert torch.equal(function(model, x, text), model(x, text))
    operator.set_layout(ON, 1)
    operator.set_negative(*model.parts(x, other)[1:], None)
    found = function(model, x, text)
    positive = attend(*model.parts(x, text), is_causal=True).transpose(1, 2).flatten(2)
    assert torch.allclose(found[:, 0] - positive[:, 0], (found - positive)[:, 0])
    assert not torch.allclose(found, positive, atol=1e-2)


@torch.no_grad()
def test_no_text_and_groups_that_do_not_fit():
    model = Cross()
    x, text = tokens(3, IMAGE), tokens(3, TEXT)
    function, operator = guided(model, x, text)
    operator.set_layout(ON, 1)
    with pytest.raises(SlothError, match=r"here: the negative text is not known; call set_negative"):
        function(model, x, text)
    operator.set_negative(*model.parts(x, text)[1:], None)
    operator.set_rows((False, True))
    with pytest.raises(SlothError, match=r"here: a batch of 3 rows cannot be divided into 2 groups"):
        function(model, x, text)


class Joint(Cross):
    """One sequence of image and text."""

    def forward(self, x):
        return F.scaled_dot_product_attention(*self.parts(x, x)).transpose(1, 2).flatten(2)


PLACES = {
    "text first": (Place(TEXT, alone=False), TEXT),
    "text last": (Place(0, alone=False), 0),
    "from the end": (Place(2, from_end=True, alone=False), TEXT - 2),
    "alone": (Place(), 0),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("guides", [True, False])
@pytest.mark.parametrize("rows", [(True,), (False, True), (True, False, True)], ids=str)
@torch.no_grad()
def test_rows_of_their_own(place, guides, rows):
    model = Joint()
    batch, (where, first) = 2 * len(rows), PLACES[place]
    count = IMAGE if where.alone else IMAGE + TEXT
    taken = [2 * group + i for group, each in enumerate(rows) if each for i in range(2)]
    x = tokens(batch + len(taken), count)
    graph, core = prepared(model, x)
    inner = branch(graph, core, "sloth_share_0", "sloth_guide_0")
    assert inner.query is not core.query
    share = SharedImage("here", OFF, query_place=where, key_place=where)
    result = GuidedResult("here", SPEC if guides else None, OFF, query_place=where, folded_heads=None)
    model.add_module("sloth_share_0", share)
    model.add_module("sloth_guide_0", result)
    function = generate(graph, "branched")
    assert torch.equal(function(model, x), model(x))  # off

    for each in (share, result):
        each.set_layout(ON, 1)
        each.set_rows(rows)
    image = slice(first, first + IMAGE)
    query, key, value = model.parts(x, x)
    for each in (query, key, value):
        each[batch:, :, image] = each[taken][:, :, image]
    out = attend(query, key, value)
    new = by_hand(out[taken], out[batch:], SPEC)[:, :, image] if guides else out[taken][:, :, image]
    out[batch:, :, image] = new
    out[taken, :, image] = new
    assert torch.allclose(function(model, x), out.transpose(1, 2).flatten(2), atol=1e-5)


@torch.no_grad()
def test_rows_of_their_own_that_read_text_alone():
    """Keys of the text are each row's own."""
    model = Cross()
    x, text = tokens(4, IMAGE), tokens(4, TEXT)
    graph, core = prepared(model, x, text)
    branch(graph, core, "sloth_share_0", "sloth_guide_0")
    model.add_module("sloth_share_0", SharedImage("here", ON, query_place=Place(), key_place=None))
    model.add_module("sloth_guide_0", GuidedResult("here", SPEC, ON, query_place=Place(), folded_heads=None))
    query, key, value = model.parts(x, text)
    out = attend(torch.cat([query[:2]] * 2), key, value)
    new = by_hand(out[:2], out[2:], SPEC)
    expected = torch.cat([new, new]).transpose(1, 2).flatten(2)
    assert torch.allclose(generate(graph, "branched")(model, x, text), expected, atol=1e-5)


def test_the_operators_say_what_they_do():
    operator = GuidedAttention("here", F.scaled_dot_product_attention, SPEC, OFF, folded_heads=None)
    assert "scale=4.0" in repr(operator)
    assert "scale=4.0" in repr(GuidedResult("here", SPEC, OFF, query_place=Place(), folded_heads=None))
    assert not list(operator.state_dict())
