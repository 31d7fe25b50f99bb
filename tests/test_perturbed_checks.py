"""What guidance by perturbed attention is tried for at the transform, and refuses at the call."""

import copy
import math

import pytest
import torch
from torch import nn

import sloth_fx
from sloth_fx import PAG, SAG, SlothError, self_checks
from sloth_fx.branching.rows import ROW_RULES
from sloth_fx.passes.perturb import PerturbedAttention
from tests.perturbed_by_hand import itself, two_calls
from tests.test_perturbed import BATCH, COND, SCALE, dit, dit_inputs, guided, patched, run
from tests.zoo.registry import MODELS, shared

FIRST = 2  # the site that is perturbed in a stack of five blocks


def note(model):
    return sloth_fx.report(model).sites[FIRST].note


def test_what_is_wrong_where_it_is_shared_is_found_beforehand(monkeypatch):
    """The sharing goes by rules about torch's functions; a wrong one is seen on the model's own weights."""
    monkeypatch.setitem(ROW_RULES, "gelu", lambda function, args, kwargs: args[0].with_tensor(args[0].tensor.relu()))
    model, call = dit(), dit_inputs()
    found, _ = patched(model, PAG(scale=SCALE), dit_inputs(2))
    assert "a call of its own: one for both gives something else" in sloth_fx.report(found).sites[2].note
    expected = two_calls(model, call, (2,), itself, batch=BATCH, rows=COND, run=run)
    with torch.no_grad():
        torch.testing.assert_close(run(found, call), guided(*expected))


def test_what_is_not_tried_beforehand_is_reported(monkeypatch):
    monkeypatch.setitem(self_checks._DEAREST, "cpu", 1.0)
    found, _ = patched(dit(), PAG(scale=SCALE), dit_inputs(2))
    assert "computed once, not tried beforehand: the example is large" in sloth_fx.report(found).sites[2].note


@pytest.mark.parametrize("faulty", [False, True])
def test_in_half_precision_too(monkeypatch, faulty):
    """The change is a few per cent of what the model gives, whose rounding is not taken for a fault."""
    own = PerturbedAttention._spoilt

    def spoilt(self, *args):
        return own(self, *args) * (0 if faulty and self.asks == "both" else 1)

    monkeypatch.setattr(PerturbedAttention, "_spoilt", spoilt)
    model, call = dit(joint=True).bfloat16(), {name: each.bfloat16() for name, each in dit_inputs(2).items()}
    with torch.no_grad():
        for block in model.blocks:
            block.proj.weight.mul_(0.1)
    found, _ = patched(model, PAG(scale=1.0), call)
    assert note(found).endswith("one for both gives something else" if faulty else "is computed once")


class Table(nn.Module):
    """Looks up what it is given."""

    def __init__(self):
        super().__init__()
        self.inner, self.table = dit(), nn.Embedding(1000, 8).double()

    def forward(self, latent, timestep, context):
        return self.inner(latent, timestep, context + self.table((timestep * 10).round().long())[:, None])


def test_what_does_not_run_on_noise_is_not_tried():
    call = {**dit_inputs(2), "timestep": torch.tensor([32.0, 41.0])}
    found, _ = patched(Table(), PAG(scale=SCALE), {name: each.to("meta") for name, each in call.items()})
    assert "computed once, not tried beforehand: it does not run here: IndexError" in note(found)


def test_what_is_not_finite_shows_nothing():
    model = dit()
    model.out.bias.data[3] = math.inf
    found, _ = patched(model, PAG(scale=SCALE), dit_inputs(2))
    assert "computed once, not tried beforehand: what it gives is not finite" in note(found)


class Turned(nn.Module):
    """Gives (C, B, H, W)."""

    alone = "its own"

    def __init__(self):
        super().__init__()
        self.inner = dit()

    def forward(self, latent, timestep, context):
        return self.inner(latent, timestep, context).cumsum(1).transpose(0, 1)


def test_a_result_without_rows_is_no_prediction():
    found, _ = patched(Turned(), PAG(scale=SCALE), dit_inputs(2))
    with pytest.raises(SlothError, match="nothing that Turned gives has 2 of them along axis 0"):
        found(**dit_inputs(2))
    assert found.alone == "its own"


@pytest.mark.parametrize("spec", [PAG(), SAG()])
def test_a_cache_between_calls(spec):
    """The second prediction of a step would be made of what the blocks gave for the first."""
    diffusers = pytest.importorskip("diffusers")
    name = "FluxTransformer2DModel"
    call = MODELS[name].inputs()
    found = sloth_fx.transform(copy.deepcopy(shared(name)), spec, example_inputs=call)
    context = sloth_fx.context(found)
    context.prediction = "flow"
    context.at(0.1, sigma=0.9)
    before = found(**call)[0]
    found.enable_cache(diffusers.FirstBlockCacheConfig(threshold=1e-9))
    with found.cache_context("cond"), pytest.raises(SlothError, match=r"its cache would answer.*disable_cache\(\)"):
        found(**call)
    found.disable_cache()
    assert torch.equal(found(**call)[0], before)
