"""Self-attention guidance of a model by hand, against the paper's equations with whole maps, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import sloth_fx
from sloth_fx import NAG, SAG, NoiseSchedule, SlothError
from sloth_fx.prediction import Prediction
from tests import models
from tests.integrations.pipelines import flux, noise, sd3
from tests.perturbed_by_hand import exchanged

LATENT = (13, 21)
MIDDLE = (7, 11)
TEXT = 6
MIDDLE_SITE = 2  # the third attention that runs, after both of the only block above


def unet(**changes: Any) -> Any:
    return models.two_levels(**changes).double()


def given(batch: int = 4, timestep: float = 500.0) -> dict[str, Any]:
    latent = noise(batch // 2, 4, *LATENT).double()
    return {
        "sample": torch.cat([latent, latent]),
        "timestep": torch.tensor(timestep),
        "encoder_hidden_states": noise(batch, TEXT, models.TEXT, seed=2).double(),
    }


def blurred(image: Tensor, sigma: float) -> Tensor:
    """By padding and convolution, a kernel of four sigma to each side, of the last two axes."""
    if sigma == math.inf:
        return image.mean((-2, -1), keepdim=True).expand_as(image)
    reach = [min(math.ceil(4 * sigma), side - 1) for side in image.shape[-2:]]
    kernels = [torch.exp(-0.5 * (torch.arange(-r, r + 1).double() / sigma) ** 2) for r in reach]
    kernel = torch.outer(*(each / each.sum() for each in kernels))[None, None]
    padded = F.pad(image.flatten(0, -3).unsqueeze(1), (reach[1], reach[1], reach[0], reach[0]), mode="reflect")
    return F.conv2d(padded, kernel).view(image.shape)


class Map:
    """Attention with whole matrices, which are kept."""

    def __init__(self) -> None:
        self.matrices: list[Tensor] = []

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **options: Any) -> Tensor:
        assert attn_mask is None
        self.matrices.append((query @ key.mT * query.shape[-1] ** -0.5).softmax(-1))
        return self.matrices[-1] @ value


def as_noise(kind: str, x: Tensor, prediction: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """(x0, noise) of what a model predicts, and the way back is `as_prediction`."""
    a, b = 1 / math.sqrt(1 + sigma**2), sigma / math.sqrt(1 + sigma**2)
    if kind == "epsilon":
        return (x - b * prediction) / a, prediction
    if kind == "v_prediction":
        return a * x - b * prediction, b * x + a * prediction
    if kind == "sample":
        return prediction, (x - a * prediction) / b
    share = sigma / (1 + sigma)
    return x - share * prediction, x + (1 - share) * prediction


def renoised(kind: str, clean: Tensor, own: Tensor, sigma: float) -> Tensor:
    if kind == "flow":
        return (clean + sigma * own) / (1 + sigma)
    return (clean + sigma * own) / math.sqrt(1 + sigma**2)


def as_prediction(kind: str, x: Tensor, own: Tensor, sigma: float) -> Tensor:
    """What the model would have predicted for this noise."""
    a, b = 1 / math.sqrt(1 + sigma**2), sigma / math.sqrt(1 + sigma**2)
    if kind == "flow":
        share = sigma / (1 + sigma)
        return own - (x - share * own) / (1 - share)
    clean = (x - b * own) / a
    return {"epsilon": own, "v_prediction": a * own - b * clean, "sample": clean}[kind]


def steered(model: Any, call: dict[str, Any], spec: SAG, kind: str, sigma: float, rows: slice) -> tuple[Tensor, Tensor]:
    """(prediction of all rows, guided prediction of ``rows``)."""
    maps = Map()
    with torch.no_grad():
        with exchanged([MIDDLE_SITE], maps):
            prediction = model(**call).sample
        x, p = call["sample"][rows], prediction[rows]
        clean, own = as_noise(kind, x, p, sigma)
        mask = (maps.matrices[0][rows].mean(1).sum(1) > spec.threshold).double().view(-1, 1, *MIDDLE)
        mask = F.interpolate(mask, LATENT)
        degraded = mask * blurred(clean, spec.blur_sigma) + (1 - mask) * clean
        moved = renoised(kind, degraded, own, sigma)
        call = {**call, "sample": moved, "encoder_hidden_states": call["encoder_hidden_states"][rows]}
        _, other = as_noise(kind, moved, model(**call).sample, sigma)
    return prediction, as_prediction(kind, x, own + spec.scale * (own - other), sigma)


def patched_of(model: Any, spec: Any, kind: Any = "epsilon") -> tuple[Any, Any]:
    patched = sloth_fx.transform(model, spec)
    context = sloth_fx.context(patched)
    context.prediction = kind
    return patched, context


SPECS = [SAG(), SAG(scale=1.5, blur_sigma=2.5, threshold=0.9), SAG(blur_sigma=math.inf), SAG(blur_sigma=30.0)]


@pytest.mark.parametrize("spec", SPECS, ids=["default", "wider", "mean", "wider than the latent"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_the_equations_of_the_paper(kind: str, spec: SAG) -> None:
    model, call, sigma = unet(), given(), 1.7
    patched, context = patched_of(model, spec, kind)
    context.at(0.5, sigma=sigma)
    _, expected = steered(model, call, spec, kind, sigma, slice(0, 4))
    with torch.no_grad():
        found = patched(**call).sample
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_the_unconditional_rows_are_degraded_and_all_get_what_comes_of_it() -> None:
    model, call, sigma, spec = unet(), given(), 1.7, SAG()
    patched, context = patched_of(model, spec)
    context.at(0.5, sigma=sigma)
    context.rows = ("uncond", "cond")
    prediction, uncond = steered(model, call, spec, "epsilon", sigma, slice(0, 2))
    change = uncond - prediction[:2]
    with torch.no_grad():
        found = patched(**call).sample
    torch.testing.assert_close(found, prediction + torch.cat([change, change]), rtol=1e-9, atol=1e-9)
    own, other = found.chunk(2)
    u, c = prediction.chunk(2)
    torch.testing.assert_close(own + 7.5 * (other - own), u + 7.5 * (c - u) + change, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("weight", [7.5, 0.5])
def test_calls_with_one_text_each(weight: float) -> None:
    model, call, sigma, spec = unet(), given(2), 1.7, SAG()
    patched, context = patched_of(model, spec)
    context.at(0.5, sigma=sigma)
    prediction, guided = steered(model, call, spec, "epsilon", sigma, slice(0, 2))
    context.guidance_scale = weight
    with torch.no_grad():
        cond = patched(**call).sample
        context.rows = ("uncond",)
        uncond = patched(**call).sample
    torch.testing.assert_close(cond, prediction, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close((1 - weight) * (uncond - prediction), guided - prediction, rtol=1e-8, atol=1e-8)


def test_rescaling() -> None:
    call = given()
    patched, context = patched_of(unet(), SAG(scale=2.0, rescale=1.0))
    context.at(0.5, sigma=1.7)
    with torch.no_grad():
        found, plain = patched(**call).sample, unet()(**call).sample
    torch.testing.assert_close(found.std((1, 2, 3)), plain.std((1, 2, 3)))
    assert (found - plain).abs().max() > 1e-3


def test_the_level_is_that_of_the_call() -> None:
    """Whoever counts steps does not say how noisy the latent is: that its own timestep says."""
    model, call = unet(), given(timestep=333.0)
    patched, context = patched_of(model, SAG())
    sigma = NoiseSchedule().sigma(333)
    _, expected = steered(model, call, SAG(), "epsilon", sigma, slice(0, 4))
    for drive in (lambda: context.auto(), lambda: context.step(2, 10), lambda: context.at(0.1)):
        drive()
        with torch.no_grad():
            torch.testing.assert_close(patched(**call).sample, expected, rtol=1e-8, atol=1e-8)
        assert context.sigma == pytest.approx(sigma)


def test_only_in_its_part_of_the_run() -> None:
    model, call = unet(), given()
    patched, context = patched_of(model, SAG(start=0.25, stop=0.5))
    with torch.no_grad():
        plain = model(**call).sample
        changed = []
        for step in range(8):
            context.step(step, 8)
            changed.append(not torch.equal(patched(**call).sample, plain))
    assert changed == [False, False, True, True, False, False, False, False]


def test_a_flow_in_joint_attention() -> None:
    model = sd3()[0].transformer.double()
    share, grid, text = 0.6, (5, 7), 6
    call = {
        "hidden_states": noise(2, 4, *grid).double(),
        "timestep": torch.full((2,), 1000 * share, dtype=torch.float64),
        "encoder_hidden_states": noise(2, text, 24, seed=2).double(),
        "pooled_projections": noise(2, 12).double(),
    }
    maps = Map()
    with torch.no_grad():
        with exchanged([1], maps):
            prediction = model(**call).sample
        image = maps.matrices[0][:, :, : grid[0] * grid[1], : grid[0] * grid[1]].mean(1).sum(1)
        mask = (image > image.mean(1, keepdim=True)).double().view(-1, 1, *grid)
        x = call["hidden_states"]
        clean, own = as_noise("flow", x, prediction, share / (1 - share))
        moved = (1 - share) * (mask * blurred(clean, 1.0) + (1 - mask) * clean) + share * own
        other = model(**{**call, "hidden_states": moved}).sample
    expected_noise = own + 0.75 * (own - (moved + (1 - share) * other))
    expected = expected_noise - (x - share * expected_noise) / (1 - share)
    patched, _ = patched_of(model, SAG(where="transformer_blocks.1.*"), "flow")
    with torch.no_grad():
        torch.testing.assert_close(patched(**call).sample, expected, rtol=1e-8, atol=1e-8)


def test_packed_tokens() -> None:
    """A latent that is packed is blurred on the grid of its tokens."""
    model = flux()[0].transformer.double()
    rows, columns = 5, 7
    ids = torch.zeros(rows * columns, 3, dtype=torch.float64)
    ids[:, 1], ids[:, 2] = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
    call = {
        "hidden_states": noise(2, rows * columns, 16).double(),
        "timestep": torch.full((2,), 0.6, dtype=torch.float64),
        "encoder_hidden_states": noise(2, TEXT, 24, seed=2).double(),
        "pooled_projections": noise(2, 12).double(),
        "img_ids": ids,
        "txt_ids": torch.zeros(TEXT, 3, dtype=torch.float64),
    }
    maps = Map()
    with torch.no_grad():
        with exchanged([0], maps):
            prediction = model(**call).sample
        image = maps.matrices[0][:, :, TEXT:, TEXT:].mean(1).sum(1)
        mask = (image > image.mean(1, keepdim=True)).double().unsqueeze(-1)
        x = call["hidden_states"]
        clean, own = as_noise("flow", x, prediction, 1.5)
        smooth = blurred(clean.mT.unflatten(2, (rows, columns)), 1.0).flatten(2).mT
        moved = 0.4 * (mask * smooth + (1 - mask) * clean) + 0.6 * own
        other = model(**{**call, "hidden_states": moved}).sample
    noised = own + 0.75 * (own - (moved + 0.4 * other))
    patched, context = patched_of(model, SAG(where="transformer_blocks.0.*"), "flow")
    with torch.no_grad():
        found = patched(**call).sample
    assert context.sigma == pytest.approx(1.5)
    torch.testing.assert_close(found, noised - (x - 0.6 * noised) / 0.4, rtol=1e-8, atol=1e-8)


def test_more_channels_than_the_latent_has() -> None:
    """Of an inpainting model only the noisy channels are degraded, the mask and the image are kept."""
    model = unet(in_channels=9)
    call = given()
    call["sample"] = torch.cat([call["sample"], noise(4, 5, *LATENT, seed=9).double()], 1)
    patched, context = patched_of(model, SAG())
    context.at(0.5, sigma=1.7)
    seen: list[Tensor] = []
    patched.conv_in.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        patched(**call)
    first, second = seen
    torch.testing.assert_close(second[:, 4:], first[:, 4:], rtol=0, atol=0)
    assert (second[:, :4] - first[:, :4]).abs().max() > 0.01


def test_with_a_negative_text() -> None:
    """Rows that no negative text guides are not guided by one in the second call either."""
    model, call = unet(), given()
    negative = noise(1, TEXT, models.TEXT, seed=8).double()
    patched, context = patched_of(model, [NAG(), SAG()])
    context.at(0.5, sigma=1.7)
    context.set_negative(encoder_hidden_states=negative)
    context.rows = ("uncond", "cond")
    alone, other = patched_of(model, NAG(), None)
    other.at(0.5, sigma=1.7)
    other.set_negative(encoder_hidden_states=negative)
    other.rows = ("uncond", "cond")
    prediction, uncond = steered(model, call, SAG(), "epsilon", 1.7, slice(0, 2))
    change = uncond - prediction[:2]
    with torch.no_grad():
        found, guided = patched(**call).sample, alone(**call).sample
    torch.testing.assert_close(found, guided + torch.cat([change, change]), rtol=1e-8, atol=1e-8)


def test_one_graph_for_all_steps() -> None:
    call = {name: each.float() for name, each in given().items()}
    patched, context = patched_of(unet().float(), SAG())
    context.rows = ("uncond", "cond")
    context.at(0.1, sigma=9.0)
    with torch.no_grad():
        eager = patched(**call).sample
        counter = CompileCounterWithBackend("aot_eager")
        torch._dynamo.reset()
        compiled = torch.compile(patched, backend=counter, fullgraph=True)
        torch.testing.assert_close(compiled(**call).sample, eager, rtol=1e-4, atol=1e-4)
        frames = counter.frame_count
        for step in range(1, 5):
            context.at(0.1 + step / 10, sigma=9.0 / step)
            found = compiled(**call).sample
            assert counter.frame_count == frames
        torch.testing.assert_close(found, patched(**call).sample, rtol=1e-4, atol=1e-4)


def test_what_has_to_be_said() -> None:
    call = given()
    patched, context = patched_of(unet(), SAG(), None)
    with pytest.raises(SlothError, match=r"what the model predicts: .*context\(model\)\.prediction = \"epsilon\""):
        patched(**call)
    with pytest.raises(SlothError, match=r"prediction='eps': one of epsilon"):
        context.prediction = "eps"
    context.prediction = Prediction("epsilon")
    context.at(0.5, sigma=1.0)
    context.rows = ("uncond", "uncond")
    with pytest.raises(SlothError, match=r"unconditional call by s / \(1 - w\)"):
        patched(**call)
    context.guidance_scale = 1.0
    with pytest.raises(SlothError, match="other than 1"):
        patched(**call)


def test_a_latent_without_noise_is_left_alone() -> None:
    model, call = unet(), given()
    patched, context = patched_of(model, SAG())
    context.at(1.0, sigma=0.0)
    with torch.no_grad():
        assert torch.equal(patched(**call).sample, model(**call).sample)
