"""Guidance by perturbed attention, against two calls of the unpatched model by brute force, in float64."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import sloth_fx
from sloth_fx import PAG, SEG, SLG, TPG, Perturb, SlothError
from sloth_fx.passes.perturb import PerturbedAttention
from tests import models
from tests.perturbed_by_hand import (
    attend,
    exchanged,
    itself,
    itself_and_others,
    mean_queries,
    operations,
    rows_of,
    two_calls,
)

BATCH, SCALE = 4, 1.7
ROWS = ("uncond", "cond")
COND = [2, 3]
TEXT = 5


class Block(nn.Module):
    """As in DiT and SD3: packed projections, modulation by time; with ``joint`` the text goes along."""

    def __init__(self, dim=12, heads=2, joint=False):
        super().__init__()
        self.heads, self.joint = heads, joint
        self.modulation = nn.Linear(dim, 6 * dim)
        self.norm, self.norm2 = (nn.LayerNorm(dim, elementwise_affine=False) for _ in range(2))
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.text_qkv, self.text_proj = (nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)) if joint else (None, None)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x, text, time):
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(F.silu(time))[:, None].chunk(6, dim=-1)
        b, n, c = x.shape
        qkv = self.qkv(self.norm(x) * (1 + scale) + shift)
        if self.joint:
            qkv = torch.cat([self.text_qkv(self.norm(text)), qkv], dim=1)
        q, k, v = qkv.reshape(b, -1, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, -1, c)
        if self.joint:
            text, out = text + self.text_proj(out[:, :-n]), out[:, -n:]
        x = x + gate * self.proj(out)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2), text


class DiT(nn.Module):
    def __init__(self, joint=False, depth=5, dim=12):
        super().__init__()
        self.embed, self.context = nn.Conv2d(4, dim, 2, stride=2), nn.Linear(8, dim)
        self.time = nn.Sequential(nn.Linear(1, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.blocks = nn.ModuleList(Block(dim, joint=joint) for _ in range(depth))
        self.out = nn.Linear(dim, 16)

    def forward(self, latent, timestep, context):
        b, _, h, w = latent.shape
        x, text = self.embed(latent).flatten(2).transpose(1, 2), self.context(context)
        time = self.time(timestep.to(latent.dtype).expand(b)[:, None] / 1000) + text.mean(1)
        for block in self.blocks:
            x, text = block(x, text, time)
        x = self.out(x).reshape(b, h // 2, w // 2, 4, 2, 2)
        return torch.einsum("bhwcij->bchiwj", x).reshape(b, 4, h, w)


def dit(joint=False):
    torch.manual_seed(0)
    model = DiT(joint)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2.5)
    return model.double().eval()


def dit_inputs(batch=BATCH, rows=10, columns=14):
    random, shapes = torch.Generator().manual_seed(3), ((batch, 4, rows, columns), (batch, TEXT, 8))
    latent, context = (torch.randn(shape, generator=random).double() for shape in shapes)
    return {"latent": latent, "timestep": torch.tensor(321.0), "context": context}


def unet_inputs(model, batch=BATCH):
    return models.cast(models.inputs(model, batch=batch, timestep=torch.tensor(500)), torch.float64)


def run(model, call):
    found = model(**call)
    return found if isinstance(found, torch.Tensor) else found.sample


def patched(model, spec, inputs, rows=ROWS, progress=0.0, **options):
    found = sloth_fx.transform(model, spec, example_inputs=inputs, **options)
    context = sloth_fx.context(found)
    context.at(progress)
    context.rows = rows
    return found, context


def guided(prediction, perturbed, scale=SCALE, rows=COND):
    """The difference goes to all groups of the batch, each image its own."""
    change = scale * (prediction[rows] - perturbed)
    return prediction + change.repeat(len(prediction) // len(rows), 1, 1, 1)


@pytest.fixture(scope="module")
def unet():
    return copy.deepcopy(models.shared("sd15")).double()


MIDDLE = (6,)  # of the 20 attentions of that UNet
UNETS = {"sd15": (6,), "sdxl": (8, 10)}


@pytest.mark.parametrize("name", UNETS)
def test_the_middle_block_of_a_unet(name):
    model = copy.deepcopy(models.shared(name)).double()
    call = unet_inputs(model)
    found, _ = patched(model, PAG(scale=SCALE), unet_inputs(model, 2))
    acting = [site for site in sloth_fx.report(found) if site.operators]
    assert {site.stage for site in acting} == {"middle"}
    assert all("computed once" in site.note for site in acting)
    expected = two_calls(model, call, _numbers(found), itself, batch=BATCH, rows=COND, run=run)
    with torch.no_grad():
        result = run(found, call)
    torch.testing.assert_close(result, guided(*expected))
    assert (result - expected[0]).abs().max() > 0.01
    w = 4.0  # classifier-free guidance outside gives the published formula
    u, c, p = expected[0][:2], expected[0][2:], expected[1]
    torch.testing.assert_close(result[:2] + w * (result[2:] - result[:2]), u + w * (c - u) + SCALE * (c - p))


def _numbers(found):
    return [number for number, site in enumerate(sloth_fx.report(found)) if site.operators]


def test_all_rows_guided_and_guidance_that_comes_after(unet):
    call = unet_inputs(unet)
    found, context = patched(unet, PAG(scale=SCALE), unet_inputs(unet, 2), ("cond",))
    expected = two_calls(unet, call, MIDDLE, itself, batch=BATCH, rows=range(BATCH), run=run)
    with torch.no_grad():
        torch.testing.assert_close(run(found, call), guided(*expected, rows=[0, 1, 2, 3]))
        context.guidance_scale = 5.0
        torch.testing.assert_close(run(found, call), guided(*expected, SCALE / 5, rows=[0, 1, 2, 3]))
        one = rows_of(call, BATCH, [1])
        both = two_calls(unet, one, MIDDLE, itself, batch=1, rows=[0], run=run)
        torch.testing.assert_close(run(found, one), guided(*both, SCALE / 5, rows=[0]))


def _blur(query, key, value, attn_mask=None, **options):
    """Each query, over a grid of 2 x 3, by a kernel of 3, reflected."""
    weight = torch.exp(-0.5 * (torch.tensor([1.0, 0.0, 1.0]).double() / 0.4) ** 2)
    weight = weight / weight.sum()
    grid = query.unflatten(2, (2, 3)).flatten(0, 1).permute(0, 3, 1, 2)
    grid = F.pad(grid, (1, 1, 1, 1), mode="reflect")
    rows = sum(w * grid[:, :, i : i + 2] for i, w in enumerate(weight))
    blurred = sum(w * rows[..., i : i + 3] for i, w in enumerate(weight))
    return attend(blurred.permute(0, 2, 3, 1).reshape(query.shape), key, value)


SPECS = {
    "SEG": (SEG(scale=SCALE), mean_queries()),
    "SEG of 0.4": (SEG(scale=SCALE, blur_sigma=0.4), _blur),
    "a function": (Perturb(lambda q, k, v: v.flip(2), scale=SCALE), lambda q, k, v, **_: v.flip(2)),
    "changed keys": (Perturb(lambda q, k, v: (q, -k, v), scale=SCALE), lambda q, k, v, **_: attend(q, -k, v)),
}


@pytest.mark.parametrize("name", SPECS)
def test_other_perturbations(unet, name):
    spec, attention = SPECS[name]
    call = unet_inputs(unet)
    found, _ = patched(unet, spec, unet_inputs(unet, 2))
    expected = two_calls(unet, call, MIDDLE, attention, batch=BATCH, rows=COND, run=run)
    with torch.no_grad():
        torch.testing.assert_close(run(found, call), guided(*expected))


def test_shuffled_tokens(unet):
    """Which order it is nobody says; it is one, another at another moment, and the same when a run comes back."""
    call = unet_inputs(unet)
    found, context = patched(unet, TPG(scale=SCALE, where="middle"), unet_inputs(unet, 2), progress=0.25)
    with torch.no_grad():
        result = run(found, call)
        context.at(0.5)
        other = run(found, call)
        context.at(0.25)
        torch.testing.assert_close(run(found, call), result, rtol=0, atol=0)
    assert (result - other).abs().max() > 1e-4
    context.at(0.25)
    site = unet_site(found)
    site.asks = "perturbed"
    whose = 50 * torch.eye(6).double()[None, None].expand(1, 2, 6, 6)  # each reads itself, and says who it is
    order = site(whose, whose, whose)[0, 0].argmax(-1)
    site.asks = "plain"
    assert order.sort().values.tolist() == list(range(6))
    assert order.tolist() != list(range(6))
    expected = two_calls(
        unet, call, MIDDLE, lambda q, k, v, **_: attend(q, k, v)[:, :, order], batch=BATCH, rows=COND, run=run
    )
    torch.testing.assert_close(result, guided(*expected))


def unet_site(model):
    return next(module for module in model.modules() if isinstance(module, PerturbedAttention))


def test_rescale(unet):
    call = unet_inputs(unet)
    found, _ = patched(unet, PAG(scale=SCALE, rescale=0.6), unet_inputs(unet, 2), ("cond",))
    p, q = two_calls(unet, call, MIDDLE, itself, batch=BATCH, rows=range(BATCH), run=run)
    g = p + SCALE * (p - q)
    factor = (p.flatten(1).std(1) / g.flatten(1).std(1)).view(-1, 1, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(run(found, call), g * (0.6 * factor + 0.4))


@pytest.mark.parametrize("joint", [False, True], ids=["self", "joint"])
@pytest.mark.parametrize("spec", [PAG(scale=SCALE), SEG(scale=SCALE)], ids=["PAG", "SEG"])
def test_a_stack_of_blocks(joint, spec):
    """The middle one of five; in joint attention the text sees all, and the image itself and the text."""
    model, call = dit(joint), dit_inputs()
    found, _ = patched(model, spec, dit_inputs(2))
    notes = [site.note for site in sloth_fx.report(found)]
    assert ["in the middle of 5 blocks" in note for note in notes] == [False, False, True, False, False]
    assert "computed once" in notes[2]
    first = TEXT if joint else 0
    attention = mean_queries(first) if isinstance(spec, SEG) else itself_and_others(TEXT, 35) if joint else itself
    expected = two_calls(model, call, (2,), attention, batch=BATCH, rows=COND, run=run)
    with torch.no_grad():
        result = run(found, call)
    torch.testing.assert_close(result, guided(*expected))
    assert (result - expected[0]).abs().max() > 0.01


@pytest.mark.parametrize("joint", [False, True], ids=["self", "joint"])
def test_skipped_blocks(joint):
    """What the model would give without them."""
    model, call = dit(joint), dit_inputs()
    found, context = patched(model, SLG(layers=[1, "blocks.3"], scale=SCALE), dit_inputs(2), progress=0.1)
    assert [bool(site.operators) for site in sloth_fx.report(found)] == [False, True, False, True, False]
    assert "computed once" in sloth_fx.report(found).sites[1].note
    without = copy.deepcopy(model)
    without.blocks = nn.ModuleList(block for number, block in enumerate(model.blocks) if number not in (1, 3))
    with torch.no_grad():
        expected = run(model, call), run(without, rows_of(call, BATCH, COND))
        torch.testing.assert_close(run(found, call), guided(*expected))
        context.at(0.5)
        assert torch.equal(run(found, call), expected[0])


def test_skipped_blocks_of_a_unet(unet):
    call, path = unet_inputs(unet), "up_blocks.1.attentions.1.transformer_blocks.0"
    without = copy.deepcopy(unet)
    without.get_submodule(path).forward = lambda hidden_states, *_, **__: hidden_states
    with torch.no_grad():
        expected = run(unet, call), run(without, rows_of(call, BATCH, COND))
        for layer in (path, _order(unet, call).index(path)):
            found, _ = patched(unet, SLG(layers=[layer], scale=SCALE), unet_inputs(unet, 2), progress=0.1)
            torch.testing.assert_close(run(found, call), guided(*expected))
    assert (expected[0][COND] - expected[1]).abs().max() > 1e-3


def _order(model, call):
    """The transformer blocks in the order in which they run."""
    seen, hooks = [], []
    for name, module in model.named_modules():
        if name.endswith("transformer_blocks.0"):
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: seen.append(name)))
    run(model, call)
    for hook in hooks:
        hook.remove()
    return seen


# What it costs


def after(model, call, site, attention=itself):
    """Operations of a call for the guided rows, after an attention."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        before = []

        def watched(*args, **kwargs):
            before.append(counter.get_total_flops())
            return attention(*args, **kwargs)

        with exchanged((site,), watched):
            run(model, rows_of(call, BATCH, COND))
        return counter.get_total_flops() - before[0]


