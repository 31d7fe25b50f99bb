"""Guidance by perturbed attention with all else: hosts that do not share, other specs, torch.compile, copies."""

import copy
import math
import warnings

import pytest
import torch
import torch._dynamo.utils as dynamo
import torch.nn.functional as F

import sloth_fx
from sloth_fx import (
    NAG,
    PAG,
    SAG,
    SEG,
    SLG,
    TPG,
    NearSightedTile,
    Perturb,
    SlothError,
    SlothfulAttention,
    TokenDownsample,
    TokenMerging,
)
from sloth_fx.capture.objects import HandedOn
from sloth_fx.perturbed import Perturbed
from tests import foreign, models
from tests.perturbed_by_hand import attend, itself, operations, rows_of, two_calls
from tests.test_perturbed import BATCH, COND, ROWS, SCALE, dit, dit_inputs, guided, patched, run, unet_inputs

MIDDLE = 6


@pytest.fixture(scope="module")
def unet():
    return copy.deepcopy(models.shared("sd15")).double()


def call_of_its_own(model):
    """From now on the model is called twice."""
    next(module for module in model.modules() if isinstance(module, Perturbed)).shares = False


class Watched(foreign.LatentUNet):
    """Looks at what it returns."""

    def forward(self, x, timesteps, context):
        out = super().forward(x, timesteps, context)
        assert math.isfinite(out.sum().item())
        return out


@pytest.mark.parametrize(
    ("host", "way", "times"),
    [(foreign.LatentUNet, "what lies before it is computed once", 1.26), (Watched, "a call of its own: ", 1.5)],
)
def test_a_host_is_called_once_or_twice(host, way, times):
    """With einops. The heads are folded into the batch there, and the attention is written out."""
    torch.manual_seed(0)
    model, random = host().eval(), torch.Generator().manual_seed(1)
    inputs = [torch.randn(BATCH, *shape, generator=random) for shape in ((4, 10, 14), (7, 24))]
    call = {"x": inputs[0], "timesteps": torch.full((BATCH,), 300), "context": inputs[1]}
    found, context = patched(model, PAG(scale=SCALE), rows_of(call, BATCH, [0, 1]))
    assert way in next(site.note for site in sloth_fx.report(found) if site.operators)
    changed = copy.deepcopy(model)
    own = changed.middle_attn.attn1
    own.forward = lambda x: own.to_out(own.to_v(x))
    with torch.no_grad():
        expected = model(**call), changed(**rows_of(call, BATCH, COND))
        torch.testing.assert_close(found(**call), guided(*expected))
        assert operations(lambda: found(**call)) / operations(lambda: model(**call)) == pytest.approx(times, abs=0.02)
        context.rows = ("cond",)
        expected = model(**call), changed(**call)
        torch.testing.assert_close(found(**call), guided(*expected, rows=[0, 1, 2, 3]))


@pytest.mark.parametrize("spec", [PAG(scale=SCALE), SEG(scale=SCALE), TPG(scale=SCALE), SLG(layers=[1], stop=1.0)])
def test_both_ways_agree(spec):
    model, call = dit(joint=True), dit_inputs()
    found, _ = patched(model, spec, dit_inputs(2), progress=0.3)
    with torch.no_grad():
        shared = run(found, call)
        call_of_its_own(found)
        torch.testing.assert_close(run(found, call), shared)


