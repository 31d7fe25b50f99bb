"""A model that nodes have patched: its moment, its rows, its weights, and other packs' patches."""

import gc
import itertools
import math
import weakref

import pytest
import torch
from torch import nn

import sloth_fx
from sloth_fx.bind import Variants
from sloth_fx.errors import SlothError
from sloth_fx.integrations.comfy import patching
from sloth_fx.integrations.comfy.patching import patch_model
from sloth_fx.integrations.comfy.sampling import Run, moment_of, prediction_of, sigma_of
from sloth_fx.model_adapters import ModelAdapter, adapter_for, registry
from sloth_fx.patch import patch_of
from sloth_fx.prediction import Prediction
from tests.integrations import comfy_host
from tests.integrations.comfy_host import (
    COLUMNS,
    CONST,
    EPS,
    NEGATIVE,
    POSITIVE,
    ROWS,
    SIGMAS,
    Angle,
    CFGGuider,
    Discrete,
    Edm,
    Flow,
    Joint,
    Novel,
    Preconditioned,
    call,
    conditioning,
    latents,
    patcher,
    sample,
    start,
)
from tests.two_branches import in_order, in_step, joint

TEXTS = NEGATIVE, POSITIVE
FULL = sloth_fx.SlothfulAttention(keep_middle=False)
NEUTRAL = sloth_fx.SlothfulAttention(in_=sloth_fx.Reduction(rate=1.0), out=sloth_fx.Reduction(rate=1.0))
TILE = sloth_fx.NearSightedTile(tile_size=5)
WEIGHT = "diffusion_model.output_blocks.1.1.transformer_blocks.0.attn1"


def model_of(patched):
    return patched.object_patches["diffusion_model"]


def context_of(patched):
    return patch_of(model_of(patched)).context


def at(sigma, sampling, sigmas=SIGMAS):
    return moment_of(sigma, sigmas.tolist(), sampling)


# Moments


@pytest.mark.parametrize("timestep", [999, 640, 3, 0])
def test_discrete_progress_is_that_of_the_original_nodes(timestep):
    sampling = Discrete()
    sigma = float(sampling.sigmas[timestep])
    moment = at(sigma, sampling)
    assert moment.progress == pytest.approx(1 - timestep / 1000)
    assert moment.sigma == sigma


@pytest.mark.parametrize("multiplier", [1000, 1])
def test_flow(multiplier):
    moment = at(0.8, Flow(multiplier), torch.tensor([1.0, 0.8, 0.3, 0.0]))
    assert moment.progress == pytest.approx(0.2)
    assert moment.sigma == pytest.approx(4.0)
    assert moment.step == pytest.approx((0.2, 0.7))
    assert at(1.0, Flow(multiplier), torch.tensor([1.0, 0.8, 0.0])).sigma == 1e300


def test_edm_counts_ln_sigma():
    low, high = math.log(0.002), math.log(80)
    assert at(3.0, Edm()).progress == pytest.approx((high - math.log(3.0)) / (high - low))
    assert at(80.0, Edm()).progress == pytest.approx(0, abs=1e-6)


def test_shares_of_a_run():
    assert at(2.0, Angle()).progress == pytest.approx(1 - math.atan(2.0) / (math.pi / 2))


def test_the_end_of_a_run():
    for sampling in (Discrete(), Flow(), Edm(), Angle()):
        assert at(0.0, sampling).progress == 1
        last = moment_of(float(SIGMAS[2]), None, sampling)
        assert last.step is None  # nobody knows it


def test_steps_fill_the_run():
    moments = [at(float(sigma), Discrete()) for sigma in SIGMAS[:-1]]
    assert moments[0].step[0] == 0
    assert moments[-1].step[1] == 1
    for one, following in itertools.pairwise(moments):
        assert one.step[1] == pytest.approx(following.progress)


def test_no_sigmas():
    with pytest.raises(SlothError, match='no "sigmas" in its transformer_options'):
        sigma_of({})


