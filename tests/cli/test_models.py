"""Opening models: what is read, and what is refused."""

import json
import shutil

import pytest
import torch
from diffusers import FluxTransformer2DModel

from sloth_fx.cli.models import latent_pixels, open_model
from sloth_fx.errors import SlothError


@pytest.mark.parametrize("part", [".", "unet", "unet/config.json", "model_index.json"])
def test_forms_of_a_path(pipeline, part):
    opened = open_model(pipeline / part)
    assert type(opened.model).__name__ == "UNet2DConditionModel"
    assert all(parameter.is_meta for parameter in opened.model.parameters())
    assert not opened.model.training
    assert latent_pixels(opened) == 8


def test_component(pipeline, tmp_path):
    folder = tmp_path / "pipe"
    (folder / "transformer_2").mkdir(parents=True)
    shutil.copy(pipeline / "unet" / "config.json", folder / "transformer_2")
    index = {"_class_name": "X", "unet": [None, None], "transformer_2": ["diffusers", "UNet2DConditionModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    assert open_model(folder).model.config.sample_size == 16
    assert open_model(folder, "transformer_2").model.config.sample_size == 16
    with pytest.raises(SlothError, match="'transfomer_2' is unknown, nearest: transformer_2"):
        open_model(folder, "transfomer_2")


def test_packed_latents_count_tokens(tmp_path):
    with torch.device("meta"):
        model = FluxTransformer2DModel(in_channels=64, num_layers=1, num_single_layers=1)
    model.save_config(tmp_path / "transformer")
    (tmp_path / "vae").mkdir()
    vae = {"block_out_channels": [8, 8, 8, 8], "latent_channels": 16}
    (tmp_path / "vae" / "config.json").write_text(json.dumps(vae))
    (tmp_path / "model_index.json").write_text(json.dumps({"transformer": ["diffusers", "FluxTransformer2DModel"]}))
    assert latent_pixels(open_model(tmp_path)) == 16


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{", "is not a JSON file"),
        ("[1]", "has no _class_name"),
        ('{"model_type": "bert"}', "has no _class_name"),
        ('{"_class_name": "UNet2DConditionModle"}', "nearest: UNet2DConditionModel"),
        ('{"_class_name": "os"}', "'os' is unknown"),
        ('{"_class_name": "UNet2DConditionModel", "block_out_channels": [7]}', "cannot be built from this"),
    ],
)
def test_foreign_configs(tmp_path, config, words):
    file = tmp_path / "config.json"
    file.write_text(config)
    with pytest.raises(SlothError, match=words):
        open_model(file)


def test_foreign_files(tmp_path, pipeline):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"\0")
    with pytest.raises(SlothError, match="single file: give a folder"):
        open_model(weights)
    with pytest.raises(SlothError, match="cannot read"):
        open_model(tmp_path)
    with pytest.raises(SlothError, match="is no pipeline"):
        open_model(pipeline / "unet", "unet")
    (tmp_path / "model_index.json").write_text(json.dumps({"vae": ["diffusers", "AutoencoderKL"]}))
    with pytest.raises(SlothError, match="no denoiser"):
        open_model(tmp_path)
