"""A model that nodes guide: the rows of its calls, the negative text, and predictions together and apart."""

import pytest
import torch

import sloth_fx
from sloth_fx.errors import SlothError
from sloth_fx.integrations.comfy.patching import patch_model
from sloth_fx.integrations.comfy.sampling import prediction_of
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
    CFGGuider,
    Discrete,
    Edm,
    Flow,
    Joint,
    Preconditioned,
    call,
    conditioning,
    latents,
    patcher,
    sample,
    start,
)
from tests.integrations.comfy_patched import (
    FULL,
    PERTURBING,
    SCALE,
    context_of,
    guided,
    model_of,
    predicted,
)
from tests.two_branches import in_order, in_step, joint

TEXTS = NEGATIVE, POSITIVE


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