OTHERS = {
    "reduced": SlothfulAttention(),
    "reduced, at the middle as well": SlothfulAttention(keep_middle=False),
    "thinned out": TokenDownsample(factors=(2, 2)),
    "in tiles": NearSightedTile(tile_size=4, max_depth=8, where=lambda site: site.stage != "middle"),
    "merged": TokenMerging(max_depth=2),
    "a negative text": NAG(scale=3.0),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_specs(unet, name):
    """Each is what it is alone; the perturbed prediction is of the model with the other spec."""
    other, call = OTHERS[name], unet_inputs(unet)
    text = torch.randn(1, 7, 24, generator=torch.Generator().manual_seed(3)).double()

    def made(specs):
        model, context = patched(unet, specs, unet_inputs(unet, 2), progress=0.35)
        context.at(0.35, sigma=3.0)
        if isinstance(other, NAG):
            context.set_negative(encoder_hidden_states=text)
        return model

    alone, one, two = made([other]), made([other, PAG(scale=SCALE)]), made([other, PAG(scale=2 * SCALE)])
    assert all("computed once" in site.note for site in sloth_fx.report(one) if "PAG" in site.operators)
    with torch.no_grad():
        base, first, second = (run(model, call) for model in (alone, one, two))
        if name != "reduced, at the middle as well":
            torch.testing.assert_close(second - base, 2 * (first - base))
        else:
            assert "without SlothfulAttention" in next(s.note for s in sloth_fx.report(one) if "PAG" in s.operators)
        assert (first - base).abs().max() > 0.01
        assert (base - run(unet, call)).abs().max() > 0.01
        call_of_its_own(one)
        torch.testing.assert_close(run(one, call), first)


def test_what_does_not_go_together(unet):
    call = unet_inputs(unet, 2)
    for other, message in (
        (NearSightedTile(concat_local=True), "images attend to each other"),
        (TokenMerging(where="middle", max_depth=3), "acts on no site but those that PAG perturbs"),
    ):
        with pytest.raises(SlothError, match=message):
            sloth_fx.transform(unet, [PAG(), other], example_inputs=call)


@pytest.mark.parametrize("spec", [PAG(adaptive=0.001), TPG(where="middle"), SLG(layers=[2], start=0.0)], ids=str)
@pytest.mark.parametrize("way", ["shared", "a call of its own"])
def test_compiled_it_is_one_graph_for_all_steps(spec, way):
    torch._dynamo.reset()
    dynamo.counters.clear()
    model, call = dit(joint=True), dit_inputs()
    found, context = patched(model, copy.copy(spec), dit_inputs(2))
    if way != "shared":
        call_of_its_own(found)
    compiled = torch.compile(found, fullgraph=True, backend="eager", dynamic=False)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for progress in (0.0, 0.05, 0.1, 0.15):
            context.at(progress)
            torch.testing.assert_close(run(compiled, call), run(found, call))
    assert not dynamo.counters["graph_break"]
    assert dynamo.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_compiled_unet_has_a_graph_with_and_one_without():
    torch._dynamo.reset()
    dynamo.counters.clear()
    model = models.shared("two_levels")
    call = models.inputs(model, batch=BATCH, timestep=torch.tensor(500))
    found, context = patched(model, PAG(scale=SCALE, stop=0.5), models.inputs(model, timestep=torch.tensor(500)))
    compiled = torch.compile(found, fullgraph=True, backend="eager", dynamic=False)
    with torch.no_grad():
        for step in range(4):
            context.step(step, 4)
            torch.testing.assert_close(run(compiled, call), run(found, call), atol=1e-4, rtol=1e-4)
    assert dynamo.counters["stats"]["unique_graphs"] == 2
    torch._dynamo.reset()


def test_the_original_is_untouched_and_copies_are_apart(unet):
    model = copy.deepcopy(unet)
    before = models.state_of(model)
    found, _ = patched(model, PAG(scale=SCALE), unet_inputs(unet, 2))
    assert models.state_of(model) == before
    assert list(found.state_dict()) == list(model.state_dict())
    call = unet_inputs(unet)
    with torch.no_grad():
        result = run(found, call)
        other = copy.deepcopy(found)
        sloth_fx.context(other).rows = ("uncond", "uncond")
        assert torch.equal(run(other, call), run(unet, call))
        torch.testing.assert_close(run(found, call), result)


def test_located_at_the_first_call(unet):
    call = unet_inputs(unet)
    found = sloth_fx.transform(unet, PAG(scale=SCALE), example_inputs="first call")
    sloth_fx.context(found).rows = ROWS
    expected = two_calls(unet, call, (MIDDLE,), itself, batch=BATCH, rows=COND, run=run)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(run(found, call), guided(*expected))


def test_masked_joint_attention():
    """Text that is masked is seen by nobody, whoever is perturbed."""

    class Masked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = torch.nn.Conv2d(4, 12, 2, stride=2), torch.nn.Linear(12, 4)
            self.context = torch.nn.Linear(8, 12)

        def forward(self, latent, timestep, context, mask):
            b, _, h, w = latent.shape
            tokens = self.embed(latent).flatten(2).transpose(1, 2)
            both = torch.cat([tokens, self.context(context)], 1)
            q = both.unflatten(2, (2, 6)).transpose(1, 2)
            seen = F.pad(mask, (tokens.shape[1], 0), value=True)[:, None, None]
            read = F.scaled_dot_product_attention(3 * q, q, q, attn_mask=seen).transpose(1, 2).flatten(2)
            x = self.out(tokens + read[:, : tokens.shape[1]] + read[:, tokens.shape[1] :].mean(1, keepdim=True))
            return F.interpolate(x.transpose(1, 2).reshape(b, 4, h // 2, w // 2), size=(h, w))

    torch.manual_seed(0)
    model, call = Masked().double().eval(), dit_inputs()
    call["mask"] = torch.arange(5)[None] < torch.tensor([[5], [4], [3], [2]])

    def by_hand(query, key, value, attn_mask=None):
        sees = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool)
        sees[:35, :35] = torch.eye(35, dtype=torch.bool)
        return attend(query, key, value, sees & attn_mask)

    found, _ = patched(model, PAG(scale=SCALE, where=None), call)
    assert "computed once" in sloth_fx.report(found).sites[0].note
    expected = two_calls(model, call, (0,), by_hand, batch=BATCH, rows=COND, run=run)
    with torch.no_grad():
        torch.testing.assert_close(run(found, call), guided(*expected))


class Writing(torch.nn.Module):
    """A host that writes its residuals: under both names of them, or into a part that it still reads as a whole."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.embed, self.out = torch.nn.Conv2d(4, 12, 1), torch.nn.Conv2d(12, 4, 1)
        self.qkv = torch.nn.ModuleList(torch.nn.Linear(12, 36) for _ in range(2))

    def forward(self, latent, timestep):
        x = self.embed(latent).flatten(2).mT.contiguous()
        for layer in self.qkv:
            q, k, v = (each.unflatten(2, (2, 6)).transpose(1, 2) for each in layer(x).chunk(3, -1))
            read = F.scaled_dot_product_attention(2 * q, k, v).transpose(1, 2).flatten(2)
            if self.way == "names":
                r = x
                x += read
                x = x + r
            else:
                part, _ = x.chunk(2, dim=-1)
                part += read[..., :6]
        return self.out(x.mT.unflatten(2, latent.shape[2:]))


def writing_call(batch=BATCH):
    random = torch.Generator().manual_seed(2)
    return {"latent": torch.randn(batch, 4, 5, 7, generator=random).double(), "timestep": torch.tensor(500.0)}


@pytest.mark.parametrize("way", ["names", "part"])
def test_hosts_that_write_in_place(way):
    torch.manual_seed(0)
    model, call = Writing(way).double().eval(), writing_call()
    found, _ = patched(model, PAG(scale=SCALE, where=lambda site: site.path == ""), writing_call(2))
    note = sloth_fx.report(found).sites[0].note
    assert ("computed once" if way == "names" else "a call of its own: ") in note
    expected = two_calls(model, call, (0, 1), itself, batch=BATCH, rows=COND, run=run)
    with torch.no_grad():
        result = run(found, call)
    torch.testing.assert_close(result, guided(*expected))
    assert (result - expected[0]).abs().max() > 0.01


@pytest.mark.parametrize("rows", [("uncond", "cond"), ("cond",)])
def test_rescaled_guidance_that_comes_after(rows):
    """One call with both texts, or one for each: the same comes out of classifier-free guidance."""
    model, call = dit(), dit_inputs()
    found, context = patched(model, PAG(scale=SCALE, rescale=0.7), dit_inputs(2), rows)
    with torch.no_grad():
        whole, _ = patched(model, PAG(scale=SCALE, rescale=0.7), dit_inputs(2))
        u, c = run(whole, call).chunk(2)
        expected = u + 5 * (c - u)
        if rows == ("cond",):
            plain = run(model, call)[:2]
            context.guidance_scale = 5.0
            own = run(found, rows_of(call, BATCH, COND))
            torch.testing.assert_close(plain + 5 * (own - plain), expected)


def test_a_call_that_cannot_be_shared_after_all():
    """The example was of another kind: that is said, with what would work."""

    class Turning(Writing):
        def forward(self, latent, timestep, turned=False):
            return super().forward(latent.flip(0) if turned else latent, timestep)

    found, _ = patched(Turning("names").double(), PAG(scale=SCALE, where=None), writing_call(2))
    with pytest.raises(
        SlothError, match=r"Turning with PAG: this call, with a latent \(4, 4, 5, 7\), cannot serve both"
    ):
        found(**writing_call(), turned=True)


def test_what_cannot_be_perturbed_is_said_at_once(unet):
    wrong = Perturb(lambda q, k, v: v[:, :, :-1], scale=SCALE)
    with pytest.raises(SlothError, match=r"attn1: Perturb gives \(2, 2, \d+, 16\) for queries"):
        patched(unet, wrong, unet_inputs(unet, 2))

    class Pooled(Writing):
        def forward(self, latent, timestep):
            x = self.embed(latent)
            q, k, v = self.qkv[0](x.flatten(2).mT)[:, None].chunk(3, -1)
            k, v = k[:, :, ::2], v[:, :, ::2]
            return self.out(F.scaled_dot_product_attention(q, k, v)[:, 0].mT.unflatten(2, latent.shape[2:]))

    with pytest.raises(SlothError, match="35 queries meet 18 keys"):
        patched(Pooled("").double(), PAG(where=None), writing_call(2))


class Controlled(torch.nn.Module):
    """As in ComfyUI: it takes controls out of the lists that it is given, and options go by the groups of the batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = Writing("names")

    def forward(self, latent, timestep, control=None, options=None):
        if control is not None and control["middle"]:
            latent = latent + control["middle"].pop()
        if options:
            factors = (
                torch.tensor(options["factors"]).to(latent).repeat_interleave(len(latent) // len(options["factors"]))
            )
            latent = latent * factors.view(-1, 1, 1, 1)
        return self.inner(latent, timestep)


@pytest.mark.parametrize("spec", [PAG(scale=SCALE, where=None), SAG(scale=SCALE, where=None)], ids=["PAG", "SAG"])
def test_a_call_of_its_own_is_given_all_that_the_first_was(spec):
    plain, call = Controlled().double().eval(), writing_call()
    more = torch.randn(4, 4, 5, 7, generator=torch.Generator().manual_seed(4)).double()
    found, context = patched(plain, spec, writing_call(2))
    call_of_its_own(found)
    context.at(0.3, sigma=1.0)
    context.prediction = "epsilon"
    seen = []
    found.inner.embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        result = found(**call, control={"middle": [more]})
        torch.testing.assert_close(found(**call, control={"middle": [more] * 3}), result)
        seen = seen[:2]
    torch.testing.assert_close(seen[0], call["latent"] + more)
    if isinstance(spec, PAG):
        torch.testing.assert_close(seen[1], seen[0])
        same = found(**{**call, "latent": call["latent"] + more})
        torch.testing.assert_close(result, same)


@pytest.mark.parametrize("says", [False, True])
@pytest.mark.parametrize("spec", [PAG(scale=SCALE, where=None), SAG(scale=SCALE, where=None)], ids=["PAG", "SAG"])
def test_options_that_go_by_groups(spec, says):
    """Rows are picked only where the options say what they are then."""
    plain, call = Controlled().double().eval(), writing_call()
    found, context = patched(plain, spec, writing_call(2))
    call_of_its_own(found)
    context.at(0.3, sigma=1.0)
    context.prediction = "epsilon"
    factors = torch.tensor([1.0, 1.0, 0.5, 0.5]).double().view(-1, 1, 1, 1)
    options = HandedOn(factors=[1.0, 0.5])
    if says:
        options.of_groups = lambda groups: HandedOn(factors=[1.0] if groups[0] else [0.5])
    counts = []
    found.inner.embed.register_forward_pre_hook(lambda _, args: counts.append(len(args[0])))
    with torch.no_grad():
        result = found(**call, options=options)
        assert counts == ([4, 2] if says else [4, 4])
        if isinstance(spec, PAG):
            expected = found(**{**call, "latent": call["latent"] * factors})
            torch.testing.assert_close(result, expected)
        else:
            options.of_groups = None if says else lambda groups: HandedOn(factors=[1.0])
            torch.testing.assert_close(found(**call, options=options), result)
