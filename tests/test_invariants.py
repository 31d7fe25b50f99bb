"""What must hold whatever the specs: nothing happens where nothing is asked, and nobody else notices."""

import copy
import json
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

import sloth_fx
from sloth_fx import NearSightedAttention, NearSightedTile, PeakDecay, Reduction, SlothError, SlothfulAttention
from tests import models, reference

OFF = Reduction(rate=1.0)
NEUTRAL = {
    "slothful": SlothfulAttention(in_=OFF, out=OFF, keep_middle=False),
    "slothful-max": SlothfulAttention(
        in_=Reduction(rate=0.0, mode="2d_max", k_blend=1.0), out=Reduction(rate=0.9, mode="1d_avg", border="crop")
    ),
    "faded": SlothfulAttention(schedule=PeakDecay(peak_time=1.0, time_decay=4.0)),
    "tile": NearSightedTile(tile_size=64),
    "near-sighted": NearSightedAttention(base_tile_size=64, peak_tile_size=64, in_=OFF, out=OFF, concat_local=True),
    "both": [SlothfulAttention(in_=OFF, out=OFF), NearSightedTile(tile_size=64, max_depth=8)],
}
SLOTHFUL = SlothfulAttention(in_=Reduction(rate=6.0, k_blend=0.5), out=Reduction(rate=4.0, v_blend=1.0))
NEAR = NearSightedAttention(base_tile_size=6, peak_tile_size=8)


def patched_at(model: nn.Module, specs: Any, progress: float) -> nn.Module:
    patched = sloth_fx.transform(model, specs)
    sloth_fx.context(patched).at(progress)
    return patched


# Neutral parameters


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_parameters_change_no_bit(name):
    model = models.shared("ssd1b")
    patched = patched_at(model, NEUTRAL[name], 0.0)
    for batch, size in ((1, (13, 21)), (2, (16, 16)), (3, (19, 29)), (4, (8, 12))):
        values = models.inputs(model, batch, *size)
        assert torch.equal(models.run(patched, values), models.run(model, values))


@pytest.mark.parametrize("name", ["sd15", "unconditional"])
def test_neutral_parameters_change_no_bit_of_any_model(name):
    model = models.shared(name)
    values = models.inputs(model, 2, 16, 28)
    for specs in (NEUTRAL["slothful"], NEUTRAL["near-sighted"]):
        patched = patched_at(model, specs, 0.0)
        assert torch.equal(models.run(patched, values), models.run(model, values))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_neutral_parameters_in_other_types_after_the_transform(dtype):
    model = models.shared("one_level")
    plain = copy.deepcopy(model).to(dtype)
    values = models.cast(models.inputs(model), dtype)
    for specs in (NEUTRAL["slothful"], NEUTRAL["near-sighted"]):
        patched = patched_at(model, specs, 0.0).to(dtype)
        assert torch.equal(models.run(patched, values), models.run(plain, values))


def test_neutral_parameters_in_channels_last():
    model = models.one_level().to(memory_format=torch.channels_last)
    values = models.inputs(model)
    values["sample"] = values["sample"].to(memory_format=torch.channels_last)
    patched = patched_at(model, NEUTRAL["both"], 0.0)
    assert torch.equal(models.run(patched, values), models.run(model, values))


# Types, formats and sizes after the transform


@pytest.mark.parametrize("specs", [SLOTHFUL, NEAR, [SLOTHFUL, NearSightedTile(tile_size=5)]], ids=["s", "n", "both"])
def test_the_formulas_hold_exactly_in_float64(specs):
    model = models.shared("sd15")
    patched = patched_at(model, specs, 0.4).double()
    values = models.inputs(model)
    out = models.run(patched, models.cast(values, torch.float64))
    expected = reference.predict(model, specs if isinstance(specs, list) else [specs], values, progress=0.4)
    assert (out - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 0.02), (torch.bfloat16, 0.1)])
def test_half_precision_stays_close(dtype, bound):
    model = models.shared("one_level")
    values = models.inputs(model)
    for specs in (SLOTHFUL, NEAR):
        patched = patched_at(model, specs, 0.4)
        expected = models.run(patched, values)
        out = models.run(patched.to(dtype), models.cast(values, dtype))
        assert out.dtype == dtype
        assert (out.float() - expected).abs().max() <= bound * expected.abs().max()


def test_a_model_in_half_precision_is_transformed_as_it_is():
    model = models.one_level().to(torch.bfloat16)
    values = models.cast(models.inputs(model), torch.bfloat16)
    out = models.run(patched_at(model, NEAR, 0.4), values)
    cast_later = patched_at(models.shared("one_level"), NEAR, 0.4).to(torch.bfloat16)
    assert torch.equal(out, models.run(cast_later, values))