def test_the_sigmas_of_a_run_are_read_once(monkeypatch):
    """Each reading waits for the device."""
    run, read = Run(), []
    whole = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: read.append(len(self)) or whole(self))
    options = {"sample_sigmas": SIGMAS}
    assert [run.sigmas(options) for _ in range(3)] == [whole(SIGMAS)] * 3
    assert run.sigmas({"sample_sigmas": SIGMAS[1:]}) == whole(SIGMAS[1:])
    assert run.sigmas({}) is None
    assert read == [4, 3]


def test_a_call_is_what_a_driven_model_gives():
    """The numbers are those of a transform that ComfyUI has no part in, at the same moment."""
    base = patcher()
    patched = patch_model(base, [sloth_fx.SlothfulAttention.from_node(release="2023-12-11"), TILE])
    x, sigma = latents() * 3, 2.25
    inputs = {"x": x / math.sqrt(sigma**2 + 1), "context": NEGATIVE[0][0].expand(2, -1, -1)}
    timestep = base.model.model_sampling.timestep(torch.tensor([sigma])).float()
    inputs |= {"timesteps": timestep.expand(2), "transformer_options": {}}
    twin = sloth_fx.transform(base.model.diffusion_model, patch_of(model_of(patched)).specs, example_inputs=inputs)
    sloth_fx.context(twin).at(1 - float(timestep) / 1000, sigma=sigma)
    patched.load()
    with torch.no_grad():
        (found,) = call(patched, x, sigma, SIGMAS, groups=(1,))
        patched.unload()
        torch.testing.assert_close(found, twin(**inputs))
        assert (found - call(base, x, sigma, SIGMAS, groups=(1,))[0]).abs().max() > 1e-3


def test_schedule_follows_the_run():
    patched = patch_model(patcher(), [FULL])
    strides = []
    for sigma in (14.0, 2.0, 0.1):
        patched.load()
        call(patched, latents(), sigma, SIGMAS)
        strides.append([layout.kv_tokens() for layout in context_of(patched).layouts()])
        patched.unload()
    assert strides[1] < strides[0]  # PeakDecay: most at progress 0.4
    assert strides[1] < strides[2]


# Rows and the negative text


@pytest.mark.parametrize("groups", [(0, 1), (1, 0), (0,), (1,)])
def test_rows(groups):
    patched = patch_model(patcher(), [sloth_fx.NAG()], negative=conditioning(7, seed=5))
    patched.load()
    call(patched, latents(), 3.5, SIGMAS, groups)
    patched.unload()
    assert context_of(patched).rows == tuple(("cond", "uncond")[group] for group in groups)


def test_only_the_positive_is_guided():
    """Together in one batch, in whichever order, or one by one: the same; and without the negative only one differs."""
    base = patcher()
    patched = patch_model(base, [sloth_fx.NAG(scale=7.0, alpha=1.0)], negative=conditioning(7, seed=5))
    x = latents(3)

    def run(model, *groups):
        model.load()
        with torch.no_grad():
            found = dict(zip(groups, call(model, x, 3.5, SIGMAS, groups), strict=True))
        model.unload()
        return found

    plain, together, turned = run(base, 0, 1), run(patched, 0, 1), run(patched, 1, 0)
    alone = {**run(patched, 0), **run(patched, 1)}
    for group in (0, 1):
        torch.testing.assert_close(together[group], turned[group])
        torch.testing.assert_close(together[group], alone[group])
    torch.testing.assert_close(together[1], plain[1])
    assert (together[0] - plain[0]).abs().max() > 1e-2


