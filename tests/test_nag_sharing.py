"""NAG on joint attention costs little more than the text: counted in the kernels, and the same numbers either way."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sloth_fx
from sloth_fx import branch_trials
from tests.zoo.registry import MODELS, run, shared

TEXT = "encoder_hidden_states"
SHARED = [
    "SD3Transformer2DModel/sd35",
    "FluxTransformer2DModel/kontext",
    "AuraFlowTransformer2DModel",
    "QwenImageTransformer2DModel",
    "CogVideoXTransformer3DModel",
    "HunyuanVideoTransformer3DModel",
]


class Work(TorchDispatchMode):
    """Multiplications of matrices, those in attention kernels too."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__
        if name.startswith("_scaled_dot_product"):
            self.count += 2 * math.prod(args[0].shape) * args[1].shape[2]
        elif name.startswith(("mm", "addmm", "bmm", "baddbmm")):
            one, other = args[-2:]
            self.count += math.prod(one.shape) * other.shape[-1]
        return func(*args, **(kwargs or {}))


def work(model, call):
    with torch.no_grad(), Work() as counter:
        model(**call)
    return counter.count


def guided(name, monkeypatch=None):
    if monkeypatch is not None:
        monkeypatch.setattr(branch_trials, "why_not_shared", lambda *_: "for a test")
    patched = sloth_fx.transform(
        shared(name), sloth_fx.NAG(scale=4.0, tau=2.0, alpha=0.5), example_inputs=MODELS[name].inputs()
    )
    if monkeypatch is not None:
        monkeypatch.undo()
    text = MODELS[name].inputs()[TEXT]
    other = torch.randn(text.shape, generator=torch.Generator().manual_seed(5))
    sloth_fx.context(patched).set_negative(**{TEXT: other})
    return patched


@pytest.mark.parametrize("name", SHARED)
def test_the_image_is_computed_once(name, monkeypatch):
    call = MODELS[name].inputs
    one, two = guided(name), guided(name, monkeypatch)
    for patched, way in ((one, "is computed once"), (two, "two branches: for a test")):
        assert all(way in site.note for site in sloth_fx.report(patched) if site.operators)
    torch.testing.assert_close(run(one, call()), run(two, call()), atol=2e-5, rtol=2e-5)
    for each in (one, two):
        each(**call())  # what is prepared once for each text
    plain, shares, branches = (work(each, call()) for each in (shared(name), one, two))
    site = next(site for site in sloth_fx.report(one) if site.operators)
    text = site.text[1] - site.text[0]
    image = math.prod(site.grid)
    assert branches == pytest.approx(2 * plain, rel=0.02)
    assert shares < 0.85 * branches
    # At most: all that is done for the text again, and attention of the image to it.
    assert shares - plain < 1.1 * plain * (2 * text / (text + image))


def test_a_host_that_is_steered_by_what_differs_takes_two_branches():
    class Steered(type(shared("SD3Transformer2DModel"))):
        def forward(self, hidden_states, encoder_hidden_states, pooled_projections, timestep):
            if bool(encoder_hidden_states.mean() > 1e9):
                return None
            return super().forward(hidden_states, encoder_hidden_states, pooled_projections, timestep)

    name = "SD3Transformer2DModel"
    model = Steered.from_config(shared(name).config).eval()
    model.load_state_dict(shared(name).state_dict())
    call = {key: value for key, value in MODELS[name].inputs().items() if key != "return_dict"}
    patched = sloth_fx.transform(model, sloth_fx.NAG(), example_inputs=call)
    notes = [site.note for site in sloth_fx.report(patched) if site.operators]
    assert notes
    assert all("two branches: TypeError" in note for note in notes)


@pytest.mark.parametrize("name", ["SD3Transformer2DModel/sd35", "FluxTransformer2DModel/kontext"])
def test_compiled_it_is_one_graph(name):
    call, patched = MODELS[name].inputs(), guided(name)
    expected = run(patched, call)
    torch.compiler.reset()
    compiled = torch.compile(patched, fullgraph=True, backend="eager")
    torch.testing.assert_close(run(compiled, call), expected)
