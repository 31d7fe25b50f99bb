"""What a run tells of each attention, however it is computed: how many there are, heads, tokens, owner."""

import pytest
import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import nn

import sloth_fx
from sloth_fx import SlothError

HEADS = 3  # the batch may be as large
SHAPES = [(2, 4, 5, 7), (3, 4, 9, 3)]


def by_hand(q, k, v):
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


def folded(q, k, v):
    """Heads in the batch, as in the first latent diffusion models."""
    q, k, v = (rearrange(t, "b h n d -> (b h) n d") for t in (q, k, v))
    scores = torch.baddbmm(torch.empty(len(q), q.shape[1], k.shape[1]), q, k.mT, beta=0, alpha=0.5)
    return rearrange(torch.bmm(scores.softmax(-1), v), "(b h) n d -> b h n d", h=HEADS)


def heads_first(q, k, v):
    """(H * B): the head is the outer one."""
    q, k, v = (rearrange(t, "b h n d -> (h b) n d") for t in (q, k, v))
    return rearrange(by_hand(q, k, v), "(h b) n d -> b h n d", h=HEADS)


def sliced_rows(q, k, v):
    """A slice of the folded batch after the other."""
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    out = torch.zeros_like(q)
    for start in range(0, len(q), 2):
        rows = slice(start, start + 2)
        out[rows] = torch.bmm(torch.bmm(q[rows], k[rows].mT).softmax(-1), v[rows])
    return out.unflatten(0, (-1, HEADS))


def sliced_queries(q, k, v):
    """A slice of the queries after the other, each over all keys."""
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    parts = [by_hand(part, k, v) for part in q.split(8, 1)]
    return torch.cat(parts, 1).unflatten(0, (-1, HEADS))


def with_einsum(q, k, v):
    scores = einsum(q, k, "b h n d, b h m d -> b h n m").softmax(-1)
    return einsum(scores, v, "b h n m, b h m d -> b h n d")


def one_head_at_a_time(q, k, v):
    return torch.stack([by_hand(q[:, i], k[:, i], v[:, i]) for i in range(HEADS)], 1)


WAYS = {
    "sdpa": F.scaled_dot_product_attention,
    "by_hand": by_hand,
    "by_name": lambda q, k, v: F.scaled_dot_product_attention(query=q, key=k, value=v),
    "folded": folded,
    "folded_sdpa": lambda q, k, v: F.scaled_dot_product_attention(*(t.flatten(0, 1) for t in (q, k, v))).unflatten(
        0, (-1, HEADS)
    ),
    "heads_first": heads_first,
    "sliced_rows": sliced_rows,
    "sliced_queries": sliced_queries,
    "einsum": with_einsum,
    "masked": lambda q, k, v: ((q @ k.mT) + torch.zeros(q.shape[2], k.shape[2])).float().softmax(-1).to(v.dtype) @ v,
    "one_head_at_a_time": one_head_at_a_time,
    "dropout": lambda q, k, v: F.dropout((q @ k.mT).softmax(-1), 0.1, False) @ v,
    "transposed": lambda q, k, v: (v.mT @ (k @ q.mT).softmax(-2)).mT,
}


class Attention(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(4, 5 * HEADS) for _ in range(3))
        self.way = way

    def forward(self, x, context=None):
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=HEADS) for t in (q, k, v))
        return rearrange(self.way(q, k, v), "b h n d -> b n (h d)")