@pytest.mark.parametrize("tokens", [3, 8])
def test_a_negative_of_another_length_in_joint_attention(tokens):
    """Equal to two calls by brute force, each with its own text, of which only the positive is guided."""
    base, negative, x = patcher(Joint()), conditioning(tokens, seed=5), latents()
    spec = sloth_fx.NAG(scale=7.0, alpha=0.6)
    patched = patch_model(base, [spec], negative=negative)

    def run(model, text):
        times = torch.full((len(text),), 3.5)
        with torch.no_grad():
            return model.apply_model(torch.cat([x, x]), times, text, {})

    texts = [torch.cat([each[0][0].expand(2, -1, -1) for each in pair]) for pair in (TEXTS, (negative, negative))]
    read = tuple(in_order([joint(text.shape[1], ROWS * COLUMNS)] * 2) for text in texts)
    expected = in_step(base.model, tuple(texts), spec, read, run=run, rows=(2, 3))
    patched.load()
    with torch.no_grad():
        found = torch.cat(call(patched, x, 3.5, SIGMAS, (1, 0)))
    patched.unload()
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (found - run(base.model, texts[0])).abs().max() > 1e-3


def test_two_patchers_of_one_model_have_negatives_of_their_own():
    base, spec = patcher(), sloth_fx.NAG(alpha=1.0)
    one, other = (patch_model(base, [spec], negative=conditioning(7, seed)) for seed in (5, 6))
    assert model_of(one) is model_of(other)
    first, second = sample(one), sample(other)
    assert (first - second).abs().max() > 1e-3
    assert torch.equal(sample(one), first)


def test_a_negative_of_the_wrong_size():
    patched = patch_model(patcher(), [sloth_fx.NAG()], negative=conditioning(channels=7))
    with pytest.raises(SlothError, match=r"negative context has shape \(1, 5, 7\), and that of this call"):
        sample(patched)


PERTURBING = {
    "PAG": sloth_fx.PAG(),
    "SEG": sloth_fx.SEG(),
    "TPG": sloth_fx.TPG(),
    "SLG": sloth_fx.SLG(layers=(1,), start=0.0, stop=1.0),
    "SAG": sloth_fx.SAG(),
}
SIGMA, SCALE = 3.5, 3.0


def predicted(model, *calls):
    """By group, what each of several calls predicts, which together are all there are."""
    model.load()
    with torch.no_grad():
        found = []
        for groups in calls:
            beside = [group for each in calls for group in each]
            found += zip(groups, call(model, latents(), SIGMA, SIGMAS, groups, beside), strict=True)
    model.unload()
    return found


def guided(found, scale=SCALE):
    """Classifier-free guidance by the mean of each text's predictions."""
    positive, negative = (torch.stack([each for group, each in found if group == text]).mean(0) for text in (0, 1))
    return negative + scale * (positive - negative)


@pytest.mark.parametrize("name", PERTURBING)
def test_perturbed_guidance_is_the_same_together_and_apart(name):
    """ComfyUI calls its model for all texts at once, or for one after the other where memory is short."""
    base = patcher()
    patched = patch_model(base, [PERTURBING[name]])
    plain = guided(predicted(base, (1, 0)))
    start(CFGGuider(patched, SCALE))
    together = guided(predicted(patched, (1, 0)))
    assert (together - plain).abs().max() > 1e-3
    for calls in [[(0, 1)], [(1,), (0,)], [(0, 0, 1)], [(0, 1), (0,)]]:
        torch.testing.assert_close(guided(predicted(patched, *calls)), together)


@pytest.mark.parametrize("name", PERTURBING)
def test_guidance_that_is_not_known(name):
    """One call with both texts gets what holds for any scale; where there are several, that would be wrong."""
    patched = patch_model(patcher(), [PERTURBING[name]])
    start(CFGGuider(patched, SCALE))
    expected = guided(predicted(patched, (1, 0)))
    other = type("Scheduled", (CFGGuider,), {"predict_noise": lambda self: None})(patched, SCALE)
    changed = patched.clone()
    changed.model_options["sampler_cfg_function"] = lambda args: args["cond"]
    for guider in (other, CFGGuider(changed, SCALE), CFGGuider(patched, 0.0)):
        start(guider)
        torch.testing.assert_close(guided(predicted(patched, (1, 0))), expected)
        with pytest.raises(SlothError, match=r"another kind than CFGGuider's, or with a cfg of 0.*has the rows uncond"):
            predicted(patched, (1,), (0,))
        predicted(patched, (0,))  # no negative, so there is no other guidance


