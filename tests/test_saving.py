"""Weights and specs in one file: there and back to the bit, and every way a file or a model can be wrong."""

import copy
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import sloth_fx
from sloth_fx import Constant, NearSightedTile, Reduction, SlothError, SlothfulAttention, TokenMerging
from tests import models

POOLED = Reduction(rate=4.0, depth_decay=0.0, k_blend=1.0, v_blend=1.0)
SPEC = SlothfulAttention(in_=POOLED, out=POOLED, schedule=Constant())
SPECS = [SlothfulAttention(where={"stage": ["in"], "depth": (1, 2)}), NearSightedTile(tile_size=5, where="out")]


@pytest.fixture(scope="module")
def patched() -> nn.Module:
    """A tiny UNet that pools."""
    return sloth_fx.transform(models.shared("one_level"), SPEC)


@pytest.fixture
def saved(patched: nn.Module, tmp_path: Path) -> Path:
    """The same in a file."""
    path = tmp_path / "unet.safetensors"
    sloth_fx.save(patched, path)
    return path


def other_weights(name: str = "one_level") -> Any:
    model = models.MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    return model


def run(patched: nn.Module) -> torch.Tensor:
    sloth_fx.context(patched).at(0.4, sigma=1.0)
    return models.run(patched, values(patched))


def values(model: Any) -> dict[str, Any]:
    size = (12, 20) if type(model).__name__ == "UNet2DModel" else (13, 21)  # which takes no odd ones
    return models.inputs(model, 3, *size)


def held(model: nn.Module) -> dict[str, torch.Tensor]:
    """The values of a model's weights, apart from the model."""
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(tensor, other[key]) for key, tensor in one.items())


class Attend(nn.Module):
    """Pixels that attend to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(12, 36), nn.Linear(12, 12)
        self.register_buffer("gain", torch.tensor(1.5))
        self.register_buffer("shift", torch.full((12,), 0.25), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        query, key, value = self.project(tokens * self.gain + self.shift).unflatten(2, (3, 2, 6)).permute(2, 0, 3, 1, 4)
        attended: torch.Tensor = F.scaled_dot_product_attention(query, key, value)
        out: torch.Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return tokens + out


class Tied(nn.Module):
    """A denoiser that no adapter knows, with all that weights can be besides plain.

    They are tied, not contiguous, in buffers that persist, and in buffers that do not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 12, 3, padding=1).to(memory_format=torch.channels_last)
        self.blocks = nn.ModuleList(Attend() for _ in range(2))
        self.blocks[1].out.weight = self.blocks[0].out.weight

    def forward(self, sample: torch.Tensor, timestep: Any) -> Any:
        maps = self.conv(sample)
        tokens = maps.flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens)
        return SimpleNamespace(sample=tokens.transpose(1, 2).unflatten(2, maps.shape[2:]))


TOKENS = {"sample": torch.linspace(-3, 3, 3 * 4 * 7 * 11).sin().view(3, 4, 7, 11), "timestep": 500}


