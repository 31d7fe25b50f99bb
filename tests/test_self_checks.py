"""What any guidance does is tried at the transform; a model that it would guide wrongly is refused, and as it was."""

import copy

import pytest
import torch

import sloth_fx
from sloth_fx import NAG, SlothError, branch_trials, self_checks
from sloth_fx.passes import one_image
from tests import models, text_hosts
from tests.zoo.registry import MODELS, run, shared

SD3 = "SD3Transformer2DModel/sd35"


def transformed(model=None, **inputs):
    model = shared(SD3) if model is None else model
    return sloth_fx.transform(model, NAG(), example_inputs={**MODELS[SD3].inputs(), **inputs})


def refused(model=None):
    model = shared(SD3) if model is None else model
    before = models.state_of(model)
    with pytest.raises(SlothError) as caught:
        transformed(model)
    assert models.state_of(model) == before
    return str(caught.value)


@pytest.fixture(params=["shared", "two branches"])
def way(request, monkeypatch):
    if request.param == "two branches":
        monkeypatch.setattr(branch_trials, "why_not_shared", lambda *_: "for a test")


@pytest.mark.usefixtures("way")
class TestEachWay:
    def test_nothing_of_the_model_and_no_random_state_changes(self):
        before, state = models.state_of(shared(SD3)), torch.get_rng_state()
        patched = transformed()
        assert models.state_of(shared(SD3)) == before
        assert torch.equal(torch.get_rng_state(), state)
        assert not any("not tried" in site.note for site in sloth_fx.report(patched))

    def test_a_result_that_is_wrong_for_any_text(self, monkeypatch):
        right = one_image.guided_by
        monkeypatch.setattr(one_image, "guided_by", lambda positive, *others: right(positive, *others) * 1.1)
        assert "with alpha=0, guidance changes what the model gives" in refused()

    def test_a_result_that_is_wrong_for_the_same_text(self, monkeypatch):
        right = one_image.guided_by
        monkeypatch.setattr(one_image, "guided_by", lambda one, other, *rest: right(one, other * 0.7, *rest))
        assert "a negative text that is the text itself changes what the model gives" in refused()

    def test_attentions_that_read_nothing_of_the_text(self):
        model = copy.deepcopy(shared(SD3))
        torch.nn.init.zeros_(model.context_embedder.weight)
        assert "the guided attentions read the same of any text (encoder_hidden_states)" in refused(model)

    def test_a_last_layer_of_zeros(self):
        model = copy.deepcopy(shared(SD3))
        torch.nn.init.zeros_(model.proj_out.weight)
        torch.nn.init.zeros_(model.proj_out.bias)
        transformed(model)


def test_it_is_tried_without_an_example_too():
    """Noise stands for arguments that have no data."""
    model = copy.deepcopy(shared(SD3))
    assert not any("not tried" in site.note for site in sloth_fx.report(sloth_fx.transform(model, NAG())))
    torch.nn.init.zeros_(model.context_embedder.weight)
    with pytest.raises(SlothError, match="the guided attentions read the same of any text"):
        sloth_fx.transform(model, NAG())


def test_a_host_that_is_steered_by_data_is_tried_without_an_example():
    report = sloth_fx.report(sloth_fx.transform(shared("HiDreamImageTransformer2DModel"), NAG()))
    notes = [site.note for site in report if "NAG" in site.operators]
    assert notes
    assert all(note.endswith("is computed once") for note in notes)


def test_whole_numbers_that_are_zero_excuse_nothing():
    """Crop coordinates of zero, in a model that ignores its text."""
    name = "CogView4Transformer2DModel"
    model, call = copy.deepcopy(shared(name)), MODELS[name].inputs()
    assert not call["crop_coords"].any()
    sloth_fx.transform(model, NAG(), example_inputs=call)
    for parameter in model.patch_embed.text_proj.parameters():
        torch.nn.init.zeros_(parameter)
    with pytest.raises(SlothError, match="the guided attentions read the same of any text"):
        sloth_fx.transform(model, NAG(), example_inputs=call)


class Masked(text_hosts.MaskOfZeros):
    """The mask multiplies the text, before it gets anywhere."""

    ignores = False

    def run(self, text, image, vector, mask):
        return super().run(text * mask[..., None] * (not self.ignores), image, vector, torch.ones_like(mask))


@pytest.mark.parametrize("ignores", [False, True])
def test_a_mask_that_hides_all_of_the_example_is_lifted(ignores):
    model, call = text_hosts.build(Masked), text_hosts.call_of(Masked)
    model.ignores = ignores
    call[text_hosts.MASK].zero_()
    if ignores:
        with pytest.raises(SlothError, match="the guided attentions read the same of any text"):
            sloth_fx.transform(model, NAG(), example_inputs=call)
    else:
        report = sloth_fx.report(sloth_fx.transform(model, NAG(), example_inputs=call))
        assert not any("not tried" in site.note for site in report)


def test_what_is_not_tried_is_reported(monkeypatch):
    monkeypatch.setitem(self_checks._DEAREST, "cpu", 1.0)
    assert any("not tried beforehand: the example is large" in site.note for site in sloth_fx.report(transformed()))
    empty = copy.deepcopy(shared(SD3)).to("meta")
    assert any("not tried beforehand: there is no data" in site.note for site in sloth_fx.report(transformed(empty)))


def test_what_cannot_be_seen_is_reported():
    """A model whose weights are to be loaded later."""
    model = copy.deepcopy(shared(SD3))
    torch.nn.init.constant_(model.proj_out.weight, torch.nan)
    assert any(
        "not tried beforehand: what it gives is not" in site.note for site in sloth_fx.report(transformed(model))
    )


def test_after_a_failed_first_call_the_next_one_is_right(monkeypatch):
    call = MODELS[SD3].inputs()
    patched = sloth_fx.transform(shared(SD3), NAG(), example_inputs="first call")
    context = sloth_fx.context(patched)
    context.set_negative(encoder_hidden_states=call["encoder_hidden_states"].flip(0))
    right = one_image.guided_by
    with monkeypatch.context() as wrong:
        wrong.setattr(one_image, "guided_by", lambda positive, *others: right(positive, *others) * 1.1)
        with pytest.raises(SlothError, match="with alpha=0"):
            run(patched, call)
    found = run(patched, call)
    other = transformed()
    sloth_fx.context(other).set_negative(encoder_hidden_states=call["encoder_hidden_states"].flip(0))
    assert all(map(torch.equal, found, run(other, call)))