def test_what_else_runs_in_a_call_for_two_predictions_gets_tensors(monkeypatch):
    """ComfyUI's kernels get the rows of both at once; Python of others runs in calls of its own, with rows it knows."""
    patched = patch_model(patcher(), [PERTURBING["PAG"]])
    assert "what lies before it is computed once" in str([site.note for site in patch_of(model_of(patched)).report])
    seen, attend = [], comfy_host.kernel

    def noted(query, *args, **kwargs):
        assert isinstance(query, torch.Tensor)
        seen.append(len(query))
        return attend(query, *args, **kwargs)

    monkeypatch.setattr(comfy_host, "kernel", noted)
    start(CFGGuider(patched, SCALE))
    expected = guided(predicted(patched, (1, 0)))
    assert seen == [4] * 3 + [6] * 5  # the middle's self-attention perturbs 2 of 4 rows
    seen.clear()
    patched.model_options["transformer_options"]["optimized_attention_override"] = lambda attend, *args, **kwargs: (
        attend(*args, **kwargs)
    )
    torch.testing.assert_close(guided(predicted(patched, (1, 0))), expected)
    assert seen == [4] * 8 + [2] * 7  # the one that is perturbed gives its value


def test_joint_attention_is_perturbed_without_a_mask(monkeypatch):
    """Which some of ComfyUI's kernels add whatever it is, and others leave out."""
    attend = comfy_host.kernel

    def unmasked(*args, mask=None, **kwargs):
        assert mask is None
        return attend(*args, **kwargs)

    base = patcher(Joint())
    patched = patch_model(base, [sloth_fx.PAG()])
    monkeypatch.setattr(comfy_host, "kernel", unmasked)
    start(CFGGuider(patched, SCALE))
    found = guided(predicted(patched, (1, 0)))
    assert (found - guided(predicted(base, (1, 0)))).abs().max() > 1e-3


@pytest.mark.parametrize("name", PERTURBING)
def test_without_a_negative(name):
    """A cfg of 1 leaves it out: what the positive is guided by is then taken whole, as by a guider that has both."""
    patched = patch_model(patcher(), [PERTURBING[name]])
    start(CFGGuider(patched, 1.0))
    ((_, alone),) = predicted(patched, (0,))
    if name != "SAG":  # which degrades the negative where there is one
        torch.testing.assert_close(guided(predicted(patched, (1, 0)), 1.0), alone)
    assert (alone - predicted(patcher(), (0,))[0][1]).abs().max() > 1e-3


def predicting(name, sigma_data=1.0):
    """A sampling of a class that ComfyUI has by this name."""
    sampling = type("Sampling", (type(name, (EPS,), {}), Discrete), {})()
    sampling.sigma_data = sigma_data
    return sampling


def test_what_a_model_predicts():
    assert prediction_of(Flow()) == Prediction("flow")
    assert prediction_of(Discrete()) == Prediction("epsilon")
    assert prediction_of(Edm()) is None
    assert prediction_of(predicting("V_PREDICTION")) == Prediction("v_prediction")
    assert prediction_of(predicting("X0")) == Prediction("sample")
    assert prediction_of(Preconditioned(0.7)) == Prediction("edm", 0.7)
    del (unsaid := Preconditioned()).sigma_data
    assert prediction_of(unsaid) is None
    for name in ("V_PREDICTION", "X0", "EPS"):
        assert prediction_of(predicting(name, sigma_data=0.5)) is None  # no kind that is known here
    for name in ("IMG_TO_IMG", "IMG_TO_IMG_FLOW", "COSMOS_RFLOW"):
        assert prediction_of(type("Sampling", (type(name, (CONST,), {}), Edm), {})()) is None


