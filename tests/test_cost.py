"""What is counted on paper is what the attention kernels are given."""

import json
import math
from collections import defaultdict

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sloth_fx
from sloth_fx.cost import Work, estimate, work_of
from sloth_fx.operators import KeyLayout
from sloth_fx.plan import SitePlan
from sloth_fx.site import AttentionSite
from sloth_fx.spec import (
    NAG,
    HyperTile,
    NearSightedAttention,
    NearSightedTile,
    Reduction,
    SlothfulAttention,
    TokenDownsample,
    TokenMerging,
)
from tests.integrations.pipelines import sd3
from tests.models import inputs, shared

ROWS, COLUMNS, STEPS = 13, 21, 3
SPECS = {
    "slothful": SlothfulAttention(),
    "cropped": SlothfulAttention(in_=Reduction(rate=5.0, border="crop"), out=Reduction(rate=3.0, mode="1d_max")),
    "tile": NearSightedTile(tile_size=5, max_depth=3),
    "near-sighted": NearSightedAttention(base_tile_size=7, peak_tile_size=9),
    "downsample": TokenDownsample(factors=(3, 2)),
    "hyper-tile": HyperTile(tile_size=32, max_depth=1),
    "merging": TokenMerging(ratio=0.4, max_depth=1),
    "merging keys": TokenMerging(ratio=0.3, tokens="kv"),
    "merging queries": TokenMerging(ratio=0.6, tokens="q", cell=(3, 2)),
    "merging in tiles": [TokenMerging(ratio=0.5), NearSightedTile(tile_size=6, max_depth=3)],
    "merging over pooled": [TokenMerging(ratio=0.5), SlothfulAttention()],
}