class Model(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.first, self.second = Attention(way), Attention(way)

    def forward(self, sample, text):
        x = sample.flatten(2).mT
        return self.first(x) + self.second(x, text)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", WAYS)
def test_one_site_for_each_attention(name, shape):
    example = torch.zeros(shape), torch.zeros(shape[0], 6, 4)
    own, cross = sloth_fx.inspect(Model(WAYS[name]), example_inputs=example)
    grid = shape[2:]
    if name == "transposed":  # queries and keys cannot be told apart where they are as many
        assert (own.kind, own.grid, own.heads) == ("self", grid, HEADS)
        return
    assert (own.path, own.kind, own.grid) == ("first", "self", grid)
    assert (cross.path, cross.kind, cross.grid, cross.text) == ("second", "cross", grid, (0, 6))
    assert (own.q_tokens, own.kv_tokens) == (grid[0] * grid[1],) * 2
    assert (cross.q_tokens, cross.kv_tokens) == (grid[0] * grid[1], 6)
    for site in (own, cross):
        assert (site.heads, site.head_dim, site.owner, site.call) == (HEADS, 5, "Attention", 0)


class Both(nn.Module):
    """Two attentions in one forward; the tensors of the first are gone when the second begins."""

    def forward(self, sample, text):
        x = sample.flatten(2).mT
        x = by_hand(x * 2, x * 3, x)
        x = by_hand(x * 2, x * 3, x)
        return by_hand(x * 2, text * 3, text)


@pytest.mark.parametrize("shape", SHAPES)
def test_attentions_one_after_the_other_in_one_owner(shape):
    example = torch.zeros(shape), torch.zeros(shape[0], 6, 4)
    found = list(sloth_fx.inspect(Both(), example_inputs=example))
    assert [(site.kind, site.call, site.core) for site in found] == [("self", 0, 0), ("self", 1, 1), ("cross", 2, 2)]
    assert found[0].name == "(the model itself)"


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj_in = nn.Linear(4, 6)

    def forward(self, sample):
        x = self.proj_in(sample.flatten(2).mT)
        own = by_hand(x, x, x)
        return own + F.relu(x) @ (F.relu(x).mT @ x)


@pytest.mark.parametrize("shape", SHAPES)
def test_linear_attention_beside_another(shape):
    own, linear = sloth_fx.inspect(Linear(), example_inputs=(torch.zeros(shape),))
    assert (own.kind, own.on_image, linear.kind, linear.on_image) == ("self", True, "linear", False)


class Failing(nn.Module):
    def forward(self, sample, scale):
        return by_hand(sample, sample, sample) @ scale


def test_inputs_that_do_not_fit_are_named():
    shapes = r"\(0 \(2, 4, 5\), 1 \(9, 3\)\).*example_inputs"
    with pytest.raises(SlothError, match=f"Failing does not run on these inputs {shapes}"):
        sloth_fx.inspect(Failing(), example_inputs=(torch.zeros(2, 4, 5), torch.zeros(9, 3)))


class Plain(nn.Module):
    def forward(self, sample):
        return sample.softmax(-1)


def test_a_model_without_attention():
    with pytest.raises(SlothError, match="Plain computes no attention"):
        sloth_fx.inspect(Plain(), example_inputs=(torch.zeros(2, 4, 5, 7),))


class Windows(nn.Module):
    """Of a map in windows of 3 x 5: as many attentions in one call, beside the heads or instead of them."""

    def __init__(self, pattern):
        super().__init__()
        self.proj_in, self.pattern = nn.Conv2d(4, 6, 1), pattern

    def forward(self, sample):
        x = rearrange(self.proj_in(sample), f"b (c d) (h p) (w q) -> {self.pattern}", p=3, q=5, d=2)
        return F.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize(
    ("pattern", "heads"),
    [
        ("b (h w) c (p q) d", 3),
        ("b c (h w) (p q) d", 3),
        ("b h w c (p q) d", 3),
        ("(b h w) c (p q) d", 3),
        ("b (h w) (p q) (c d)", 1),
        ("(b h w) (p q) (c d)", 1),
    ],
)
def test_windows_are_rows(pattern, heads):
    [site] = sloth_fx.inspect(Windows(pattern), example_inputs=(torch.zeros(2, 4, 9, 20),))
    assert (site.kind, site.grid, site.divisors) == ("self", (3, 5), (None, None))
    assert site.heads == heads


class Functional(nn.Module):
    """torch's own function, with tokens first."""

    def __init__(self):
        super().__init__()
        self.weight, self.out = nn.Parameter(torch.zeros(3 * 6, 6)), nn.Linear(6, 6)
        self.proj_in = nn.Linear(4, 6)

    def attend(self, query, key):
        return F.multi_head_attention_forward(
            *(query, key, key, 6, 3, self.weight, None, None, None, False, 0.0),
            self.out.weight,
            self.out.bias,
            need_weights=False,
        )[0]

    def forward(self, sample, text):
        x, text = (self.proj_in(each).transpose(0, 1) for each in (sample.flatten(2).mT, text))
        x = self.attend(x, x)
        return self.attend(torch.cat([text, x]), torch.cat([text, x])) + self.attend(x, text).mean()


@pytest.mark.parametrize("shape", SHAPES)
def test_multi_head_attention_forward(shape):
    """What comes out of one has its places, so that the next is known as well."""
    example = torch.zeros(shape), torch.zeros(shape[0], 6, 4)
    own, joint, cross = sloth_fx.inspect(Functional(), example_inputs=example)
    assert [site.kind for site in (own, joint, cross)] == ["self", "joint", "cross"]
    assert {(site.grid, site.heads, site.head_dim) for site in (own, joint, cross)} == {(shape[2:], 3, 2)}
    assert joint.key_place.start(joint.kv_tokens, shape[2] * shape[3]) == 6
    assert cross.text == (0, 6)


class Encoder(nn.Module):
    """torch's own layer, which has a fast path for inference."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)

    def forward(self, sample):
        return self.layer(sample.flatten(2).mT)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_encoder_layer(shape, training):
    [site] = sloth_fx.inspect(Encoder().train(training), example_inputs=(torch.zeros(shape),))
    assert (site.path, site.kind, site.grid, site.heads) == ("layer.self_attn", "self", shape[2:], 2)


class Reading(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.way = way

    def forward(self, queries, keys):
        queries, keys = (each[:, None].expand(-1, HEADS, -1, -1) for each in (queries, keys))
        return self.way(queries * 2, keys * 3, keys)[:, 0]


class Resampled(nn.Module):
    """Learned tokens read the text, and stand before the image."""

    def __init__(self, way):
        super().__init__()
        self.learned, self.embed = nn.Parameter(torch.randn(1, 5, 4)), nn.Linear(4, 4)
        self.resampler, self.joint = Reading(way), Reading(F.scaled_dot_product_attention)

    def forward(self, sample, text):
        learned = self.learned.expand(len(text), -1, -1)
        learned = learned + self.resampler(learned, self.embed(text))
        tokens = torch.cat([learned, sample.flatten(2).mT], 1)
        return self.joint(tokens, tokens)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", sorted(WAYS.keys() - {"transposed"}))
def test_learned_tokens_are_no_image_and_stand_for_the_text_that_they_read(name, shape):
    example = torch.zeros(shape), torch.zeros(shape[0], 6, 4)
    resampler, joint = sloth_fx.inspect(Resampled(WAYS[name]), example_inputs=example)
    assert (resampler.kind, resampler.text, resampler.grid) == ("cross", (0, 6), None)
    assert not resampler.image_queries
    assert (joint.kind, joint.text, joint.grid, joint.image_queries) == ("joint", (0, 5), shape[2:], True)
