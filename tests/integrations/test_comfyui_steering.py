"""A model that nodes have patched: its moment, its one transform, its weights."""

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
from sloth_fx.integrations.comfy.sampling import Run, moment_of, sigma_of
from sloth_fx.model_adapters import ModelAdapter, adapter_for, registry
from sloth_fx.patch import patch_of
from tests.integrations.comfy_host import (
    NEGATIVE,
    SIGMAS,
    Angle,
    Discrete,
    Edm,
    Flow,
    Novel,
    call,
    conditioning,
    latents,
    patcher,
    sample,
)
from tests.integrations.comfy_patched import (
    FULL,
    NEUTRAL,
    TILE,
    WEIGHT,
    context_of,
    model_of,
)


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


def test_few_transforms_are_kept(monkeypatch):
    monkeypatch.setattr(patching, "_KEPT", 3)
    base = patcher()
    found = [model_of(patch_model(base, [sloth_fx.HyperTile(tile_size=40, seed=seed)])) for seed in range(4)]
    assert model_of(patch_model(base, [sloth_fx.HyperTile(tile_size=40, seed=3)])) is found[3]
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