class Kernels(TorchDispatchMode):
    """Operations of both products in the attention kernels, by what these are called with."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.startswith("_scaled_dot_product"):
            query, key = args[:2]
            self.flops += 2 * 2 * math.prod(query.shape) * key.shape[2]
        return func(*args, **(kwargs or {}))


def measured(model, spec, given, phases=None):
    """Operations per sample, for each step."""
    return measured_in(sloth_fx.transform(model, spec, phases=phases), given)


def measured_in(patched, given):
    found = []
    for step in range(STEPS):
        sloth_fx.context(patched).step(step, STEPS)
        with torch.no_grad(), Kernels() as kernels:
            patched(**given)
        found.append(kernels.flops / next(iter(given.values())).shape[0])
    return found


@pytest.mark.parametrize("name", SPECS)
def test_operations_are_those_of_the_kernels(name):
    model, spec = shared("sd15"), SPECS[name]
    given = inputs(model, batch=3, height=ROWS, width=COLUMNS)
    cost = estimate(model, spec, (ROWS, COLUMNS), steps=STEPS, text=7)
    assert [cost.flops(step) for step in range(STEPS)] == measured(model, spec, given)


def joint_inputs():
    """For the transformer of Stable Diffusion 3."""
    text = {"encoder_hidden_states": torch.randn(3, 7, 24), "pooled_projections": torch.randn(3, 12)}
    return {"hidden_states": torch.randn(3, 4, ROWS, COLUMNS), **text, "timestep": torch.full((3,), 500.0)}


@pytest.mark.parametrize("name", ["sd15", "joint"])
def test_guided_operations_are_those_of_the_kernels(name):
    """With keys of the negative text at hand, and in two branches that share the image."""
    model = shared("sd15") if name == "sd15" else sd3()[0].transformer
    given = inputs(model, batch=3, height=ROWS, width=COLUMNS) if name == "sd15" else joint_inputs()
    specs = [NAG(start=0.3, stop=0.6), *([NearSightedTile(tile_size=5, max_depth=1)] if name == "sd15" else [])]
    cost = estimate(model, specs, (ROWS, COLUMNS), steps=STEPS, text=7)
    patched = sloth_fx.transform(model, specs)
    context = sloth_fx.context(patched)
    context.set_negative(encoder_hidden_states=given["encoder_hidden_states"][:1])
    context.step(1, STEPS)
    patched(**given)  # the negative keys are computed
    assert [cost.flops(step) for step in range(STEPS)] == measured_in(patched, given)


def test_operations_without_operators():
    model = shared("sd15")
    given = inputs(model, batch=3, height=ROWS, width=COLUMNS)
    with torch.no_grad(), Kernels() as kernels:
        model(**given)
    cost = estimate(model, SlothfulAttention(), (ROWS, COLUMNS), steps=1, text=7)
    assert cost.flops_before() == kernels.flops / 3


def test_phases_are_those_of_the_context():
    model, spec = shared("sd15"), SlothfulAttention()
    given = inputs(model, batch=2, height=ROWS, width=COLUMNS)
    cost = estimate(model, spec, (ROWS, COLUMNS), steps=STEPS, text=7, phases=2)
    assert [cost.flops(step) for step in range(STEPS)] == measured(model, spec, given, phases=2)
    assert cost.graphs == 2
    assert [len(span) for span in cost.spans()] == [2, 1]


def test_graphs_are_those_of_the_context():
    model, spec = shared("one_level"), NearSightedAttention(base_tile_size=4, peak_tile_size=7, max_depth=3)
    cost = estimate(model, spec, (ROWS, COLUMNS), steps=11)
    patched = sloth_fx.transform(model, spec)
    sloth_fx.context(patched).resize((ROWS, COLUMNS))
    assert cost.graphs == len(sloth_fx.context(patched).moments(11))
    assert sum(map(len, cost.spans())) == 11


def test_memory_is_that_of_keys_and_values():
    model = shared("one_level")
    cost = estimate(model, TokenDownsample(factors=(4,)), (ROWS, COLUMNS), steps=2, text=9, number_bytes=2)
    channels, text = 16, 9
    whole, thin = ROWS * COLUMNS, math.ceil(ROWS / 4) * math.ceil(COLUMNS / 4)
    layers = sum(site.site.kind == "self" for site in cost.sites)
    assert cost.bytes_before() == layers * 2 * 2 * channels * (whole + text)
    assert cost.bytes(0) == layers * 2 * 2 * channels * (thin + text)
    assert cost.bytes_left == pytest.approx((thin + text) / (whole + text))


def test_a_joint_sequence_by_hand():
    """4 x 6 image tokens and 5 of text, in tiles of 2 x 3 with keys pooled by 2 x 1."""
    site = AttentionSite(
        path="attn",
        call=0,
        owner="Attention",
        kind="joint",
        stage="in",
        depth=1,
        heads=2,
        head_dim=8,
        q_tokens=29,
        kv_tokens=29,
        grid=(4, 6),
        divisors=(1, 1),
        text=(0, 5),
    )
    layout = KeyLayout((4, 6), window=(2, 1), tile=(2, 3), samples=(4, 6))
    image = 24 * (3 + 1 + 5)  # keys of a tile, one sample, text
    text = 5 * (4 * 3 + 5)  # keys of all tiles, text
    plan = SitePlan(site=site, shallowest=site, deepest=1.0)
    assert work_of(plan, layout, others=(5, 5)) == Work(29, image + text, 4 * 3 + 1 + 5)


def test_joint_sequences_grow_with_image_and_text():
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
        )
    cost = estimate(model, SlothfulAttention(), (9, 15), steps=3, text=31)
    assert {each.before for each in cost.sites} == {Work(166, 166**2, 166)}
    assert cost.flops(1) < cost.flops_before()


def test_frames_and_pixel_columns_are_sequences_of_their_own():
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        model = diffusers.UNet3DConditionModel(
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=24,
            attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        )
    cost = estimate(model, TokenDownsample(), (7, 10, 14), steps=1, text=4)
    found = defaultdict(set)
    for each in cost.sites:
        found[each.site.kind, each.site.depth].add(each.before)
    assert Work(7 * 140, 7 * 140**2, 7 * 140) in found["self", 1]
    assert Work(7 * 140, 7 * 140 * 4, 7 * 4) in found["cross", 1]
    assert Work(7 * 140, 7**2 * 140, 7 * 140) in found["temporal", 1]


def test_data_is_ready_for_json():
    cost = estimate(shared("sd15"), SlothfulAttention(), (ROWS, COLUMNS), steps=3)
    data = json.loads(json.dumps(cost.to_dict()))
    assert data["latent"] == [1, ROWS, COLUMNS]
    assert data["flops_left"] == cost.flops_left < 1
    assert sum(site["steps"][1]["flops"] for site in data["sites"]) == cost.flops(1) == data["steps"][1]["flops"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"steps": 0}, "steps=0"), ({"steps": 3, "text": 0}, "text=0"), ({"steps": 3, "latent": (5,)}, "rows, columns")],
)
def test_numbers_that_make_no_sense(changes, words):
    given = {"latent": (ROWS, COLUMNS), **changes}
    with pytest.raises(sloth_fx.SlothError, match=words):
        estimate(shared("sd15"), SlothfulAttention(), **given)