def test_a_unet_pays_for_what_comes_after_its_middle(unet):
    call = unet_inputs(unet)
    found, context = patched(unet, PAG(scale=SCALE), unet_inputs(unet, 2))
    extra = operations(lambda: run(found, call)) - operations(lambda: run(unet, call))
    expected = after(unet, call, 6)
    assert 0.9 * expected < extra <= expected  # keys and values of the text, and embeddings of time, are there already
    assert extra < 0.38 * operations(lambda: run(unet, call))
    context.rows = ("uncond", "uncond")
    assert operations(lambda: run(found, call)) == operations(lambda: run(unet, call))


@pytest.mark.parametrize("joint", [False, True], ids=["self", "joint"])
def test_a_stack_pays_for_the_blocks_that_remain(joint):
    model, call = dit(joint), dit_inputs()
    found, _ = patched(model, PAG(scale=SCALE), dit_inputs(2))
    extra = operations(lambda: run(found, call)) - operations(lambda: run(model, call))
    expected = after(model, call, 2)
    assert 0.9 * expected < extra <= (1.1 if joint else 1.0) * expected  # in joint attention tokens do read the text
    skipping, _ = patched(model, SLG(layers=[1, 3], scale=SCALE), dit_inputs(2), progress=0.1)
    extra = operations(lambda: run(skipping, call)) - operations(lambda: run(model, call))
    whole = operations(lambda: run(model, rows_of(call, BATCH, COND)))
    assert extra < 0.45 * whole  # of five blocks two remain, and the last layer


