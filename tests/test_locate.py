"""Every attention site of the real models: how many, of which kind, where, how deep, on which grid."""

from collections import Counter
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

import sloth_fx
from sloth_fx import SlothError
from tests import models
from tests.zoo.registry import MODELS

FULL_SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
FULL_SDXL = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "block_out_channels": (320, 640, 1280),
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2, 10),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
FULL_SSD1B = {
    **FULL_SDXL,
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": (0, (2, 2), (4, 4)),
    "reverse_transformer_layers_per_block": ((4, 4, 10), (2, 1, 1), 1),
}

# Self-attentions by (stage, depth); each has a cross-attention beside it.
TINY = {
    "sd15": {("in", 1): 1, ("in", 2): 1, ("in", 4): 1, ("middle", 8): 1, ("out", 4): 2, ("out", 2): 2, ("out", 1): 2},
    "sdxl": {("in", 1): 1, ("in", 2): 2, ("middle", 2): 2, ("out", 2): 4, ("out", 1): 2},
    "ssd1b": {("in", 1): 1, ("in", 2): 2, ("out", 2): 3, ("out", 1): 3},
    "unconditional": {("in", 1): 1, ("in", 2): 1, ("middle", 2): 1, ("out", 2): 2, ("out", 1): 2},
}
FIRST = {"sd15": 1, "sdxl": 2, "ssd1b": 2, "unconditional": 2}  # latent rows per token at the shallowest level


def counts(report: sloth_fx.Report, kind: str) -> dict[tuple[str, float], int]:
    return Counter((each.stage, each.depth) for each in report if each.kind == kind)


def halved(size: tuple[int, int], times: int) -> tuple[int, int]:
    rows, columns = size
    for _ in range(times):
        rows, columns = (rows + 1) // 2, (columns + 1) // 2
    return rows, columns


def check_grids(report: sloth_fx.Report, size: tuple[int, int], first: int, text: int) -> None:
    for site in report:
        grid = halved(size, int(first * site.depth).bit_length() - 1)
        assert site.grid == grid, site
        assert site.q_tokens == grid[0] * grid[1]
        assert site.kv_tokens == (site.q_tokens if site.kind == "self" else text)
        assert site.text == (None if site.kind == "self" else (0, text))
        assert site.kind == ("cross" if site.path.endswith("attn2") else "self")
        assert site.stage == {"down": "in", "mid_": "middle", "up_b": "out"}[site.path[:4]]
        assert site.call == 0


@pytest.mark.parametrize("size", [(16, 24), (61, 93)])
@pytest.mark.parametrize("name", ["sd15", "sdxl", "ssd1b"])
def test_tiny_models(name, size):
    model = models.shared(name)
    report = sloth_fx.inspect(model, example_inputs=models.inputs(model, 3, *size))
    assert counts(report, "self") == counts(report, "cross") == TINY[name]
    check_grids(report, size, FIRST[name], text=7)


@pytest.mark.parametrize("size", [(16, 16), (24, 16)])
def test_tiny_unconditional_model(size):
    model = models.shared("unconditional")
    report = sloth_fx.inspect(model, example_inputs=models.inputs(model, 1, *size))
    assert counts(report, "self") == TINY["unconditional"]
    assert counts(report, "cross") == {}
    check_grids(report, size, FIRST["unconditional"], text=0)
    assert {(each.heads, each.head_dim) for each in report} == {(2, 16)}


@pytest.mark.parametrize("size", [(9, 11), (10, 5)])
def test_depth_comes_from_the_levels_also_where_the_latent_is_small(size):
    """9 rows become 5, 3, 2: two rows of nine, yet the depth is 8."""
    model = models.shared("sd15")
    report = sloth_fx.inspect(model, example_inputs=models.inputs(model, 2, *size))
    assert counts(report, "self") == TINY["sd15"]