def test_the_prediction_of_an_earlier_run_is_forgotten():
    patched = patch_model(patcher(), [sloth_fx.SAG()])
    sample(patched)
    assert context_of(patched).prediction == Prediction("epsilon")
    patched.model.model_sampling = Edm()
    with pytest.raises(SlothError, match="SAG has to know what the model predicts"):
        sample(patched)


@pytest.mark.parametrize("spec", [sloth_fx.PAG(), sloth_fx.SAG(), sloth_fx.NAG()], ids=["PAG", "SAG", "NAG"])
def test_a_guider_of_three_conditionings(spec):
    """DualCFGGuider calls with the negative first, which cond_or_uncond then has as 0."""
    negative = conditioning(7, seed=5) if isinstance(spec, sloth_fx.NAG) else None
    patched = patch_model(patcher(), [spec], negative=negative)
    assert start(CFGGuider(patched, 3.0, positive=[], negative=[])) == "sampled"
    assert start(CFGGuider(patched, 1.0, positive=[])) == "sampled"
    with pytest.raises(SlothError, match=r"Guider guides by positive, middle, negative.*use CFGGuider"):
        start(CFGGuider(patched, 1.0, positive=[], middle=[], negative=[]))


def test_a_guider_of_three_conditionings_where_nothing_is_guided():
    patched = patch_model(patcher(), [FULL])
    assert start(CFGGuider(patched, 1.0, positive=[], middle=[], negative=[])) == "sampled"


# One transform


def test_the_loaded_model_is_not_touched():
    base = patcher()
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    modules = dict(base.model.named_modules())
    plain = sample(base)
    patched = patch_model(base, [FULL, TILE])
    assert (sample(patched) - plain).abs().max() > 1e-4
    assert torch.equal(sample(base), plain)
    assert dict(base.model.named_modules()) == modules
    assert all(torch.equal(before[name], tensor) for name, tensor in base.model.state_dict().items())
    assert base.object_patches == {}
    assert base.model_options == {"transformer_options": {}}


def test_neutral_specs_change_no_bit():
    base = patcher()
    assert torch.equal(sample(patch_model(base, [NEUTRAL])), sample(base))


def test_a_second_run_neither_traces_nor_transforms(monkeypatch):
    base = patcher()
    first = sample(patch_model(base, [FULL]))

    def never(*args, **kwargs):
        raise AssertionError("this was done before")

    monkeypatch.setattr(patching, "transform", never)
    monkeypatch.setattr(Variants, "add", never)
    again = patch_model(base, [FULL])
    assert torch.equal(sample(again), first)
    sample(again, x=latents(3, rows=22, columns=17))  # another size: the capture covers it


def test_the_order_of_nodes_does_not_matter():
    base, negative = patcher(), conditioning(7, seed=5)
    one = patch_model(patch_model(base, [TILE]), [sloth_fx.NAG()], negative=negative)
    other = patch_model(patch_model(base, [sloth_fx.NAG()], negative=negative), [TILE])
    torch.testing.assert_close(sample(one), sample(other))


def test_adapters_are_the_users(monkeypatch):
    """What a transform assumes of a class is registered for nobody else, and hides nothing that was."""
    monkeypatch.setattr(registry, "_registered", {})
    base, name = patcher(Novel()), f"{Novel.__module__}.Novel"
    with pytest.raises(SlothError, match="nowhere"):
        sample(patch_model(base, [sloth_fx.TokenDownsample(where="nowhere")]))
    sample(patch_model(base, [TILE]))
    assert registry._registered == {}
    mine = sloth_fx.register_adapter(name, ModelAdapter(latent="x", axes="bchw", timesteps=7))
    sample(patch_model(base, [FULL]))
    assert adapter_for(base.model.diffusion_model).timesteps == mine.timesteps == 7


def test_models_can_be_freed():
    base = patcher()
    patched = patch_model(base, [FULL])
    sample(patched)
    kept = weakref.ref(base.model.diffusion_model), weakref.ref(model_of(patched))
    del base, patched
    gc.collect()
    assert [each() for each in kept] == [None, None]


