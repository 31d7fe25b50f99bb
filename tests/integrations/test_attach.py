"""Stock pipelines, before, while and after they are attached."""

import copy
import gc
import weakref
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

import sloth_fx
from sloth_fx import HyperTile, NearSightedTile, Reduction, SlothError, SlothfulAttention
from tests import models
from tests.integrations import pipelines

SPEC = SlothfulAttention(in_=Reduction(rate=6.0), out=Reduction(rate=4.0, k_blend=0.5))
OFF = SlothfulAttention(in_=Reduction(rate=1.0), out=Reduction(rate=1.0))


def state(pipe: Any) -> list[Any]:
    """All that could show traces of an attachment: the pipeline's own attributes, and those of its parts."""
    parts = pipe.components
    found: list[Any] = [{name: id(part) for name, part in parts.items()}, dict(pipe.config), sorted(vars(pipe))]
    found.append({name: id(value) for name, value in vars(pipe).items() if name != "_internal_dict"})
    for part in parts.values():
        if isinstance(part, nn.Module):
            found.append(models.state_of(part))
            found.append([(dict(each._forward_pre_hooks), dict(each._forward_hooks)) for each in part.modules()])
        elif part is not None:
            found.append(sorted(vars(part)))
    return found


@pipelines.numpy_warning
@pytest.mark.parametrize("name", pipelines.PIPELINES)
def test_stock_pipelines(name):
    pipe, given = pipelines.PIPELINES[name]()
    plain = pipelines.run(pipe, given)
    before = state(pipe)
    with sloth_fx.attach(pipe, OFF) as handle:
        assert torch.equal(pipelines.run(pipe, given), plain)
        assert handle.context.driven
    with sloth_fx.attach(pipe, SPEC) as handle:
        assert any(site.operators for site in handle.report)
        changed = pipelines.run(pipe, given)
    assert (changed - plain).abs().max() > 0.01 * plain.abs().max()
    assert state(pipe) == before
    assert torch.equal(pipelines.run(pipe, given), plain)


def test_the_images_are_those_of_a_model_that_is_patched_by_hand():
    pipe, given = pipelines.sd()
    with sloth_fx.attach(pipe, SPEC):
        attached = pipelines.run(pipe, given)
    pipe.unet = sloth_fx.transform(pipe.unet, SPEC)
    sloth_fx.context(pipe.unet).halves = 2
    assert torch.equal(pipelines.run(pipe, given), attached)


def test_whole_images():
    pipe, given = pipelines.image_to_image()
    plain = pipelines.run(pipe, given, output_type="pt")
    assert plain.shape == (2, 3, pipelines.HEIGHT, pipelines.WIDTH)
    with sloth_fx.attach(pipe, OFF):
        assert torch.equal(pipelines.run(pipe, given, output_type="pt"), plain)
    with sloth_fx.attach(pipe, SPEC):
        assert not torch.equal(pipelines.run(pipe, given, output_type="pt"), plain)


def test_without_a_block():
    pipe, _ = pipelines.sd()
    unet = pipe.unet
    handle = sloth_fx.attach(pipe, SPEC)
    assert pipe.unet is handle.model is not unet
    assert repr(handle) == "Handle(StableDiffusionPipeline, unet: UNet2DConditionModel)"
    for _ in range(2):
        handle.detach()
        assert pipe.unet is unet
        assert repr(handle) == "Handle(StableDiffusionPipeline, detached)"
    for name in ("model", "models", "report", "context"):
        with pytest.raises(SlothError, match="StableDiffusionPipeline is detached"):
            getattr(handle, name)


def test_an_error_in_the_block_restores_too():
    pipe, given = pipelines.sd()
    plain = pipelines.run(pipe, given)
    before = state(pipe)

    def fail(*args: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), sloth_fx.attach(pipe, SPEC):
        pipelines.run(pipe, given, callback_on_step_end=fail)
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            assert not any("sloth" in name for each in module.modules() for name in vars(each))
    assert torch.equal(pipelines.run(pipe, given), plain)
    assert state(pipe)[0] == before[0]


