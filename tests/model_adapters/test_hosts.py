"""The built-in adapters against diffusers' classes: they run on the inputs that are made for them."""

import inspect
import re
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from sloth_fx.capture.skeleton import Skeleton
from sloth_fx.model_adapters import Arguments, ModelAdapter, adapter_for
from sloth_fx.model_adapters.registry import BUILT_IN
from tests.model_adapters.hosts import FLUX, TINY, build

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

# Latents (frames, rows, columns) of the tiny models, and what text they have.
SIZES = {
    "UNet2DConditionModel": (1, 17, 21),
    "UNet2DModel": (1, 64, 64),
    "ControlNetModel": (1, 64, 64),
    "MultiControlNetModel": (1, 64, 64),
    "ControlNetUnionModel": (1, 64, 64),
    "MultiControlNetUnionModel": (1, 64, 64),
    "UniDiffuserModel": (1, 16, 16),
    "SD3Transformer2DModel": (1, 16, 24),
    "SD3MultiControlNetModel": (1, 16, 24),
    "HunyuanDiT2DModel": (1, 16, 24),
    "HunyuanDiT2DMultiControlNetModel": (1, 16, 24),
    "ZImageTransformer2DModel": (1, 16, 24),
    "ZImageControlNetModel": (1, 16, 24),
    "WanTransformer3DModel": (3, 16, 24),
    "CogVideoXTransformer3DModel": (3, 14, 22),
    "LTXVideoTransformer3DModel": (3, 8, 12),
    "StableAudioDiTModel": (1, 1, 96),
}

# Of full size, with the constructor's own values: one or two of each family, of those that are quick to make.
DEFAULTS = (
    "AceStepTransformer1DModel",
    "FluxTransformer2DModel",
    "Kandinsky5Transformer3DModel",
    "PixArtTransformer2DModel",
    "SparseControlNetModel",
    "T5FilmDecoder",
    "UNet2DConditionModel",
    "WanVACETransformer3DModel",
)


def real(value: Any) -> Any:
    """Random data in place of what lies on ``meta``."""
    if isinstance(value, torch.Tensor):
        return torch.randn(value.shape).to(value.dtype) if value.is_meta else value
    if isinstance(value, (list, tuple)):
        return type(value)(map(real, value))
    return {name: real(item) for name, item in value.items()} if isinstance(value, dict) else value


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in items for tensor in tensors(item)]


def run_skeleton(model: nn.Module) -> None:
    skeleton = Skeleton(model)
    inputs = skeleton.fake_inputs(adapter_for(model).inputs(model))
    with skeleton.running():
        skeleton.model(**inputs)


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_run_without_data(name):
    run_skeleton(build(name))


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_run_with_data(name):
    model = build(name)
    with torch.no_grad():
        model(**real(adapter_for(model).inputs(model)))


@pytest.mark.parametrize("name", DEFAULTS)
def test_full_size_models_run_without_data(name):
    with torch.device("meta"):
        model = getattr(diffusers, name)()
    run_skeleton(model)


@pytest.mark.parametrize("name", TINY)
def test_what_is_read_from_the_inputs(name):
    model = build(name)
    adapter = adapter_for(model)
    inputs, arguments = adapter.inputs(model), Arguments(model, adapter)
    assert arguments.size((), inputs) == SIZES.get(name, (1, 8, 12))
    text = arguments.text((), inputs)
    assert (text == {}) == (name == "UNet2DModel")
    assert all(tensor.shape[-1] in (8, 24, 32) for tensor in text.values())
    assert arguments.timestep((), inputs) is not None or name == "UVit2DModel"


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "FluxTransformer2DModel", "ZImageTransformer2DModel"])
def test_inputs_have_the_dtype_of_the_model(name):
    model = build(name).bfloat16()
    inputs = adapter_for(model).inputs(model)
    assert {each.dtype for each in tensors(inputs) if each.is_meta and each.is_floating_point()} == {torch.bfloat16}


@pytest.mark.parametrize("name", [name for name in BUILT_IN if hasattr(diffusers, name)])
def test_parameters_that_an_adapter_names_exist(name):
    parameters = set(inspect.signature(getattr(diffusers, name).forward).parameters)
    adapter = BUILT_IN[name]
    named = [adapter.latent, adapter.timestep, adapter.ids, adapter.id_rows, adapter.shapes]
    assert {*filter(None, named), *(adapter.text or ()), *(adapter.sizes or ())} <= parameters


def test_every_denoiser_of_diffusers_has_an_adapter():
    """A class added later may do without: then its inputs are made by the general rules."""
    denoiser = re.compile(r"UNet|Uni?Diffuser?Model|UVit|Transformer|ControlNet|DiT")
    exported = [name for name in dir(diffusers) if denoiser.search(name)]
    classes = [name for name in exported if isinstance(getattr(diffusers, name), type)]
    missing = {
        name
        for name in classes
        if issubclass(getattr(diffusers, name), nn.Module)
        and name not in BUILT_IN
        and name not in ("ControlNetXSAdapter", "LongCatAudioDiTVae")  # a part of a model, and an autoencoder
    }
    assert len(missing) <= 3, f"{sorted(missing)}: describe them in sloth_fx/model_adapters"


def test_subclasses_are_what_their_base_is():
    class Mine(diffusers.FluxTransformer2DModel):
        pass

    assert adapter_for(Mine(**FLUX)) is BUILT_IN["FluxTransformer2DModel"]


def test_each_adapter_keeps_its_own_start():
    assert BUILT_IN["FluxTransformer2DModel"].progress(0.25) == 0.75
    assert BUILT_IN["ZImageTransformer2DModel"].progress(0.25) == 0.25
    assert BUILT_IN["MochiTransformer3DModel"].progress(250) == 0.25
    assert BUILT_IN["UNet2DConditionModel"].progress(250) == 0.75
    assert all(isinstance(adapter, ModelAdapter) for adapter in BUILT_IN.values())