def test_few_transforms_are_kept():
    base = patcher()
    found = [model_of(patch_model(base, [sloth_fx.HyperTile(tile_size=40, seed=seed)])) for seed in range(13)]
    assert model_of(patch_model(base, [sloth_fx.HyperTile(tile_size=40, seed=12)])) is found[12]
    assert model_of(patch_model(base, [sloth_fx.HyperTile(tile_size=40, seed=0)])) is not found[0]


def test_a_long_chain_is_transformed_once(monkeypatch):
    """Each of its nodes has a transform, of itself and those before; ComfyUI may execute all of them for each run."""
    base = patcher()
    places = "input_blocks.1", "middle_block", "output_blocks.0", "output_blocks.1"
    nodes = [sloth_fx.TokenDownsample(factors=(2, 2), where=f"{place}.*.attn1") for place in places]

    def chained():
        last = base
        for each in nodes:
            last = patch_model(last, [each])
        return patch_model(last, [sloth_fx.NAG()], negative=NEGATIVE)

    first = model_of(chained())
    monkeypatch.setattr(patching, "transform", None)
    assert model_of(chained()) is first


# Weights


@pytest.mark.parametrize("spec", [NEUTRAL, FULL])
def test_patches_of_weights_hold_on_either_side_of_the_node(spec):
    """A LoRA before the node, behind it, or merged into the weights: the same."""
    random = torch.Generator().manual_seed(4)
    difference = {
        f"{WEIGHT}.to_k.weight": torch.randn(16, 16, generator=random),
        f"{WEIGHT}.to_out.bias": torch.randn(16, generator=random),
        "diffusion_model.input_blocks.0.0.weight": torch.randn(16, 4, 3, 3, generator=random),
    }
    base = patcher()
    plain = sample(base)
    before, after = base.clone(), patch_model(base, [spec])
    before.add_patches(difference)
    after.add_patches(difference)
    found = sample(patch_model(before, [spec]))
    assert torch.equal(sample(after), found)
    assert torch.equal(sample(base), plain)
    merged = patcher()
    for name, each in difference.items():
        merged.model.get_parameter(name).data += each
    torch.testing.assert_close(sample(patch_model(merged, [spec])), found)
    assert (found - sample(patch_model(base, [spec]))).abs().max() > 1e-3


def test_what_a_host_keeps_in_its_modules_is_seen():
    """ComfyUI casts weights where it says so on the module, and moves them module by module."""
    base = patcher()
    patched = patch_model(base, [FULL])
    mine, theirs = model_of(patched), base.model.diffusion_model
    path = WEIGHT.removeprefix("diffusion_model.")
    assert mine.get_submodule(f"{path}.to_k") is theirs.get_submodule(f"{path}.to_k")
    assert mine.get_submodule(path) is not theirs.get_submodule(path)
    assert dict(mine.named_parameters()) == dict(theirs.named_parameters())
    mine.out.weight = nn.Parameter(torch.zeros_like(mine.out.weight))
    assert theirs.out.weight is mine.out.weight
    assert set(mine.state_dict()) == set(theirs.state_dict())


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        base = patcher()
        for parameter in base.model.parameters():
            parameter.requires_grad_(True)
        assert next(base.model.parameters()).is_inference()
        found = sample(patch_model(base, [FULL]))
    torch.testing.assert_close(found, sample(patch_model(patcher(), [FULL])))


@pytest.mark.parametrize("spec", [NEUTRAL, TILE])
def test_a_model_located_at_its_first_call(spec):
    base = patcher(Novel())
    difference = {"diffusion_model.blocks.0.attn1.to_v.weight": torch.full((16, 16), 0.3)}
    patched = patch_model(base, [spec])
    patched.add_patches(difference)
    found = sample(patched)
    before = base.clone()
    before.add_patches(difference)
    assert torch.equal(sample(patch_model(before, [spec])), found)
    assert torch.equal(sample(before), found) == (spec is NEUTRAL)


# Others' patches