class Stubborn:
    """A pipeline that complains once, when its second denoiser is exchanged for the ``time``-th time."""

    def __init__(self, time: int) -> None:
        self.time = time
        self.transformer, self.transformer_2 = models.one_level(), models.one_level()

    def __setattr__(self, name: str, value: Any) -> None:
        exchanged = name == "transformer_2" and name in vars(self)
        object.__setattr__(self, name, value)
        if exchanged:
            self.time -= 1
            if self.time == 0:
                raise RuntimeError("no")


def test_an_error_while_attaching_restores_too():
    pipe = Stubborn(1)
    originals = pipe.transformer, pipe.transformer_2
    before = [models.state_of(model) for model in originals]
    with pytest.raises(RuntimeError, match="no"):
        sloth_fx.attach(pipe, SPEC)
    assert (pipe.transformer, pipe.transformer_2) == originals
    assert [models.state_of(model) for model in originals] == before


def test_an_error_while_detaching_does_not_keep_the_rest():
    pipe = Stubborn(2)
    original = pipe.transformer
    handle = sloth_fx.attach(pipe, SPEC)
    with pytest.raises(RuntimeError, match="no"):
        handle.detach()
    assert pipe.transformer is original
    handle.detach()


def test_weights_are_shared_and_nothing_is_kept():
    pipe, given = pipelines.sd()
    handle = sloth_fx.attach(pipe, SPEC)
    for mine, own in zip(handle.model.parameters(), pipe.unet.parameters(), strict=True):
        assert mine.data_ptr() == own.data_ptr()
    pipelines.run(pipe, given, steps=2)
    patched, context = weakref.ref(handle.model), weakref.ref(handle.context)
    handle.detach()
    gc.collect()
    assert patched() is None
    assert context() is None


def test_the_pipeline_is_not_kept_by_its_model():
    pipe, given = pipelines.sd()
    model = sloth_fx.attach(pipe, SPEC).model
    reference = weakref.ref(pipe)
    del pipe
    gc.collect()
    assert reference() is None
    values = {"sample": given["prompt_embeds"].new_ones(2, 4, 13, 21), "timestep": 300}
    models.run(model, {**values, "encoder_hidden_states": given["prompt_embeds"]})
    assert sloth_fx.context(model).progress == pytest.approx(0.7)


def test_a_copy_of_the_model_follows_by_itself():
    pipe, given = pipelines.sd()
    with sloth_fx.attach(pipe, SPEC) as handle:
        expected = pipelines.run(pipe, given)
        pipe.unet = copy.deepcopy(handle.model)
        handle.context.at(0.0)
        assert torch.equal(pipelines.run(pipe, given), expected)
        assert sloth_fx.context(pipe.unet).progress > 0.9


def test_what_pipelines_offer_stays_sane(tmp_path):
    pipe, given = pipelines.sd()
    plain = pipelines.run(pipe, given)
    config, unet = dict(pipe.config), pipe.unet
    with sloth_fx.attach(pipe, SPEC) as handle:
        assert dict(pipe.config) == config
        assert pipe.components["unet"] is handle.model
        assert pipe.unet.config == unet.config
        assert type(pipe.unet) is type(unet)
        assert (pipe.dtype, pipe.device) == (torch.float32, torch.device("cpu"))
        changed = pipelines.run(pipe, given)
        other, context = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe), handle.context
        assert other.unet is handle.model
        pipe.save_pretrained(tmp_path)
        pipe.to(torch.float64)
        assert handle.model.dtype == torch.float64
        assert unet.dtype == torch.float32
        pipe.to(torch.float32)
        assert torch.equal(pipelines.run(pipe, given), changed)
    assert not context.driven  # what the other pipeline runs goes by its own timesteps
    assert config.items() <= dict(pipe.config).items()  # saving adds its own
    assert torch.equal(pipelines.run(pipe, given), plain)
    loaded = type(pipe).from_pretrained(tmp_path, safety_checker=None, text_encoder=None, tokenizer=None)
    assert torch.equal(pipelines.run(pipelines.quiet(loaded), given), plain)