def test_steps_where_nothing_acts_cost_nothing_and_are_the_same_to_the_bit(unet):
    call = unet_inputs(unet)
    found, context = patched(unet, PAG(scale=SCALE, start=0.25, stop=0.5), unet_inputs(unet, 2))
    with torch.no_grad():
        plain = run(unet, call)
        for progress, acts in ((0.0, False), (0.25, True), (0.4, True), (0.5, False), (1.0, False)):
            context.at(progress)
            assert torch.equal(run(found, call), plain) is not acts
    for steps, expected in ((1, [0]), (4, [1]), (8, [2, 3]), (50, [*range(13, 25)])):
        acting = []
        for step in range(steps):
            context.step(step, steps)
            if context.layouts()[0].perturbed:
                acting.append(step)
        assert acting == expected


# Bad input


def test_what_cannot_be(unet):
    call = unet_inputs(unet, 2)
    for spec, message in (
        ([PAG(), SEG()], "PAG and SEG: each is a perturbed prediction of its own"),
        (PAG(where="cross"), "PAG acts on self-attention and joint attention"),
        (PAG(where="mid_blck*"), "nearest: middle, mid_block"),
        (SLG(layers=[99]), "block 99 does not exist: it has blocks 0 to 9"),
        (SLG(layers=["mid_block.attentions.0.transformer_block.0"]), "is unknown, nearest: "),
    ):
        with pytest.raises(SlothError, match=message):
            sloth_fx.transform(unet, spec, example_inputs=call)
    found, context = patched(unet, PAG(), call, ("uncond", "cond"))
    with pytest.raises(SlothError, match="cannot be divided into 2 groups"):
        run(found, unet_inputs(unet, 3))
    context.halves = 3
    with pytest.raises(SlothError, match="the batch holds 3 groups"):
        run(found, unet_inputs(unet, 3))
    with pytest.raises(SlothError, match="guidance_scale=nan"):
        context.guidance_scale = math.nan


def test_a_model_without_self_attention():
    class CrossOnly(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(4, 4), nn.Linear(8, 4)

        def forward(self, latent, timestep, context):
            x, keys = self.q(latent.flatten(2).mT)[:, None], self.k(context)[:, None]
            return F.scaled_dot_product_attention(x, keys, keys)[:, 0].mT.reshape(latent.shape)

    with pytest.raises(SlothError, match=r"this model has none \(it has: cross\)"):
        sloth_fx.transform(CrossOnly().double(), PAG(), example_inputs=dit_inputs(2))