def patches(model, **functions):
    other = model.clone()
    other.model_options["transformer_options"]["patches"] = {name: [each] for name, each in functions.items()}
    return other


def replaced(model, attention, block, function=lambda q, k, v, extra: v):
    other = model.clone()
    other.model_options["transformer_options"]["patches_replace"] = {attention: {block: function}}
    return other


def scaled(query, key, value, extra):
    return query, key * 1.5, value * 0.5


def by_group(query, key, value, extra):
    """As IP-Adapter, which has other keys for the positive: one part of the batch for each group."""
    parts = key.chunk(len(extra["cond_or_uncond"]))
    return (
        query,
        torch.cat([part * (2 - each) for part, each in zip(parts, extra["cond_or_uncond"], strict=True)]),
        value,
    )


def replaced_by_group(query, key, value, extra):
    """As IP-Adapter where it replaces attention."""
    return by_group(query, value, key, extra)[1].mean(1, keepdim=True) + query


def halved(query, key, value, extra):
    return query, key[:, ::2], value[:, ::2]


def test_patches_that_go_together():
    base = patcher()
    for change in (
        lambda model: patches(model, attn2_patch=scaled),
        lambda model: patches(model, attn1_patch=scaled),
        lambda model: replaced(model, "attn2", ("input", 1), lambda q, k, v, extra: q),
        lambda model: replaced(model, "attn1", ("middle", 0)),  # which is kept
    ):
        expected = sample(change(base))
        assert torch.equal(sample(change(patch_model(base, [NEUTRAL]))), expected)
        assert (expected - sample(base)).abs().max() > 1e-3


def halved_result(attend, *args, **kwargs):
    return attend(*args, **kwargs) * 0.5


def test_a_hosts_choice_of_attention_stays():
    base = patcher()
    patched = patch_model(base, [NEUTRAL])
    for each in (base, patched):
        each.model_options["transformer_options"]["optimized_attention_override"] = halved_result
    assert torch.equal(sample(patched), sample(base))


COLLISIONS = {
    "attn1_patch": (
        lambda model: patches(model, attn1_patch=halved),
        FULL,
        "the patch halved .* changes the tokens of attn1",
    ),
    "attn1_replace": (
        lambda model: replaced(model, "attn1", ("output", 1)),
        FULL,
        r"replaces attn1 at block \('output', 1\), and so does",
    ),
    "one transformer": (lambda model: replaced(model, "attn1", ("output", 1, 0)), FULL, "replaces attn1 at block"),
    "attn2_replace": (lambda model: replaced(model, "attn2", ("input", 1)), sloth_fx.NAG(), "replaces attn2 at block"),
}


FIRST_BLOCK = sloth_fx.SLG(layers=(0,), start=0.0, stop=1.0)  # that of input 1


@pytest.mark.parametrize("spec", [sloth_fx.SAG(), sloth_fx.PAG(), FIRST_BLOCK], ids=["SAG", "PAG", "SLG"])
@pytest.mark.parametrize(
    "change",
    [
        lambda model: patches(model, attn2_patch=by_group),
        lambda model: replaced(model, "attn2", ("input", 1), replaced_by_group),
    ],
    ids=["patch", "replace"],
)
def test_patches_of_rows_with_perturbed_guidance(change, spec):
    """Together and apart the same: a call that degrades one group says so to whoever tells rows by their group."""
    base = patcher()
    patched, plain = change(patch_model(base, [spec])), patch_model(base, [spec])
    for each in (patched, plain):
        start(CFGGuider(each, SCALE))
    together = guided(predicted(patched, (1, 0)))
    for calls in ([(0, 1)], [(1,), (0,)]):
        found = guided(predicted(patched, *calls))
        assert (found - together).abs().max() < 1e-5 * together.abs().max()
    assert (together - guided(predicted(plain, (1, 0)))).abs().max() > 1e-3
    assert (together - guided(predicted(change(base), (1, 0)))).abs().max() > 1e-3