@pytest.mark.parametrize(
    ("name", "spec", "options"),
    [
        ("sd15", SPEC, {}),
        ("sd15", SPECS, {"phases": 3}),
        ("sdxl", [SPEC, TokenMerging(max_depth=7)], {"strict": False}),
        ("unconditional", NearSightedTile(tile_size=5), {}),
    ],
    ids=["one", "two and phases", "not strict", "no text"],
)
def test_there_and_back(name: str, spec: Any, options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    patched = sloth_fx.transform(models.shared(name), spec, **options)
    sloth_fx.save(patched, path)
    model = other_weights(name)
    loaded = sloth_fx.load(model, path)
    assert torch.equal(run(loaded), run(patched))
    expected = models.run(models.shared(name), values(model))
    assert torch.equal(models.run(model, values(model)), expected)  # its weights were replaced
    assert sloth_fx.report(loaded).to_dict() == sloth_fx.report(patched).to_dict()
    again = tmp_path / "again.safetensors"
    sloth_fx.save(loaded, again)  # specs, strict and phases too
    assert about(again) == about(path)
    assert same(load_file(again), load_file(path))


def about(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as stored:
        found: dict[str, Any] = json.loads(stored.metadata()["sloth_fx"])
        assert stored.metadata()["format"] == "pt"  # without which others do not read it
    return found


def test_the_file_is_one_of_the_original_model(tmp_path: Path) -> None:
    model, path = models.shared("sd15"), tmp_path / "unet.safetensors"
    sloth_fx.save(sloth_fx.transform(model, SPECS, strict=False, phases=4), path)
    weights = load_file(path)
    assert same({key: weights[key] for key in model.state_dict()}, dict(model.state_dict()))
    assert len(weights) == len(model.state_dict())
    assert about(path) == {
        "version": 1,
        "model": "UNet2DConditionModel",
        "specs": [json.loads(json.dumps(spec.to_dict())) for spec in SPECS],
        "strict": False,
        "phases": 4,
    }


def test_loading_is_loading_and_transforming(saved: Path) -> None:
    """The second way: by hand."""
    model = other_weights()
    model.load_state_dict(load_file(saved))
    assert torch.equal(run(sloth_fx.load(other_weights(), saved)), run(sloth_fx.transform(model, SPEC)))


def test_weights_are_shared_with_the_model(saved: Path) -> None:
    model = other_weights()
    tensors = {name: id(tensor) for name, tensor in models.tensors_of(model)}
    loaded = sloth_fx.load(model, saved)
    assert {name: id(tensor) for name, tensor in models.tensors_of(model)} == tensors
    assert [each.data_ptr() for each in loaded.parameters()] == [each.data_ptr() for each in model.parameters()]
    assert all(each.requires_grad for each in (*loaded.parameters(), *model.parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves(dtype: torch.dtype, tmp_path: Path) -> None:
    patched = sloth_fx.transform(models.one_level().to(dtype), SPEC)
    path = tmp_path / "half.safetensors"
    sloth_fx.save(patched, path)
    model = other_weights().to(dtype)
    loaded = sloth_fx.load(model, path)
    assert {tensor.dtype for tensor in load_file(path).values()} == {dtype}
    assert same(held(loaded), held(patched))
    with pytest.raises(SlothError, match=rf"weights of another dtype \(.*{dtype} there, torch.float32 here.*model.to"):
        sloth_fx.load(other_weights(), path)


def test_ties_gaps_and_buffers(tmp_path: Path) -> None:
    torch.manual_seed(1)
    original, path = Tied(), tmp_path / "tied.safetensors"
    with torch.no_grad():
        original.blocks[0].gain.fill_(2.5)
        original.blocks[0].shift.fill_(9.0)  # of the run, not of the weights
    patched = sloth_fx.transform(original, SPEC, example_inputs=TOKENS)
    assert not original.conv.weight.is_contiguous()
    sloth_fx.save(patched, path)
    assert list(load_file(path)) == sorted(original.state_dict())
    assert not [key for key in load_file(path) if "shift" in key]
    model = Tied()
    loaded: Any = sloth_fx.load(model, path, example_inputs=TOKENS)
    assert same(held(model), held(original))
    assert model.blocks[0].gain == 2.5
    assert model.blocks[0].shift[0] == 0.25
    for each in (model, loaded):
        assert each.blocks[0].out.weight is each.blocks[1].out.weight
        assert not each.conv.weight.is_contiguous()
    with torch.no_grad():
        original.blocks[0].shift.fill_(0.25)
        assert torch.equal(loaded(**TOKENS).sample, patched(**TOKENS).sample)


def test_ties_that_the_file_has_not(tmp_path: Path) -> None:
    loose = Tied()
    loose.blocks[1].out.weight = nn.Parameter(loose.blocks[0].out.weight + 1)
    path, model = tmp_path / "loose.safetensors", Tied()
    sloth_fx.save(sloth_fx.transform(loose, SPEC, example_inputs=TOKENS), path)
    before = held(model)
    with pytest.raises(SlothError, match=r"blocks.0.out.weight and blocks.1.out.weight are one tensor"):
        sloth_fx.load(model, path, example_inputs=TOKENS)
    assert same(held(model), before)


def test_ties_are_told_by_bits(tmp_path: Path) -> None:
    broken, path = Tied(), tmp_path / "nan.safetensors"
    with torch.no_grad():
        broken.blocks[0].out.weight[0, 0] = torch.nan
    sloth_fx.save(sloth_fx.transform(broken, SPEC, example_inputs=TOKENS), path)
    loaded: Any = sloth_fx.load(Tied(), path, example_inputs=TOKENS)
    assert loaded.blocks[1].out.weight[0, 0].isnan()


def test_a_transform_that_waits_for_its_first_call(tmp_path: Path) -> None:
    original, path = Tied(), tmp_path / "pending.safetensors"
    patched = sloth_fx.transform(original, SPEC)
    assert len(sloth_fx.report(patched)) == 0
    sloth_fx.save(patched, path)
    waiting, located = sloth_fx.load(Tied(), path), sloth_fx.load(Tied(), path, example_inputs=TOKENS)
    assert len(sloth_fx.report(waiting)) == 0
    assert len(sloth_fx.report(located)) == 2
    with torch.no_grad():
        expected = patched(**TOKENS).sample
        assert torch.equal(waiting(**TOKENS).sample, expected)
        assert torch.equal(located(**TOKENS).sample, expected)
        assert not torch.allclose(original(**TOKENS).sample, expected, atol=1e-3)


def test_compiled_models_have_the_same_keys(tmp_path: Path) -> None:
    model, path = models.one_level(), tmp_path / "compiled.safetensors"
    patched: Any = sloth_fx.transform(model, SPEC)
    patched.conv_in = torch.compile(patched.conv_in, backend="eager")
    assert any("_orig_mod" in key for key in patched.state_dict())
    sloth_fx.save(torch.compile(patched, backend="eager"), path)
    assert list(load_file(path)) == sorted(model.state_dict())


def test_a_file_is_replaced_whole_or_not_at_all(
    saved: Path, patched: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def fails(weights: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half of it")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("sloth_fx.saving.save_file", fails)
        with pytest.raises(SlothError, match=r"cannot write .*unet.safetensors.*no space left"):
            sloth_fx.save(patched, saved)
    assert saved.read_bytes() == before
    assert [each.name for each in saved.parent.iterdir()] == ["unet.safetensors"]
    sloth_fx.save(patched, saved)
    assert len(load_file(saved)) == len(patched.state_dict())
    assert [each.name for each in saved.parent.iterdir()] == ["unet.safetensors"]


class Ramp:
    clock = "progress"

    def ratio(self, moment: Any) -> float:
        return 1.0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (SlothfulAttention(where=lambda site: site.stage == "out"), "where=.* has no JSON form.*save_file"),
        (SlothfulAttention(schedule=Ramp()), "schedule=.*Ramp.* has no JSON form.*save_file"),
    ],
    ids=["where", "schedule"],
)
def test_specs_that_cannot_be_written(spec: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(SlothError, match="cannot save this UNet2DConditionModel.*" + message):
        sloth_fx.save(sloth_fx.transform(models.shared("one_level"), spec), tmp_path / "unet.safetensors")
    assert list(tmp_path.iterdir()) == []


class Packed(torch.Tensor):
    """Stands for quantised weights and shards."""


class Remembers(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"seen": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


def to_meta(model: Any) -> None:
    model.conv.to("meta")


def to_packed(model: Any) -> None:
    model.blocks[0].gain = model.blocks[0].gain.as_subclass(Packed)


def to_sparse(model: Any) -> None:
    model.blocks[0].gain = torch.eye(3).to_sparse()


def to_extra(model: Any) -> None:
    model.extra = Remembers(2, 3)


UNWRITABLE = [
    (to_meta, "conv.weight is on meta"),
    (to_packed, "blocks.0.gain is a Packed and no plain tensor"),
    (to_sparse, "blocks.0.gain is a torch.sparse_coo and no plain tensor"),
    (to_extra, "extra._extra_state is a dict and no tensor"),
]


@pytest.mark.parametrize(("change", "message"), UNWRITABLE, ids=[change.__name__ for change, _ in UNWRITABLE])
def test_weights_that_are_no_plain_tensors(change: Any, message: str, tmp_path: Path) -> None:
    patched, path = sloth_fx.transform(Tied(), SPEC, example_inputs=TOKENS), tmp_path / "tied.safetensors"
    sloth_fx.save(patched, path)
    change(patched)
    with pytest.raises(SlothError, match=message):
        sloth_fx.save(patched, tmp_path / "other.safetensors")
    model = Tied()
    change(model)
    with pytest.raises(SlothError, match=message):
        sloth_fx.load(model, path, example_inputs=TOKENS)
    assert [each.name for each in tmp_path.iterdir()] == ["tied.safetensors"]


def test_a_dtype_that_the_format_has_not(tmp_path: Path) -> None:
    model = Tied()
    model.blocks[0].gain = torch.tensor(1.5, dtype=torch.complex128)
    with pytest.raises(SlothError, match=r"cannot write .*complex128"):
        sloth_fx.save(sloth_fx.transform(model, SPEC), tmp_path / "tied.safetensors")


def test_models_of_the_wrong_state(saved: Path, patched: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(SlothError, match="UNet2DConditionModel is no patched model"):
        sloth_fx.save(models.shared("one_level"), tmp_path / "plain.safetensors")
    with pytest.raises(SlothError, match="patched already"):
        sloth_fx.load(patched, saved)
    with pytest.raises(SlothError, match="compiled already"):
        sloth_fx.load(torch.compile(models.one_level(), backend="eager"), saved)
    with pytest.raises(SlothError, match=r"SimpleNamespace is no torch.nn.Module; pass its unet"):
        sloth_fx.load(SimpleNamespace(unet=patched), saved)  # type: ignore[arg-type]


def test_paths(patched: nn.Module, tmp_path: Path) -> None:
    model = models.shared("one_level")
    for folder in (tmp_path, str(tmp_path)):
        with pytest.raises(SlothError, match=r"is a folder: name a file, such as .*model.safetensors"):
            sloth_fx.save(patched, folder)
        with pytest.raises(SlothError, match="is a folder"):
            sloth_fx.load(model, folder)
    with pytest.raises(SlothError, match=r"there is no folder .*none"):
        sloth_fx.save(patched, tmp_path / "none" / "unet.safetensors")
    with pytest.raises(SlothError, match=r"cannot read .*none.safetensors"):
        sloth_fx.load(model, tmp_path / "none.safetensors")
    with pytest.raises(SlothError, match="3 is not a path"):
        sloth_fx.load(model, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("cut", [lambda data: data[:-1], lambda data: data[:100], lambda data: b"", lambda data: b"PK"])
def test_files_that_are_damaged(cut: Any, saved: Path) -> None:
    saved.write_bytes(cut(saved.read_bytes()))
    with pytest.raises(SlothError, match=r"unet.safetensors' is no safetensors file, or not the whole of one"):
        sloth_fx.load(other_weights(), saved)


def test_pickles_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "unet.bin"
    torch.save(models.shared("one_level").state_dict(), path)
    with pytest.raises(SlothError, match="is no safetensors file"):
        sloth_fx.load(other_weights(), path)


def test_a_file_from_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "unet.safetensors"
    for metadata in (None, {"format": "pt"}):
        save_file(models.shared("one_level").state_dict(), path, metadata)
        with pytest.raises(SlothError, match=r"no spec.*load_state_dict\(.*sloth_fx.transform\(model, spec\)"):
            sloth_fx.load(other_weights(), path)


NEWER = {"version": 2, "type": "SlothfulAttention"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2, "specs": None}, "it is of version 2, newer than what this sloth_fx reads, 1"),
        ({"specs": [SPEC.to_dict(), NEWER]}, r"spec\[1\]: version=2 is newer"),
        ({"specs": [{"version": 1, "type": "SlothfullAttention"}]}, "nearest: SlothfulAttention"),
        ({"specs": 3}, "3 is not a JSON object"),
        ({"specs": []}, "the spec is empty"),
        ({"strict": "yes"}, "strict='yes' is refused"),
        ({"phases": 0}, "phases=0"),
        ("{not json", "is damaged: JSONDecodeError"),
        ("[" * 100_000, "is damaged"),
        ("[1, 2]", "is damaged: TypeError"),
        ('{"version": 1}', "is damaged: KeyError"),
    ],
)
def test_metadata_that_is_wrong(change: Any, message: str, saved: Path) -> None:
    text = change if isinstance(change, str) else json.dumps({**about(saved), **change})
    save_file(load_file(saved), saved, {"sloth_fx": text})
    model = other_weights()
    before, state = held(model), models.state_of(model)
    with pytest.raises(SlothError, match=message):
        sloth_fx.load(model, saved)
    assert same(held(model), before)
    assert models.state_of(model) == state


def rewritten(saved: Path, change: Any) -> None:
    """The file again, with other weights."""
    weights = load_file(saved)
    change(weights)
    save_file(weights, saved, {"sloth_fx": json.dumps(about(saved))})


def renamed(weights: dict[str, torch.Tensor]) -> None:
    for name in ("weight", "bias"):
        weights[f"conv_inn.{name}"] = weights.pop(f"conv_in.{name}")


def short(weights: dict[str, torch.Tensor]) -> None:
    del weights["conv_out.bias"]


def reshaped(weights: dict[str, torch.Tensor]) -> None:
    weights["conv_in.weight"] = weights["conv_in.weight"][:, :3].contiguous()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            renamed,
            r"does not fit this UNet2DConditionModel: 2 keys only it has: conv_inn.bias \(nearest: conv_in.bias\), .*"
            r"2 keys only the model has: conv_in.weight \(nearest: conv_inn.weight\).*saved from a UNet2DCond",
        ),
        (short, r"1 keys only the model has: conv_out.bias \(nearest: .*saved from a UNet2DConditionModel\)"),
        (reshaped, r"1 weights of another shape \(conv_in.weight: \(16, 3, 3, 3\) there, \(16, 4, 3, 3\) here\)"),
    ],
)
def test_weights_of_another_model(change: Any, message: str, saved: Path) -> None:
    rewritten(saved, change)
    model = other_weights()
    before, state = held(model), models.state_of(model)
    with pytest.raises(SlothError, match=message):
        sloth_fx.load(model, saved)
    assert same(held(model), before)
    assert models.state_of(model) == state


def test_a_failed_transform_leaves_the_model_as_it_was(saved: Path) -> None:
    spec = {**SPEC.to_dict(), "where": "nowhere.*"}
    save_file(load_file(saved), saved, {"sloth_fx": json.dumps({**about(saved), "specs": [spec]})})
    model = other_weights()
    before, state = held(model), models.state_of(model)
    with pytest.raises(SlothError, match=re.escape("nowhere.*")):
        sloth_fx.load(model, saved)
    assert same(held(model), before)
    assert models.state_of(model) == state


def test_a_copy_of_a_patched_model_is_saved_as_well(saved: Path, patched: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "copy.safetensors"
    sloth_fx.save(copy.deepcopy(patched), path)
    assert same(load_file(path), load_file(saved))
    assert about(path) == about(saved)
