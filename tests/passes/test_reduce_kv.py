"""Keys with rotary embeddings, among other tokens and under masks: where they are reduced, and to what."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sloth_fx.capture import Skeleton, capture
from sloth_fx.errors import SlothError
from sloth_fx.operators import KeyLayout, Pooling, reduce_tokens
from sloth_fx.passes.canonicalise import canonicalise
from sloth_fx.passes.core import attention_cores
from sloth_fx.passes.reduce_kv import KeyValueReduction, reduce_kv
from sloth_fx.passes.tile_queries import TiledAttention, tile_queries
from sloth_fx.rewrite import generate
from sloth_fx.site import Place

CHANNELS, HEADS, GRID, TEXT, BATCH = 16, 2, (5, 7), 3, 2
PAIRS = CHANNELS // HEADS // 2
TOKENS = GRID[0] * GRID[1]
LAYOUT = KeyLayout(GRID, window=(2, 3))
TILED = KeyLayout(GRID, window=(2, 1), tile=(3, 4), samples=(2, 3), sample_window=(2, 1))
RECOGNISED = "above to_k, to_v; keys rotated at the centre of their window"


def angles(places):
    """(n, 2) rows and columns -> (n, channel pairs): one half of the pairs turns with each."""
    frequency = torch.tensor([1.0, 0.2])
    return torch.cat([places[:, :1] * frequency, places[:, 1:] * frequency], 1)


def places(grid=GRID):
    return torch.cartesian_prod(*(torch.arange(float(n)) for n in grid))


def centres(layout):
    last, first = reduce_tokens(places()[None], layout, Pooling("max", 1.0, 0.0))
    return (last[0] + first[0]) / 2, first[0]


class Rotary(nn.Module):
    """Interleaved pairs, cosine and sine of all channels: FLUX and many others."""

    half = False

    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(CHANNELS, CHANNELS) for _ in range(3))
        self.norm_k = nn.RMSNorm(CHANNELS // HEADS)

    def heads(self, x):
        return x.unflatten(-1, (HEADS, -1))

    def key(self, x):
        return self.norm_k(self.heads(self.to_k(x)))

    @staticmethod
    def factors(angle):
        return angle.cos().repeat_interleave(2, 1), angle.sin().repeat_interleave(2, 1)

    def rotate(self, x, cos, sin):
        one, other = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-other, one], -1).flatten(-2)
        return (x.float() * cos[None, :, None] + turned.float() * sin[None, :, None]).to(x.dtype)

    def forward(self, x, *factors):
        query, key = self.rotate(self.heads(self.to_q(x)), *factors), self.rotate(self.key(x), *factors)
        value = self.heads(self.to_v(x))
        return F.scaled_dot_product_attention(*(each.transpose(1, 2) for each in (query, key, value)))


class Halves(Rotary):
    """The two halves of the channels as pairs: Cosmos, Stable Audio."""

    half = True

    @staticmethod
    def factors(angle):
        return angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)

    def rotate(self, x, cos, sin):
        one, other = x.chunk(2, -1)
        return x * cos[None, :, None] + torch.cat([-other, one], -1) * sin[None, :, None]


class Written(Rotary):
    """Writes the two channels of a pair one after the other: Wan."""

    def rotate(self, x, cos, sin):
        one, other = x.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = cos[None, :, None, 0::2], sin[None, :, None, 1::2]
        out = torch.empty_like(x)
        out[..., 0::2] = one * cos - other * sin
        out[..., 1::2] = one * sin + other * cos
        return out.type_as(x)


class Complex(Rotary):
    """Complex numbers: Lumina, Qwen-Image."""

    @staticmethod
    def factors(angle):
        return (torch.polar(torch.ones_like(angle), angle),)

    def rotate(self, x, factor):
        turned = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2)) * factor.unsqueeze(1)
        return torch.view_as_real(turned).flatten(3).type_as(x)


class Matrices(Rotary):
    """Matrices, of which columns are taken: the FLUX of Black Forest Labs."""

    @staticmethod
    def factors(angle):
        cos, sin = angle.cos(), angle.sin()
        return (torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)[None, :, None],)

    def rotate(self, x, matrix):
        pairs = x.float().reshape(*x.shape[:-1], -1, 1, 2)
        turned = matrix[..., 0] * pairs[..., 0] + matrix[..., 1] * pairs[..., 1]
        return turned.reshape(*x.shape).type_as(x)


class Products(Matrices):
    """Matrices, multiplied as a whole: Kandinsky 5."""

    def rotate(self, x, matrix):
        pairs = x.reshape(*x.shape[:-1], -1, 1, 2)
        return (matrix * pairs).sum(dim=-1).reshape(*x.shape)


class InPlace(Rotary):
    """Rotates a part of the sequence in place: CogVideoX."""

    def rotate(self, x, cos, sin):
        part = x[:, 0:]
        x[:, 0:] = super().rotate(part, cos.to(part.device), sin.to(part.device))
        return x


class Fused(Rotary):
    """One projection for all three."""

    def __init__(self):
        super().__init__()
        self.to_qkv = nn.Linear(CHANNELS, 3 * CHANNELS)

    def forward(self, x, *factors):
        query, key, value = (self.heads(each) for each in self.to_qkv(x).chunk(3, -1))
        query, key = self.rotate(query, *factors), self.rotate(self.norm_k(key), *factors)
        return F.scaled_dot_product_attention(*(each.transpose(1, 2) for each in (query, key, value)))


class Gated(Rotary):
    """A factor that belongs to no pair: nothing that is known to be a rotation."""

    def rotate(self, x, cos, sin):
        return super().rotate(x, cos, sin) * cos[None, :, None]


class Joined(Rotary):
    """Rotates queries and keys in one tensor, so that the keys have no way of their own to the rotation."""

    def forward(self, x, *factors):
        both = torch.cat([self.heads(self.to_q(x)), self.key(x)], 2)
        query, key = self.rotate(both, *factors).chunk(2, 2)
        value = self.heads(self.to_v(x))
        return F.scaled_dot_product_attention(*(each.transpose(1, 2) for each in (query, key, value)))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def rewritten(module, inputs, place=None, pooling=None, level=0, tile=False):
    """(function of a layout, where the reduction went)."""
    place = place or Place()
    skeleton = Skeleton(module)
    result = capture(skeleton, skeleton.model, skeleton.fake_inputs((inputs, {})), None)
    canonicalise(result.graph)
    (core,) = attention_cores(result.graph)
    core, where = reduce_kv(result.graph, core, "reduce", result.owner, image_tokens=TOKENS, level=level)
    module.reduce = KeyValueReduction("site", pooling or Pooling("avg", 1.0, 1.0), KeyLayout(GRID), place)
    if tile:
        tile_queries(result.graph, core, "tile")
        options = {"folded_heads": None, "concat_local": False, "concat_global": False}
        module.tile = TiledAttention(
            "site", core.attend, KeyLayout(GRID), query_place=place, key_place=place, **options
        )
    function = generate(result.graph, "test")

    def with_layout(layout):
        module.reduce.set_layout(layout, 1)
        if tile:
            module.tile.set_layout(layout, 1)
        return function(module, *inputs)

    return with_layout, where


def turned(x, angle, half):
    """(B, n, H, D) rotated by (n, D / 2) angles, in complex numbers."""
    pairs = torch.stack(x.chunk(2, -1), -1) if half else x.unflatten(-1, (-1, 2))
    pairs = torch.view_as_real(
        torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones(()), angle)[None, :, None]
    )
    return torch.cat(pairs.unbind(-1), -1) if half else pairs.flatten(-2)


def expected(module, x, layout, pooling):
    """Pooled, projected, rotated at the centre of the window, blended with what stands at its first token."""
    centre, first = centres(layout)
    one, pool = reduce_tokens(x, layout, pooling._replace(k_blend=0.0, v_blend=1.0))
    keys = [turned(module.key(k), angles(at), module.half) for k, at in ((one, first), (pool, centre))]
    key = torch.lerp(*keys, pooling.k_blend)
    value = module.heads(module.to_v(torch.lerp(one, pool, pooling.v_blend)))
    query = turned(module.heads(module.to_q(x)), angles(places()), module.half)
    return F.scaled_dot_product_attention(*(each.transpose(1, 2) for each in (query, key, value)))


KINDS = [Rotary, Halves, Written, Complex, Matrices, Products, InPlace]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "pooling", [Pooling("avg", 1.0, 0.0), Pooling("max", 0.3, 0.8), Pooling("avg", 0.0, 1.0)], ids=str
)
@pytest.mark.parametrize("level", [0, 1])
def test_keys_are_pooled_before_their_rotation(kind, pooling, level):
    module, x = kind(), torch.randn(BATCH, TOKENS, CHANNELS)
    inputs = (x, *module.factors(angles(places())))
    function, where = rewritten(module, inputs, pooling=pooling, level=level)
    assert torch.equal(function(KeyLayout(GRID)), module(*inputs))
    out = function(LAYOUT)
    if level == 0:
        assert where == RECOGNISED
        torch.testing.assert_close(out, expected(module, x, LAYOUT, pooling), atol=1e-5, rtol=1e-5)
    else:  # below the norm, with which a blend does not commute
        assert where == "below the projection, at the attention's values; keys rotated at the centre of their window"
        module.norm_k.eps = 1e9 if pooling.k_blend == 1 else None
        if pooling.k_blend == 1:  # all but linear
            scale = expected(module, x, LAYOUT, pooling)
            torch.testing.assert_close(function(LAYOUT), scale, atol=1e-4, rtol=1e-4)


def test_a_fused_projection_is_left_and_its_keys_are_pooled_below():
    module, x, pooling = Fused(), torch.randn(BATCH, TOKENS, CHANNELS), Pooling("avg", 1.0, 1.0)
    inputs = (x, *module.factors(angles(places())))
    function, where = rewritten(module, inputs)
    assert where == "below the projection; keys rotated at the centre of their window"
    assert torch.equal(function(KeyLayout(GRID)), module(*inputs))
    for each, part in zip((module.to_q, module.to_k, module.to_v), module.to_qkv.weight.chunk(3), strict=True):
        each.weight = nn.Parameter(part)
    for each, part in zip((module.to_q, module.to_k, module.to_v), module.to_qkv.bias.chunk(3), strict=True):
        each.bias = nn.Parameter(part)
    torch.testing.assert_close(function(LAYOUT), expected(module, x, LAYOUT, pooling), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [Gated, Joined])
def test_what_is_not_recognised_leaves_one_key_of_each_window_as_it_is(kind):
    module, x = kind(), torch.randn(BATCH, TOKENS, CHANNELS)
    inputs = (x, *module.factors(angles(places())))
    function, where = rewritten(module, inputs)
    assert where.endswith("keys: one in each window (their rotation is not recognised)")
    assert torch.equal(function(KeyLayout(GRID)), module(*inputs))
    factors = [each[None, :, None] for each in inputs[1:]]
    key = Rotary.rotate(module, module.key(x), *inputs[1:]) * (factors[0] if kind is Gated else 1)
    query = Rotary.rotate(module, module.heads(module.to_q(x)), *inputs[1:]) * (factors[0] if kind is Gated else 1)
    key = key.unflatten(1, GRID)[:, ::2, ::3].flatten(1, 2)
    value = module.heads(module.to_v(reduce_tokens(x, LAYOUT, Pooling("avg", 1.0, 1.0))[0]))
    correct = F.scaled_dot_product_attention(*(each.transpose(1, 2) for each in (query, key, value)))
    torch.testing.assert_close(function(LAYOUT), correct, atol=1e-5, rtol=1e-5)


class Joint(Rotary):
    """Text in front, with keys of its own, rotated with the image or not; a mask of padding, or none."""

    def __init__(self, rotate_text=True, causal=False):
        super().__init__()
        self.rotate_text, self.causal = rotate_text, causal
        self.add_q, self.add_k, self.add_v = (nn.Linear(CHANNELS, CHANNELS) for _ in range(3))

    def forward(self, x, text, cos, sin, mask=None):
        query, key, value = self.heads(self.to_q(x)), self.key(x), self.heads(self.to_v(x))
        if not self.rotate_text:
            query, key = self.rotate(query, cos, sin), self.rotate(key, cos, sin)
        added = (self.heads(each(text)) for each in (self.add_q, self.add_k, self.add_v))
        query, key, value = (torch.cat(both, 1) for both in zip(added, (query, key, value), strict=True))
        if self.rotate_text:
            query, key = self.rotate(query, cos, sin), self.rotate(key, cos, sin)
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=self.causal)


@pytest.mark.parametrize("rotate_text", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("pooling", [Pooling("avg", 1.0, 1.0), Pooling("avg", 0.3, 0.0)], ids=str)
def test_text_stays_whole(rotate_text, masked, pooling):
    module = Joint(rotate_text)
    x, text = torch.randn(BATCH, TOKENS, CHANNELS), torch.randn(BATCH, TEXT, CHANNELS)
    everywhere = torch.cat([torch.tensor([[0.7, 0.1]]).expand(TEXT, 2), places()]) if rotate_text else places()
    inputs = [x, text, *module.factors(angles(everywhere))]
    mask = (torch.rand(BATCH, 1, 1, TEXT + TOKENS) < 0.7) if masked else None
    inputs += [mask] if masked else []
    function, where = rewritten(module, tuple(inputs), Place(TEXT, alone=False), pooling)
    assert where == RECOGNISED
    assert torch.equal(function(KeyLayout(GRID)), module(*inputs))

    centre, first = centres(LAYOUT)
    one, pool = reduce_tokens(x, LAYOUT, pooling._replace(k_blend=0.0, v_blend=1.0))
    key = torch.lerp(
        *(turned(module.key(k), angles(at), False) for k, at in ((one, first), (pool, centre))), pooling.k_blend
    )
    texts = [module.heads(each(text)) for each in (module.add_q, module.add_k, module.add_v)]
    if rotate_text:
        texts[:2] = (turned(each, angles(everywhere[:TEXT]), False) for each in texts[:2])
    query = turned(module.heads(module.to_q(x)), angles(places()), False)
    value = module.heads(module.to_v(torch.lerp(one, pool, pooling.v_blend)))
    query, key, value = (torch.cat(both, 1).transpose(1, 2) for both in zip(texts, (query, key, value), strict=True))
    if masked:
        image = mask[..., TEXT:].float().view(BATCH, 1, *GRID)
        seen = F.max_pool2d(F.pad(image, (0, 2, 0, 1)), (2, 3)).flatten(2)[:, :, None] > 0
        mask = torch.cat([mask[..., :TEXT], seen], -1)
    correct = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(function(LAYOUT), correct, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tile", [False, True])
def test_a_causal_host_stays_so(tile):
    module, place = Joint(causal=True), Place(TEXT, alone=False)
    x, text = torch.randn(BATCH, TOKENS, CHANNELS), torch.randn(BATCH, TEXT, CHANNELS)
    inputs = (x, text, *module.factors(torch.zeros(TEXT + TOKENS, PAIRS)))
    function, _ = rewritten(module, inputs, place, Pooling("avg", 0.0, 0.0), tile=tile)
    assert torch.equal(function(KeyLayout(GRID)), module(*inputs))
    if tile:
        function(KeyLayout(GRID, window=(2, 1), tile=(5, 7)))  # one tile of everything
    out = function(KeyLayout(GRID, window=(2, 1), tile=(5, 7)) if tile else KeyLayout(GRID, window=(2, 1)))
    kept = torch.cat([torch.arange(TEXT), TEXT + torch.arange(TOKENS).view(GRID)[::2].flatten()])
    tensors = [
        torch.cat([module.heads(add(text)), each], 1).transpose(1, 2)
        for add, each in (
            (module.add_q, module.heads(module.to_q(x))),
            (module.add_k, module.key(x)),
            (module.add_v, module.heads(module.to_v(x))),
        )
    ]
    causal = torch.ones(TEXT + TOKENS, TEXT + TOKENS, dtype=torch.bool).tril()[:, kept]
    query, key, value = tensors
    correct = F.scaled_dot_product_attention(query, key[:, :, kept], value[:, :, kept], attn_mask=causal)
    torch.testing.assert_close(out, correct, atol=1e-5, rtol=1e-5)


def test_one_full_graph_for_a_joint_tiled_rotated_and_masked_site():
    module, place = Joint(), Place(TEXT, alone=False)
    inputs = [torch.randn(BATCH, TOKENS, CHANNELS), torch.randn(BATCH, TEXT, CHANNELS)]
    inputs += module.factors(torch.randn(TEXT + TOKENS, PAIRS))
    inputs.append(torch.rand(BATCH, 1, 1, TEXT + TOKENS) < 0.7)
    function, _ = rewritten(module, tuple(inputs), place, Pooling("avg", 0.3, 1.0), tile=True)
    torch._dynamo.reset()
    assert torch.equal(function(KeyLayout(GRID)), module(*inputs))
    with torch.no_grad():
        expected = function(TILED)
        compiled = torch.compile(lambda: function(TILED), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(), expected)


def test_a_site_of_another_size_is_named():
    reduction = KeyValueReduction("blocks.3", Pooling(), LAYOUT, Place(TEXT, alone=False))
    with pytest.raises(SlothError, match=r"blocks\.3: 30 tokens do not fit a grid of 5 x 7"):
        reduction(torch.randn(BATCH, 30, CHANNELS))
    assert not reduction.state_dict()