@pytest.mark.parametrize("name", PERTURBING)
def test_perturbed_guidance_beside_other_nodes(name):
    """In any order of the nodes, together and apart: of keys that are reduced elsewhere, and of a negative prompt."""
    base, negative = patcher(), conditioning(7, seed=5)
    reduced = sloth_fx.SlothfulAttention(keep_middle=True)
    specs = PERTURBING[name], reduced, sloth_fx.NAG(scale=5.0)
    one = patch_model(base, specs, negative=negative)
    other = base
    for each in reversed(specs):
        other = patch_model(other, [each], negative=negative if isinstance(each, sloth_fx.NAG) else None)
    for each in (one, other):
        start(CFGGuider(each, SCALE))
    together = guided(predicted(one, (1, 0)))
    torch.testing.assert_close(guided(predicted(one, (1,), (0,))), together)
    torch.testing.assert_close(guided(predicted(other, (0, 1))), together)
    for fewer in (patch_model(base, specs[1:], negative=negative), patch_model(base, specs[:2])):
        start(CFGGuider(fewer, SCALE))
        assert (guided(predicted(fewer, (1, 0))) - together).abs().max() > 1e-3


def test_a_degraded_call_has_one_group():
    """What is asked once more are the rows of one text, and the options say which."""
    seen = []

    def noted(query, key, value, extra):
        seen.append((len(query), extra["cond_or_uncond"], len(extra["uuids"])))
        return query, key, value

    patched = patches(patch_model(patcher(), [sloth_fx.SAG()]), attn2_patch=noted)
    patched.load()
    with torch.no_grad():
        call(patched, latents(3), 3.5, SIGMAS, (1, 0))
    patched.unload()
    assert seen == [(6, [1, 0], 2)] * 4 + [(3, [1], 1)] * 4


@pytest.mark.parametrize("case", COLLISIONS)
def test_patches_that_collide(case):
    change, spec, words = COLLISIONS[case]
    base = patcher()
    patched = change(patch_model(base, [spec], negative=NEGATIVE if isinstance(spec, sloth_fx.NAG) else None))
    plain = sample(base)
    with pytest.raises(SlothError, match=words):
        sample(patched)
    assert torch.equal(sample(base), plain)


def test_a_compiled_model_before_the_node():
    base = patcher()
    base.wrappers = {"apply_model": {"torch.compile": [lambda executor, *args: executor(*args)]}}
    with pytest.raises(SlothError, match="put TorchCompileModel after the nodes of Sloth FX"):
        patch_model(base, [FULL])


def test_modules_exchanged_by_others():
    base = patcher()
    plain = sample(base)
    patched = patch_model(base, [FULL])
    patched.add_object_patch(f"{WEIGHT}.forward", lambda x, **options: x)
    with pytest.raises(SlothError, match=r"another node has exchanged diffusion_model\.output_blocks"):
        sample(patched)
    with pytest.raises(SlothError, match="another node has exchanged"):
        patch_model(patched, [TILE])
    assert torch.equal(sample(base), plain)


def test_an_owner_exchanged_during_the_run():
    patched = patch_model(patcher(), [FULL])
    owner = model_of(patched).get_submodule(WEIGHT.removeprefix("diffusion_model."))
    owner.forward = lambda x, **options: x
    with pytest.raises(SlothError, match=r"exchanged output_blocks\.1\.1\.transformer_blocks\.0\.attn1 of this"):
        sample(patched)


def test_options_that_were_replaced():
    patched = patch_model(patcher(), [FULL])
    patched.model_options = {"transformer_options": {}}
    with pytest.raises(SlothError, match="without the transformer_options of its patcher"):
        sample(patched)


@pytest.mark.slow
def test_compiled_after_the_node():
    patched = patch_model(patcher(), [FULL], phases=2)
    expected = sample(patched)
    model = model_of(patched)
    patched.object_patches["diffusion_model"] = torch.compile(model, backend="eager")
    torch._dynamo.reset()
    torch.testing.assert_close(sample(patched), expected)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch.testing.assert_close(sample(patched), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