def test_a_known_class_needs_no_inputs():
    report = sloth_fx.inspect(models.shared("sdxl"))
    assert counts(report, "self") == counts(report, "cross") == TINY["sdxl"]
    check_grids(report, (16, 16), FIRST["sdxl"], text=77)
    sites = {each.path: each for each in report}
    first = sites["down_blocks.1.attentions.0.transformer_blocks.0.attn1"]
    deeper = sites["up_blocks.0.attentions.1.transformer_blocks.1.attn2"]
    assert (first.heads, first.head_dim, first.owner) == (2, 16, "Attention")
    assert (deeper.heads, deeper.head_dim, deeper.kv_tokens) == (4, 8, 77)


def test_text_as_long_as_the_image_is_still_text():
    """13 x 21 becomes 7 x 11 = 77 tokens, as many as a prompt has."""
    model = models.shared("sdxl")
    values = models.inputs(model)
    values["encoder_hidden_states"] = torch.randn(2, 77, models.TEXT)
    report = sloth_fx.inspect(model, example_inputs=values)
    assert counts(report, "self") == counts(report, "cross") == TINY["sdxl"]
    check_grids(report, (13, 21), 2, text=77)


def test_a_batch_as_large_as_the_heads():
    model = models.sdxl(attention_head_dim=2)
    report = sloth_fx.inspect(model, example_inputs=models.inputs(model, 2))
    assert {each.heads for each in report} == {2}


def on_meta(config: dict[str, Any]) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**config)


def test_stable_diffusion_15():
    report = sloth_fx.inspect(on_meta(FULL_SD15))
    assert len(report) == 32
    assert (
        counts(report, "self")
        == counts(report, "cross")
        == {("in", 1): 2, ("in", 2): 2, ("in", 4): 2, ("middle", 8): 1, ("out", 4): 3, ("out", 2): 3, ("out", 1): 3}
    )
    check_grids(report, (64, 64), 1, text=77)
    assert {(each.heads, each.depth * 40) for each in report} == {(8, 40 * 2**i) for i in range(4)}
    assert {each.head_dim for each in report} == {40, 80, 160}


def test_stable_diffusion_xl_on_an_odd_latent():
    model = on_meta(FULL_SDXL)
    example = {
        "sample": torch.empty(2, 4, 125, 77, device="meta"),
        "timestep": 5,
        "encoder_hidden_states": torch.empty(2, 154, 2048, device="meta"),
        "added_cond_kwargs": {
            "text_embeds": torch.empty(2, 1280, device="meta"),
            "time_ids": torch.empty(2, 6, device="meta"),
        },
    }
    report = sloth_fx.inspect(model, example_inputs=example)
    assert len(report) == 140
    assert (
        counts(report, "self")
        == counts(report, "cross")
        == {("in", 1): 4, ("in", 2): 20, ("middle", 2): 10, ("out", 2): 30, ("out", 1): 6}
    )
    check_grids(report, (125, 77), 2, text=154)
    assert {(each.depth, each.heads, each.head_dim) for each in report} == {(1, 10, 64), (2, 20, 64)}


def test_ssd_1b():
    report = sloth_fx.inspect(on_meta(FULL_SSD1B))
    assert len(report) == 68
    assert (
        counts(report, "self") == counts(report, "cross") == {("in", 1): 4, ("in", 2): 8, ("out", 2): 18, ("out", 1): 4}
    )
    check_grids(report, (128, 128), 2, text=77)


def test_linear_attention_is_reported_as_such():
    """Sana's: keys times values first, with a row of ones for the sum."""
    entry = MODELS["SanaTransformer2DModel"]
    report = sloth_fx.inspect(entry.build(), example_inputs=entry.inputs())
    assert [site.kind for site in report] == ["linear", "cross"] * 2
    assert [site.stage for site in report] == ["in", "in", "out", "out"]
    assert {(site.q_tokens, site.kv_tokens) for site in report if site.kind == "linear"} == {(99, 99)}
    assert "no softmax" in report.sites[0].note
    with pytest.raises(SlothError, match=r"none .*linear, cross"):
        sloth_fx.transform(entry.build(), sloth_fx.SlothfulAttention(), example_inputs=entry.inputs())
