"""Denoisers in the manner of other code bases, which the library has never heard of: their inputs are given."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import sloth_fx
from sloth_fx.spec import Spec
from tests import foreign, foreign_sequences
from tests.zoo.compare import at, biased, difference, same
from tests.zoo.count import Attention, watch
from tests.zoo.expected import Expected, Site, cross, joint, over_frames, picture, sound
from tests.zoo.recipe import FRAMES, Inputs, Random, randomise
from tests.zoo.reference import NEUTRAL, REDUCE, REDUCING, TILE, TILING, Reduced, Tiled, resized
from tests.zoo.registry import run

BASE = 9, 11
WINDOW = Site("self", 9, image=0, grid=(1, 3, 3))


@dataclass(frozen=True)
class Entry:
    build: Callable[[], nn.Module]
    inputs: Callable[[Random], Inputs]
    expected: Expected


MODELS = {
    "einsum": Entry(
        foreign.LatentUNet,
        lambda r: {"x": r.normal(r.batch, 4, *r.grid), "timesteps": r.timesteps(), "context": r.normal(r.batch, 7, 24)},
        [picture(9, 11), cross(7), picture(5, 6), cross(7), picture(9, 11), cross(7)],
    ),
    "convolutions": Entry(
        foreign.PixelUNet,
        lambda r: {"x": r.normal(r.batch, 3, *r.grid), "timesteps": r.timesteps()},
        [picture(9, 11), picture(5, 6), picture(9, 11)],
    ),
    "packed": Entry(
        foreign.ClassTransformer,
        lambda r: {"x": r.normal(r.batch, 4, r.height, r.width), "t": r.timesteps(), "y": r.integers(10, r.batch)},
        [picture(9, 11)] * 2,
    ),
    "two_streams": Entry(
        foreign.TwoStreamTransformer,
        lambda r: {
            "latent": r.normal(r.batch, 4, r.height, r.width),
            "timestep": r.timesteps(),
            "text": r.normal(r.batch, 13, 24),
        },
        [joint(112, text=(0, 13), image=13)] * 2,
    ),
    "multihead": Entry(
        foreign_sequences.TorchTransformer,
        lambda r: {
            "sample": r.normal(r.batch, 4, r.height, r.width),
            "timestep": r.timesteps(),
            "context": r.normal(r.batch, 7, 24),
        },
        [picture(9, 11), cross(7)] * 2,
    ),
    "global_function": Entry(
        foreign_sequences.GlobalFunctionTransformer,
        lambda r: {
            "x": r.normal(r.batch, 4, r.height, r.width),
            "timesteps": r.timesteps(),
            "context": r.normal(r.batch, 7, 24),
        },
        [picture(9, 11), picture(9, 11), cross(7), picture(9, 11)],
    ),
    "factorised_video": Entry(
        foreign_sequences.FactorisedVideoTransformer,
        lambda r: {"video": r.normal(r.batch, 4, FRAMES, *r.grid), "timestep": r.timesteps()},
        [picture(9, 11), over_frames(FRAMES)] * 2,
    ),
    "sound": Entry(
        foreign_sequences.SoundUNet,
        lambda r: {
            "waveform": r.normal(r.batch, 2, r.tokens),
            "timestep": r.timesteps(),
            "context": r.normal(r.batch, 7, 24),
        },
        [sound(99), sound(50), cross(7)],
    ),
    "windows": Entry(
        foreign_sequences.WindowTransformer,
        lambda r: {"x": r.normal(r.batch, 4, 3 * (r.rows // 3), 3 * (r.columns // 3 + 1)), "t": r.timesteps()},
        [WINDOW, WINDOW],
    ),
}
every_model = pytest.mark.parametrize("name", MODELS)


@functools.cache
def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name].build()
    randomise(model)
    return model.eval()


def inputs(name: str, batch: int = 2, rows: int = BASE[0], columns: int = BASE[1]) -> Inputs:
    return MODELS[name].inputs(Random(batch, rows, columns))


@functools.cache
def attentions(name: str) -> list[Attention]:
    with watch(built(name)) as found:
        run(built(name), inputs(name))
    return found


@functools.cache
def sites(name: str) -> list[sloth_fx.AttentionSite]:
    return list(sloth_fx.inspect(built(name), example_inputs=inputs(name)))


@functools.cache
def patched(name: str, spec: Spec) -> nn.Module:
    return sloth_fx.transform(built(name), spec, example_inputs=inputs(name))


def refuse_to_tile_windows(name: str, spec: Spec) -> None:
    if name == "windows" and spec is TILE:
        pytest.skip("a window is no larger than a tile")


@every_model
def test_the_count_computes_what_the_model_computes(name):
    """Attention in float64 with nothing changed, in the place of each one that was counted."""
    again = biased(built(name), inputs(name), lambda attention: torch.zeros(1))
    assert difference(again, run(built(name), inputs(name))) < 1e-4


@every_model
def test_every_attention_is_found(name):
    found = [(site.path, site.q_tokens, site.kv_tokens) for site in sites(name)]
    assert found == [(each.path, each.query.shape[-2], each.key.shape[-2]) for each in attentions(name)]
    assert [each.key.shape[-2] for each in attentions(name)] == [site.keys for site in MODELS[name].expected]


@every_model
def test_kinds_grids_and_text(name):
    known, found = MODELS[name].expected, sites(name)
    assert [(site.kind, site.text) for site in found] == [(site.kind, site.text) for site in known]
    image = [index for index, site in enumerate(known) if site.grid is not None]
    assert [found[index].grid for index in image] == [known[index].shape for index in image]


@every_model
@pytest.mark.parametrize("spec", [REDUCE, TILE], ids=["reduce", "tile"])
def test_neutral_is_the_same_to_the_bit(name, spec):
    refuse_to_tile_windows(name, spec)
    before = run(built(name), inputs(name))
    assert same(at(patched(name, spec), NEUTRAL, inputs(name)), before)
    assert same(run(built(name), inputs(name)), before)


@every_model
@pytest.mark.parametrize(
    ("spec", "moment", "operator"), [(REDUCE, REDUCING, Reduced), (TILE, TILING, Tiled)], ids=["reduce", "tile"]
)
def test_an_operator_equals_attention_over_a_set_of_tokens(name, spec, moment, operator):
    refuse_to_tile_windows(name, spec)
    found = at(patched(name, spec), moment, inputs(name))
    assert difference(found, biased(built(name), inputs(name), operator(MODELS[name].expected))) < 1e-4
    assert difference(found, run(built(name), inputs(name))) > 1e-2


@every_model
@pytest.mark.parametrize("size", [(3, 6, 14), (1, 8, 8)], ids=str)
def test_other_sizes_after_the_transform(name, size):
    expected = resized(MODELS[name].expected, BASE, size[1:])
    found = at(patched(name, REDUCE), REDUCING, inputs(name, *size))
    assert difference(found, biased(built(name), inputs(name, *size), Reduced(expected))) < 1e-4


@every_model
def test_compiled_without_a_graph_break(name):
    torch.compiler.reset()
    model = patched(name, REDUCE)
    eager = at(model, REDUCING, inputs(name))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert same(run(compiled, inputs(name)), eager)
