"""What the descriptions of trial inputs stand for."""

import pytest
import torch
from torch import nn

from sloth_fx.errors import SlothError
from sloth_fx.model_adapters.trial import Trial, TrialInputs, UnknownError


class Config(dict):
    """As diffusers' configs: read by key or by name."""

    __getattr__ = dict.__getitem__


def model(**config):
    found = nn.Linear(3, 5, dtype=torch.bfloat16)
    found.config = Config(config)
    return found


CONFIG = {"in_channels": 5, "zero": 0, "absent": None, "widths": (7, 9), "nested": [[11, 13]], "patch_size": (1, 2, 3)}


@pytest.mark.parametrize(
    ("description", "shape"),
    [
        ("batch text in_channels", (2, 17, 5)),
        ("batch absent|missing|zero|widths|in_channels", (2, 7)),
        ("nested", (11,)),
        ("in_channels+zero 4", (5, 4)),
        ("in_channels-2 text+tokens", (3, 17 + 54)),
        ("in_channels-5|widths", (7,)),
        ("frames time rows height columns width", (1, 1, 6, 12, 9, 27)),
        ("twice", (34,)),
        ("", ()),
    ],
)
def test_dimensions(description, shape):
    trial = Trial(
        model(**CONFIG),
        {"text": 17, "rows": 6, "columns": lambda trial: trial.size("rows") + 3, "twice": "text+text"},
    )
    tensor = trial.tensor(description)
    assert tuple(tensor.shape) == shape
    assert (tensor.dtype, tensor.device.type) == (torch.bfloat16, "meta")


@pytest.mark.parametrize("terms", ["missing", "zero", "absent", "in_channels-5", "in_channels+missing", "a|b"])
def test_unknown_dimensions(terms):
    with pytest.raises(UnknownError, match=terms.replace("|", r"\|").replace("+", r"\+")):
        Trial(model(**CONFIG), {}).size(terms)


def test_conditions():
    trial = Trial(model(**CONFIG), {})
    assert trial.tensor("batch if absent") is None
    assert trial.tensor("batch if zero|missing") is None
    assert trial.tensor("batch if missing|in_channels").shape == (2,)
    assert trial.tensor("batch missing if absent") is None


def test_whole_numbers_and_masks_are_real():
    trial = Trial(model(**CONFIG), {"text": 17})
    assert torch.equal(trial.tensor("long batch in_channels"), torch.zeros(2, 5, dtype=torch.int64))
    assert torch.equal(trial.tensor("bool batch text"), torch.ones(2, 17, dtype=torch.bool))
    assert trial.tensor("long").shape == ()


def test_values_within_values():
    trial = Trial(model(**CONFIG), {})
    found = trial.value({"a": ["batch", ("long batch", 3)], "b": lambda trial: trial.size("in_channels"), "c": None})
    assert [type(item) for item in found["a"]] == [torch.Tensor, tuple]
    assert found["a"][1][0].dtype == torch.int64
    assert (found["a"][1][1], found["b"], found["c"]) == (3, 5, None)


@pytest.mark.parametrize(
    ("config", "patch"),
    [
        ({}, (1, 1, 1)),
        ({"patch_size": 2}, (1, 2, 2)),
        ({"patch_size": 2, "patch_size_t": 3}, (3, 2, 2)),
        ({"patch_size": (2, 3)}, (1, 2, 3)),
        ({"patch_size": [4, 2, 3]}, (4, 2, 3)),
    ],
)
def test_patches(config, patch):
    assert Trial(model(**config), {}).patch == patch


def test_grid_ids_count_frames_rows_and_columns():
    ids = Trial(model(), {"frames": 2, "rows": 3, "columns": 5}).grid_ids(columns=4)
    assert ids.tolist() == [[t, y, x, 0] for t in range(2) for y in range(3) for x in range(5)]


def test_the_config_of_a_part_where_the_whole_has_none():
    assert Trial(nn.Sequential(nn.Identity(), model(channels=9)), {}).size("channels") == 9


class Denoiser(nn.Module):
    def forward(self, noisy, when, words=None, *, scale=1.0, **rest):
        return noisy


def denoiser(**config):
    found = Denoiser()
    found.config = config
    return found


def test_own_values_come_before_the_general_ones():
    inputs = TrialInputs(
        None, "bchw", {"when": "batch", "words": "batch text", "scale": 2.0}, values={"words": "batch 3", "scale": None}
    )
    found = inputs(denoiser(in_channels=5))
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "noisy": (2, 5, 8, 12),
        "when": (2,),
        "words": (2, 3),
    }


def test_what_may_be_left_out_is_left_out_where_it_is_not_known():
    general = {"when": "batch", "words": "batch text word_channels"}
    assert set(TrialInputs("noisy", "bchw", general)(denoiser(in_channels=5))) == {"noisy", "when"}


def test_what_is_needed_and_not_known_is_refused():
    with pytest.raises(SlothError, match=r"Denoiser: .*'when' .* \(nothing is known of it\)"):
        TrialInputs("noisy", "bchw", {})(denoiser(in_channels=5))
    with pytest.raises(SlothError, match=r"Denoiser: .*'when' .* \(the config has no a or b\)"):
        TrialInputs("noisy", "bchw", {"when": "a|b"})(denoiser(in_channels=5))
