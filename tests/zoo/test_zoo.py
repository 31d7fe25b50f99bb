"""The library against every denoiser of diffusers: what it finds, and what its operators come to.

Measured against data (:mod:`tests.zoo.expected`), a count that shares nothing with the library
(:mod:`tests.zoo.count`), and sets of tokens written out (:mod:`tests.zoo.reference`).
"""

import functools
import math

import pytest
import torch

import sloth_fx
from tests.zoo.compare import at, biased, difference, same
from tests.zoo.count import Attention, watch
from tests.zoo.reference import NEUTRAL, REDUCE, REDUCING, TILE, TILING, Reduced, Tiled, resized
from tests.zoo.registry import MODELS, run, shared

# What hosts say about themselves.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{warning}")
    for warning in (
        ".*deprecated:FutureWarning",
        "The configuration file of this model:FutureWarning",
        "In CPU autocast, but the target dtype is not supported:UserWarning",
        "flex_attention called without torch.compile:UserWarning",
    )
]

every_model = pytest.mark.parametrize("name", MODELS)
# Attention with a block mask, which only its own kernel can read.
REFUSED = ("AnyFlowFARTransformer3DModel",)
REDUCIBLE = [
    name for name, entry in MODELS.items() if name not in REFUSED and any(site.grid for site in entry.expected)
]
every_reducible = pytest.mark.parametrize("name", REDUCIBLE)

# Earlier frames stand in front of the video: they grow with it, and the data says where the video starts at one size.
HISTORY = ("HeliosTransformer3DModel", "HunyuanVideoFramepackTransformer3DModel")
# One attention for each sample, so that another batch has others than the data says.
PER_SAMPLE = ("MochiTransformer3DModel",)


@functools.lru_cache(maxsize=2)
def attentions(name: str) -> list[Attention]:
    with watch(shared(name)) as found:
        run(shared(name), MODELS[name].inputs())
    return found


@functools.lru_cache(maxsize=2)
def sites(name: str) -> list[sloth_fx.AttentionSite]:
    """Those with a softmax. A transform finds the same as a look at the model, and is needed anyway."""
    if name in REDUCIBLE:
        report = sloth_fx.report(patched(name))
    else:
        report = sloth_fx.inspect(shared(name), example_inputs=MODELS[name].inputs())
    return [site for site in report if site.kind != "linear"]


@functools.lru_cache(maxsize=2)
def patched(name: str) -> torch.nn.Module:
    """Reduces at first, then does nothing, and tiles in the end."""
    return sloth_fx.transform(shared(name), [REDUCE, TILE], example_inputs=MODELS[name].inputs())


def tolerance(name: str) -> float:
    """Of outputs in units of their deviation. Two models rotate in bfloat16, one attends in it."""
    return 1e-2 if name == "SanaWMTransformer3DModel" else 1e-3


@every_model
def test_the_count_computes_what_the_model_computes(name):
    """Attention in float64 with nothing changed, in the place of each one that was counted."""
    inputs = MODELS[name].inputs
    again = biased(shared(name), inputs(), lambda attention: None if attention.spelling == "flex" else torch.zeros(1))
    assert difference(again, run(shared(name), inputs())) < tolerance(name)


@every_model
def test_every_attention_is_found(name):
    found = [(site.path, site.q_tokens, site.kv_tokens) for site in sites(name)]
    assert found == [(each.path, each.query.shape[-2], each.key.shape[-2]) for each in attentions(name)]


@every_model
def test_the_data_fits_the_count(name):
    assert [each.key.shape[-2] for each in attentions(name)] == [site.keys for site in MODELS[name].expected]


@every_model
def test_kinds_and_text(name):
    pairs = list(zip(sites(name), MODELS[name].expected, strict=True))
    assert [(site.kind, site.text) for site, known in pairs if known.certain] == [
        (known.kind, known.text) for _, known in pairs if known.certain
    ]


@every_model
def test_grids_of_image_tokens(name):
    pairs = [(site, known) for site, known in zip(sites(name), MODELS[name].expected, strict=True) if known.grid]
    assert [site.grid for site, _ in pairs] == [known.shape for _, known in pairs]
    assert [site.key_place.start(known.keys, math.prod(known.grid)) for site, known in pairs] == [
        known.image for _, known in pairs
    ]


# Each class once, and not where the zoo gives an input that nobody has to give.
OPTIONAL = ("UNet2DConditionModel/gligen", "Flux3Transformer2DModel")
CLASSES = list({name.partition("/")[0]: name for name in reversed(MODELS) if name not in OPTIONAL}.values())


@pytest.mark.parametrize("name", CLASSES)
def test_inputs_are_made_from_the_config(name):
    found = [site.kind for site in sloth_fx.inspect(shared(name)) if site.kind != "linear"]
    known = MODELS[name].expected
    assert len(found) == len(known)
    pairs = [(kind, site.kind) for kind, site in zip(found, known, strict=True) if site.certain]
    assert [kind for kind, _ in pairs] == [kind for _, kind in pairs]


@pytest.mark.parametrize("name", [name for name in MODELS if name not in REDUCIBLE])
def test_a_model_without_a_grid_of_image_tokens_is_refused(name):
    with pytest.raises(sloth_fx.SlothError):
        sloth_fx.transform(shared(name), REDUCE, example_inputs=MODELS[name].inputs())


@every_reducible
def test_neutral_is_the_same_to_the_bit(name):
    inputs = MODELS[name].inputs
    before = run(shared(name), inputs())
    assert same(at(patched(name), NEUTRAL, inputs()), before)
    assert same(run(shared(name), inputs()), before)


@every_reducible
@pytest.mark.parametrize(("moment", "operator"), [(REDUCING, Reduced), (TILING, Tiled)], ids=["reduce", "tile"])
def test_an_operator_equals_attention_over_a_set_of_tokens(name, moment, operator):
    inputs, expected = MODELS[name].inputs, MODELS[name].expected
    found = at(patched(name), moment, inputs())
    assert difference(found, biased(shared(name), inputs(), operator(expected))) < tolerance(name)
    assert difference(found, run(shared(name), inputs())) > 2 * tolerance(name)


@pytest.mark.parametrize("name", [name for name in REDUCIBLE if name not in (*HISTORY, *PER_SAMPLE)])
@pytest.mark.parametrize("size", [(3, 6, 14), (1, 8, 8)], ids=str)
def test_other_sizes_after_the_transform(name, size):
    entry = MODELS[name]
    expected = resized(entry.expected, (10, 12) if entry.recipe.even else (9, 11), size[1:])
    found = at(patched(name), REDUCING, entry.inputs(*size))
    assert difference(found, biased(shared(name), entry.inputs(*size), Reduced(expected))) < tolerance(name)


COMPILED = [
    *("UNet2DModel", "UNet2DConditionModel/sd15", "LatteTransformer3DModel", "PixArtTransformer2DModel"),
    *("SD3Transformer2DModel/sd35", "AuraFlowTransformer2DModel", "FluxTransformer2DModel/kontext"),
    *("Flux2Transformer2DModel", "QwenImageTransformer2DModel", "WanTransformer3DModel"),
    *("CogVideoXTransformer3DModel", "StableAudio3DiTModel"),
]


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_without_a_graph_break(name):
    torch.compiler.reset()
    inputs = MODELS[name].inputs()
    model = patched(name)
    eager = at(model, REDUCING, inputs)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert same(run(compiled, inputs), eager)
