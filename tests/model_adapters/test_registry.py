"""How adapters are found, registered and refused."""

import pytest
import torch
from torch import nn

from sloth_fx.errors import SlothError
from sloth_fx.model_adapters import Arguments, ModelAdapter, adapter_for, register_adapter, registry


@pytest.fixture(autouse=True)
def _no_leftovers(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})


class Denoiser(nn.Module):
    def forward(self, hidden_states, t, encoder_hidden_states=None):
        return hidden_states


class Derived(Denoiser):
    pass


class Packed(nn.Module):
    def forward(self, hidden_states, encoder_hidden_states, timestep, img_ids, txt_ids):
        return hidden_states


class Film(nn.Module):
    def forward(self, hidden_states, timestep, num_frames, height, width):
        return hidden_states


class UNet2DConditionModel(nn.Module):
    """Known by its name alone."""

    def forward(self, sample, timestep):
        return sample


@pytest.mark.parametrize("key", [Denoiser, "Denoiser"])
def test_by_class_or_name(key):
    adapter = register_adapter(key, latent="encoder_hidden_states", timesteps=1)
    assert adapter.latent == "encoder_hidden_states"
    assert adapter_for(Denoiser()).latent == adapter_for(Derived()).latent == "encoder_hidden_states"
    assert adapter_for(Denoiser()).progress(0.75) == 0.25


def test_the_nearest_base_counts():
    register_adapter(Denoiser, timesteps=1)
    register_adapter(Derived, timesteps=3)
    assert adapter_for(Denoiser()).timesteps == 1
    assert adapter_for(Derived()).timesteps == 3


def test_registered_before_built_in():
    assert adapter_for(UNet2DConditionModel()).latent == "sample"
    register_adapter("UNet2DConditionModel", latent="timestep")
    assert adapter_for(UNet2DConditionModel()).latent == "timestep"


def test_an_adapter_and_changes_to_it():
    base = ModelAdapter(latent="hidden_states", axes="btchw")
    assert register_adapter(Denoiser, base, timesteps=5) == ModelAdapter(
        latent="hidden_states", axes="btchw", timesteps=5
    )
    assert base.timesteps == 1000


def test_what_was_left_open_is_read_off_the_signature():
    register_adapter(Denoiser, axes="bhwc")
    adapter = adapter_for(Denoiser())
    assert (adapter.axes, adapter.timestep, adapter.inputs) == ("bhwc", "t", None)


def test_unknown_models_are_read_off_their_signature():
    assert (adapter_for(Packed()).ids, adapter_for(Packed()).timestep) == ("img_ids", "timestep")
    assert adapter_for(Film()).sizes == ("num_frames", "height", "width")
    assert adapter_for(Packed()).axes == adapter_for(Film()).axes == "bnc"
    assert adapter_for(Denoiser()) == ModelAdapter(timestep="t")
    assert adapter_for(nn.Identity()) == ModelAdapter()


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_inputs_of_unknown_models_with_a_config(kind):
    model = Denoiser()
    model.config = {"in_channels": 5, "cross_attention_dim": 24, "patch_size": 2}
    model.embed = kind(5, 8, 2)
    inputs = adapter_for(model).inputs(model)
    size = {nn.Conv1d: (24,), nn.Conv2d: (16, 24), nn.Conv3d: (3, 16, 24)}[kind]
    assert {name: tuple(value.shape) for name, value in inputs.items()} == {
        "hidden_states": (2, 5, *size),
        "t": (2,),
        "encoder_hidden_states": (2, 13, 24),
    }
    assert all(value.device.type == "meta" for value in inputs.values())


def test_the_name_tells_a_film():
    class Denoiser3D(Denoiser):
        pass

    model = Denoiser3D()
    model.config = {"in_channels": 5, "patch_size": 2, "patch_size_t": 2}
    model.embed = nn.Conv2d(5, 8, 2)
    assert adapter_for(model).inputs(model)["hidden_states"].shape == (2, 5, 6, 16, 24)


def test_unets_are_tried_with_maps_that_can_be_halved():
    model = Denoiser()
    model.config = {"in_channels": 5, "block_out_channels": (8, 16, 32)}
    assert adapter_for(model).inputs(model)["hidden_states"].shape == (2, 5, 64, 96)


def test_inputs_of_unknown_packed_models():
    model = Packed()
    model.config = {"in_channels": 5, "joint_attention_dim": 24, "axes_dims_rope": (2, 2, 2, 2)}
    adapter = adapter_for(model)
    inputs = adapter.inputs(model)
    assert inputs["hidden_states"].shape == (2, 96, 5)
    assert (inputs["img_ids"].shape, inputs["txt_ids"].shape) == ((96, 4), (13, 4))
    assert Arguments(model, adapter).size((), inputs) == (1, 8, 12)
    assert torch.equal(inputs["img_ids"][13], torch.tensor([0.0, 1, 1, 0]))


def test_inputs_that_nobody_knows():
    class Odd(nn.Module):
        def forward(self, sample, flavour):
            return sample

    model = Odd()
    model.config = {"in_channels": 4}
    with pytest.raises(SlothError, match=r"Odd: what to give 'flavour' .* give example_inputs"):
        adapter_for(model).inputs(model)


def test_inputs_whose_channels_nobody_knows():
    model = Denoiser()
    model.config = {"colour": 4}
    with pytest.raises(SlothError, match=r"'hidden_states' .*the config has no in_channels or "):
        adapter_for(model).inputs(model)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "nothing to register; fields are latent, axes"),
        ({"latnet": "x"}, "field 'latnet' is unknown, nearest: latent"),
        ({"axes": "bxhw"}, "axes='bxhw' is refused: axes takes one letter per axis"),
        ({"axes": "bbhw"}, "axes='bbhw' is refused"),
        ({"axes": ""}, "axes='' is refused"),
        ({"id_axes": "tw"}, "id_axes='tw' is refused: id_axes takes one letter per column"),
        ({"latent": 3}, "latent=3 is refused: latent takes the name of a parameter of forward, or None"),
        ({"text": "prompt"}, "text='prompt' is refused: text takes a tuple of names"),
        ({"sizes": ("width",)}, r"sizes=\('width',\) is refused"),
        ({"timesteps": "1"}, "timesteps='1' is refused: timesteps takes a number"),
        ({"timesteps": 0}, "sampling starts and ends at the same timestep"),
        ({"noise": 1}, "noise=1 is refused: noise takes a NoiseSchedule, or None"),
        ({"inputs": {}}, "inputs={} is refused: inputs takes a function of the model, or None"),
        ({"ids": "a", "shapes": "b"}, "ids and shapes both say the size of a packed latent: give one"),
    ],
)
def test_what_makes_no_sense_is_refused(fields, words):
    with pytest.raises(SlothError, match=words):
        register_adapter(Denoiser, **fields)
    assert adapter_for(Denoiser()) == ModelAdapter(timestep="t")


@pytest.mark.parametrize("key", [3, "two words", Denoiser(), int])
def test_only_classes_and_names(key):
    with pytest.raises(SlothError, match="give a class of modules, or the name of one"):
        register_adapter(key, latent="x")


def test_only_adapters():
    with pytest.raises(SlothError, match="give a ModelAdapter, or fields of one by name"):
        register_adapter(Denoiser, {"latent": "x"})