def test_a_transformer_keeps_its_cache_contexts():
    pipe, given = pipelines.flux()
    plain = pipelines.run(pipe, given)
    with sloth_fx.attach(pipe, OFF) as handle:
        with pipe.transformer.cache_context("cond"):
            pass
        assert handle.model._diffusers_hook._module_ref is handle.model
        assert torch.equal(pipelines.run(pipe, given), plain)


def test_a_pipeline_moved_while_attached_is_whole_afterwards(monkeypatch):
    """``meta`` stands for another device. Really there, weights would be lost: so a model is not sent after them."""
    pipe, _ = pipelines.sd()
    unet = pipe.unet
    with sloth_fx.attach(pipe, SPEC):
        pipe.to("meta")
    assert pipe.unet is unet
    assert unet.device.type == "cpu"
    with sloth_fx.attach(pipe, SPEC):
        pipe.to("meta")
        monkeypatch.setattr("sloth_fx.integrations.handle._device_of", lambda model: model.device)
    assert pipe.unet is unet
    assert unet.device.type == "meta"


def test_a_transform_that_waits_for_the_first_call():
    """As it does for a denoiser that takes more than its config tells."""
    model = models.shared("one_level")
    values = models.inputs(model, timestep=600)
    waiting = sloth_fx.transform(model, SPEC, example_inputs="first call")
    assert len(sloth_fx.report(waiting)) == 0
    assert torch.equal(models.run(waiting, values), models.run(sloth_fx.transform(model, SPEC), values))
    assert len(sloth_fx.report(waiting)) == len(sloth_fx.inspect(model))


# What cannot be attached


def refused(pipe: Any, spec: Any, match: str, **options: Any) -> None:
    before = dict(vars(pipe))
    with pytest.raises(SlothError, match=match):
        sloth_fx.attach(pipe, spec, **options)
    assert dict(vars(pipe)) == before


def test_two_at_once():
    pipe, _ = pipelines.sd()
    with sloth_fx.attach(pipe, SPEC) as handle:
        refused(pipe, OFF, r"StableDiffusionPipeline\.unet is patched already: give all specs in one call")
        assert pipe.unet is handle.model
    with sloth_fx.attach(pipe, [SPEC, NearSightedTile(tile_size=5)]):
        pass


def test_what_is_no_pipeline():
    refused(
        models.one_level(),
        SPEC,
        "UNet2DConditionModel has no unet and no transformer .*: sloth_fx.transform",
    )
    refused(SimpleNamespace(unet=None, vae=3), SPEC, "SimpleNamespace has no unet and no transformer to attach to")
    refused(SimpleNamespace(unet=print), SPEC, r"unet is a builtin_function_or_method, which is no torch.nn.Module")


def test_specs_that_fit_nothing():
    pipe, _ = pipelines.sd()
    before = state(pipe)
    refused(pipe, HyperTile(tile_size=8, where=lambda site: False), r"StableDiffusionPipeline\.unet: .*where")
    refused(pipe, "slothful", "str is no spec")
    refused(pipe, SPEC, "phases=0", phases=0)
    assert state(pipe) == before


@pytest.mark.parametrize("way", ["torch.compile", "compile", "a block"])
def test_a_compiled_denoiser(way):
    pipe, _ = pipelines.sd()
    if way == "torch.compile":
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    else:
        (pipe.unet if way == "compile" else pipe.unet.down_blocks[0]).compile(backend="eager")
    refused(pipe, SPEC, r"unet is compiled already: attach to the pipeline first, and compile pipe\.unet")