def test_channels_last_changes_nothing_but_rounding():
    model = models.ssd1b().to(memory_format=torch.channels_last)
    values = models.inputs(model)
    values["sample"] = values["sample"].to(memory_format=torch.channels_last)
    for specs in (SLOTHFUL, NEAR):
        expected = reference.predict(models.shared("ssd1b"), [specs], values, progress=0.4)
        out = models.run(patched_at(model, specs, 0.4), values)
        assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_large_odd_latent():
    model = models.shared("ssd1b")
    patched = patched_at(model, NearSightedAttention(), 0.4)
    values = models.inputs(model, 1, 61, 93)
    expected = reference.predict(model, [NearSightedAttention()], values, progress=0.4)
    assert (models.run(patched, values) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_sizes_alternate():
    model = models.shared("ssd1b")
    patched = patched_at(model, NEAR, 0.4)
    small, large = models.inputs(model, 1, 13, 21), models.inputs(model, 3, 24, 16)
    first = models.run(patched, small), models.run(patched, large)
    again = models.run(patched, small), models.run(patched, large)
    assert all(map(torch.equal, first, again))


# The original model


def test_the_original_never_changes():
    model = models.one_level()
    values = models.inputs(model)
    before, state = models.run(model, values), models.state_of(model)
    patched = sloth_fx.transform(model, [SLOTHFUL, NearSightedTile(tile_size=5)])
    assert models.state_of(model) == state
    for progress in (0.0, 0.4, 1.0):
        sloth_fx.context(patched).at(progress)
        models.run(patched, values)
    models.run(patched.half(), models.cast(values, torch.float16))
    sloth_fx.inspect(model)
    assert models.state_of(model) == state
    assert torch.equal(models.run(model, values), before)


def test_a_failed_transform_leaves_the_original_as_it_was():
    model = models.sdxl()
    models.blind(model)
    values = models.inputs(model)
    before, state = models.run(model, values), models.state_of(model)
    with pytest.raises(SlothError, match="cannot be captured"):
        sloth_fx.transform(model, SLOTHFUL)
    assert models.state_of(model) == state
    assert torch.equal(models.run(model, values), before)


def test_the_clone_is_the_same_model_over_the_same_memory():
    model = models.ssd1b()
    patched = sloth_fx.transform(model, NEAR)
    assert type(patched) is type(model)
    assert patched.config == model.config
    assert list(patched.state_dict()) == list(model.state_dict())
    for (name, mine), (other, theirs) in zip(models.tensors_of(model), models.tensors_of(patched), strict=True):
        assert (name, mine.data_ptr()) == (other, theirs.data_ptr())
        assert mine is not theirs
    with torch.no_grad():
        model.conv_in.weight.mul_(2)
    assert torch.equal(patched.conv_in.weight, model.conv_in.weight)
    patched.load_state_dict(models.shared("ssd1b").state_dict())
    assert torch.equal(patched.conv_in.weight, models.shared("ssd1b").conv_in.weight)


def test_moving_or_casting_the_clone_leaves_the_original():
    model = models.one_level()
    values = models.inputs(model)
    before = models.run(model, values)
    sloth_fx.transform(model, NEAR).to(torch.bfloat16)
    sloth_fx.transform(model, NEAR).to("meta")
    sloth_fx.transform(model, NEAR).requires_grad_(False)
    for _, tensor in models.tensors_of(model):
        assert (tensor.dtype, tensor.device.type) == (torch.float32, "cpu")
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(models.run(model, values), before)


def test_tied_parameters_stay_tied():
    model = models.sdxl()
    resnet = model.mid_block.resnets[0]
    resnet.conv2.weight = resnet.conv1.weight
    theirs = sloth_fx.transform(model, NEAR).mid_block.resnets[0]
    assert theirs.conv2.weight is theirs.conv1.weight
    assert theirs.conv1.weight is not resnet.conv1.weight


# Contexts


def test_a_deep_copy_has_a_context_and_results_of_its_own():
    model = models.shared("one_level")
    values = models.inputs(model)
    patched = patched_at(model, NEAR, 1.0)
    expected = {1.0: models.run(patched, values)}
    sloth_fx.context(patched).at(0.4)
    expected[0.4] = models.run(patched, values)
    assert not torch.allclose(expected[0.4], expected[1.0], atol=0.01)
    twin = copy.deepcopy(patched)
    assert sloth_fx.context(twin) is not sloth_fx.context(patched)
    sloth_fx.context(twin).at(1.0)
    assert sloth_fx.context(patched).progress == 0.4
    for _ in range(2):
        assert torch.equal(models.run(patched, values), expected[0.4])
        assert torch.equal(models.run(twin, values), expected[1.0])
    assert sloth_fx.report(twin).to_dict() == sloth_fx.report(patched).to_dict()
    twin.conv_in.weight.data.zero_()
    assert torch.equal(models.run(patched, values), expected[0.4])


def test_a_deep_copy_before_the_first_call():
    model = models.shared("sdxl")
    wrapped = Wrapped(model)
    twin = copy.deepcopy(sloth_fx.transform(wrapped, NEAR))
    sloth_fx.context(twin).at(0.4)
    values = models.inputs(model)
    with torch.no_grad():
        out = twin(values["sample"], 500, values["encoder_hidden_states"], values["added_cond_kwargs"])
    assert torch.equal(out, models.run(patched_at(model, NEAR, 0.4), values))


def test_two_threads_do_not_see_each_other():
    model = models.shared("one_level")
    values = models.inputs(model, 1)
    pair = [sloth_fx.transform(model, SLOTHFUL), sloth_fx.transform(model, NEAR)]
    moments = [[0.4, 0.0, 0.7], [1.0, 0.3, 0.45]]

    def outputs(patched: nn.Module, times: list[float]) -> list[torch.Tensor]:
        found = []
        for progress in times:
            sloth_fx.context(patched).at(progress)
            found.append(models.run(patched, values))
        return found

    serial = [outputs(patched, times) for patched, times in zip(pair, moments, strict=True)]
    wrong: list[Any] = []
    together = threading.Barrier(3)

    def work(number: int) -> None:
        together.wait()
        try:
            for turn in range(12):
                found = outputs(pair[number], moments[number])
                if not all(map(torch.equal, found, serial[number])):
                    wrong.append((number, turn))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    together.wait()
    sloth_fx.transform(model, NEAR)  # captures while they run
    for thread in threads:
        thread.join()
    assert wrong == []


def test_undriven_models_follow_each_calls_timestep():
    model = models.shared("ssd1b")
    patched = sloth_fx.transform(model, NEAR)
    context = sloth_fx.context(patched)
    for timestep in (999, torch.tensor(600), torch.tensor([250, 250]), 0.5):
        out = models.run(patched, models.inputs(model, timestep=timestep))
        progress = 1 - float(torch.as_tensor(timestep).flatten()[0]) / 1000
        assert context.progress == pytest.approx(progress)
        context.at(context.progress)
        assert torch.equal(models.run(patched, models.inputs(model, timestep=timestep)), out)
        context.auto()


# Gradients


def test_a_training_step_through_a_patched_model():
    model = models.one_level()
    patched = patched_at(model, [SLOTHFUL, NearSightedTile(tile_size=5)], 0.4).train()
    values = models.inputs(model)
    target = torch.randn_like(values["sample"])
    optimizer = torch.optim.SGD(patched.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        loss = F.mse_loss(patched(**values).sample, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    for name, parameter in patched.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    "specs",
    [
        SLOTHFUL,
        NEAR,
        NearSightedTile(tile_size=5, concat_local=True, concat_global=True),
        SlothfulAttention(in_=Reduction(rate=6.0, mode="1d_max", v_blend=1.0), out=Reduction(rate=4.0, border="crop")),
    ],
    ids=["slothful", "near-sighted", "tile", "max"],
)
def test_gradients_match_finite_differences(specs):
    model = models.unconditional().double()
    patched = patched_at(model, specs, 0.4)
    values = models.cast(models.inputs(model, 2, 8, 12), torch.float64)
    target = torch.randn_like(values["sample"])
    directions = [torch.randn_like(parameter) for parameter in patched.parameters()]

    def loss() -> torch.Tensor:
        return (patched(**values).sample * target).mean()

    loss().backward()
    slope = sum((p.grad * d).sum() for p, d in zip(patched.parameters(), directions, strict=True))
    ends = []
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            for parameter, direction in zip(patched.parameters(), directions, strict=True):
                parameter.add_(direction, alpha=step)
            ends.append(loss())
            for parameter, direction in zip(patched.parameters(), directions, strict=True):
                parameter.sub_(direction, alpha=step)
    torch.testing.assert_close((ends[0] - ends[1]) / 2e-6, slope.detach(), rtol=1e-4, atol=1e-8)


def test_gradients_reach_the_latent():
    model = models.shared("unconditional")
    patched = patched_at(model, NEAR, 0.4)
    values = models.inputs(model, 1, 16, 24)
    values["sample"].requires_grad_()
    patched(**values).sample.sum().backward()
    assert values["sample"].grad.abs().min() > 0


# Other ways to write a model


def test_explicit_softmax_gives_what_fused_attention_gives():
    model = models.ssd1b()
    model.set_attn_processor(AttnProcessor())
    values = models.inputs(model, 3)
    for specs in ([NEAR], [SLOTHFUL, NearSightedTile(tile_size=5, concat_global=True)]):
        out = models.run(patched_at(model, specs, 0.4), values)
        expected = reference.predict(models.shared("ssd1b"), specs, values, progress=0.4)
        assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()
    neutral = patched_at(model, NEUTRAL["both"], 0.0)
    assert torch.equal(models.run(neutral, values), models.run(model, values))


def test_example_inputs_as_keywords_and_by_position():
    model = models.shared("one_level")
    values = models.inputs(model, 2, 13, 21)
    expected = models.run(patched_at(model, NEAR, 0.4), values)
    for example in (values, (values["sample"], 500, values["encoder_hidden_states"])):
        patched = sloth_fx.transform(model, NEAR, example_inputs=example)
        assert sloth_fx.report(patched).sites[0].grid == (13, 21)
        sloth_fx.context(patched).at(0.4)
        assert torch.equal(models.run(patched, values), expected)
        with torch.no_grad():
            by_position = patched(values["sample"], 500, values["encoder_hidden_states"], return_dict=False)[0]
        assert torch.equal(by_position, expected)


class Wrapped(nn.Module):
    """A class that nobody knows, with names of its own."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x, t, text, others):
        return self.unet(x, t, text, added_cond_kwargs=others, return_dict=False)[0]


def test_a_model_of_unknown_class_is_transformed_at_its_first_call():
    model = models.shared("sdxl")
    values = models.inputs(model, timestep=600)
    patched = sloth_fx.transform(Wrapped(model), NEAR)
    assert len(sloth_fx.report(patched)) == 0
    assert "first call" in str(sloth_fx.report(patched))
    with torch.no_grad():
        out = patched(values["sample"], 600, values["encoder_hidden_states"], others=values["added_cond_kwargs"])
    assert torch.equal(out, models.run(patched_at(model, NEAR, 0.4), values))
    assert sloth_fx.context(patched).progress == pytest.approx(0.4)
    acting = [site for site in sloth_fx.report(patched) if site.operators]
    assert acting
    assert all(site.path.startswith("unet.") for site in acting)


class Denoiser(nn.Module):
    """Attention as others write it: one projection for queries, keys and values, over all pixels of a feature map."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 16, 3, padding=1)
        self.qkv = nn.Linear(16, 48)
        self.leave = nn.Conv2d(16, 3, 1)

    def attend(self, features, keep=lambda tokens: tokens):
        query, key, value = self.qkv(features).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(query, keep(key), keep(value))
        return features + out.transpose(1, 2).flatten(2)

    def forward(self, latent, sigma=None):
        features = self.enter(latent)
        return self.leave(self.attend(features.flatten(2).mT).mT.reshape(features.shape))


def test_attention_of_ones_own():
    """Every 2nd row and 3rd column of keys and values, and nothing else."""
    model = Denoiser().eval()
    latent = torch.randn(2, 3, 9, 14)
    spec = SlothfulAttention(in_=Reduction(rate=6.0, long_axis="x"), schedule=sloth_fx.Constant())
    patched = sloth_fx.transform(model, spec, example_inputs=(latent,))
    with torch.no_grad():
        features = model.enter(latent)
        kept = [row * 14 + column for row in range(0, 9, 2) for column in range(0, 14, 3)]
        out = model.attend(features.flatten(2).mT, lambda tokens: tokens[:, :, kept])
        expected = model.leave(out.mT.reshape(features.shape))
        torch.testing.assert_close(patched(latent), expected)
        assert not torch.allclose(model(latent), expected, atol=1e-3)
        wide = torch.randn(1, 3, 20, 10)
        assert torch.equal(sloth_fx.transform(model, NEUTRAL["tile"])(wide), model(wide))


class Twice(Denoiser):
    """One module that attends two times."""

    def forward(self, latent, keep=lambda tokens: tokens):
        features = self.enter(latent)
        tokens = self.attend(self.attend(features.flatten(2).mT), keep)
        return self.leave(tokens.mT.reshape(features.shape))


def test_each_attention_of_one_module_is_a_site():
    inner = Twice().eval()
    model = nn.Sequential(nn.Identity(), inner)
    latent = torch.randn(2, 3, 9, 14)
    reduction = Reduction(rate=6.0, long_axis="x")  # the second half of a stack of blocks is its output
    spec = SlothfulAttention(out=reduction, schedule=sloth_fx.Constant(), where=lambda site: site.call == 1)
    patched = sloth_fx.transform(model, spec, example_inputs=(latent,))
    sites = sloth_fx.report(patched).to_dict()["sites"]
    assert [(each["path"], each["call"], each["operators"]) for each in sites] == [
        ("1", 0, []),
        ("1", 1, ["SlothfulAttention"]),
    ]
    kept = [row * 14 + column for row in range(0, 9, 2) for column in range(0, 14, 3)]
    with torch.no_grad():
        torch.testing.assert_close(patched(latent), inner(latent, lambda tokens: tokens[:, :, kept]))


class OneSize(nn.Module):
    """Runs at one size only."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Denoiser()
        self.places = nn.Parameter(torch.randn(1, 3, 9, 14))

    def forward(self, latent):
        return self.inner(latent + self.places)


def test_a_model_of_one_size_is_transformed_without_noise(capfd, caplog):
    model = OneSize().eval()
    latent = torch.randn(2, 3, 9, 14)
    patched = sloth_fx.transform(model, NEUTRAL["tile"], example_inputs=(latent,))
    with torch.no_grad():
        assert torch.equal(patched(latent), model(latent))
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


# Sites that cannot be rewritten


def test_strict_false_leaves_what_cannot_be_rewritten_and_says_so():
    model = models.sdxl()
    models.blind(model)
    patched = sloth_fx.transform(model, NEAR, strict=False)
    sloth_fx.context(patched).at(0.4)
    sites = {each.path: each for each in sloth_fx.report(patched)}
    assert sites[models.BLIND].operators == ()
    assert "cannot be captured" in sites[models.BLIND].note
    assert sum(bool(each.operators) for each in sites.values()) == 10  # of 11

    values = models.inputs(model)
    healthy = patched_at(
        models.shared("sdxl"),
        NearSightedAttention(**{**vars(NEAR), "where": lambda site: site.path != models.BLIND}),
        0.4,
    )
    assert torch.equal(models.run(patched, values), models.run(healthy, values))


def test_a_mask_that_comes_later_is_followed():
    model = models.one_level()
    patched = patched_at(model, NEAR, 0.4)
    values = models.inputs(model, 2, 13, 21)
    expected = models.run(patched, values)
    open_mask = {**values, "attention_mask": torch.ones(2, 273)}
    torch.testing.assert_close(models.run(patched, open_mask), expected)
    half = torch.ones(2, 273)
    half[:, 140:] = 0
    assert not torch.allclose(models.run(patched, {**values, "attention_mask": half}), expected, atol=1e-3)
    assert torch.equal(models.run(patched, values), expected)


# Weights on meta, reports


def test_weights_on_meta_are_enough():
    known = models.shared("ssd1b")
    with torch.device("meta"):
        model = type(known)(**known.config)
    assert len(sloth_fx.inspect(model)) == 18
    patched = sloth_fx.transform(model, [SLOTHFUL, NearSightedTile(tile_size=5)])
    assert sum(bool(each.operators) for each in sloth_fx.report(patched)) == 9
    assert all(parameter.device.type == "meta" for parameter in patched.parameters())


def test_reports_are_plain_data_and_readable():
    model = models.shared("sdxl")
    patched = sloth_fx.transform(model, [SLOTHFUL, NearSightedTile(tile_size=5)])
    report = sloth_fx.report(patched)
    data = json.loads(json.dumps(report.to_dict()))
    keys = ["path", "call", "kind", "stage", "depth", "heads", "head_dim", "q_tokens", "kv_tokens", "grid", "text"]
    assert [list(site) for site in data["sites"]] == [[*keys, "operators", "note"]] * 22
    for site in data["sites"]:
        assert site["operators"] or site["note"], site
        if site["kind"] == "self" and site["stage"] != "middle":
            tiled = site["depth"] == 1
            assert site["operators"] == ["SlothfulAttention", "NearSightedTile"][: 1 + tiled]
    for each in report:
        assert each.path in str(report)
    graph = sloth_fx.graph(patched, models.BLIND)
    targets = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    assert any("sloth_reduce" in target for target in targets)
    assert any("sloth_tile" in target for target in targets)
    assert "SlothfulAttention" not in str(sloth_fx.inspect(model))
    assert "KeyValueReduction" in repr(patched)
