"""Guidance by perturbed attention through ComfyUI's samplers, against explicit second calls of its models."""

import json
import uuid

import pytest
import torch

import sloth_fx
from sloth_fx.errors import SlothError
from sloth_fx.integrations.comfy.patching import patch_model, report_of
from sloth_fx.integrations.comfyui import NODE_CLASS_MAPPINGS
from tests.integrations.comfy_beside import controlnet, with_, with_adapter, with_lcm, with_lora, with_sampling
from tests.integrations.comfy_real import (
    MODELS,
    ONLY_THERE,
    UNET_MIDDLE,
    by_hand,
    conditioning,
    made,
    one_text_at_a_time,
    perturbed,
    sample,
    self_attention,
    with_attention,
)
from tests.perturbed_by_hand import itself, itself_and_others, mean_queries

pytestmark = ONLY_THERE
ROWS, COLUMNS = 27, 19  # odd: 14 x 10 tokens, after ComfyUI has padded them or convolved
WORDS = 7
SITES = {  # the attention that is perturbed: its number, how many there are; frames; tokens of text before the image
    "unet": ((4, 14), 1, 0),
    "mmdit": ((1, 2), 1, WORDS),
    "flux": ((2, 4), 1, WORDS),
    "wan": ((2, 4), 3, 0),
    "qwen, located at its first call": ((1, 2), 1, WORDS),
}
GRID = (1, 14, 10)
PAG, SEG, SAG = sloth_fx.PAG(scale=2.0), sloth_fx.SEG(scale=20.0), sloth_fx.SAG()


def model(comfy, name):
    patcher, shape = made(comfy, name)
    return patcher, (2, *shape[1:-2], ROWS, COLUMNS)


def close(found, expected, plain, tolerance=2e-5):
    """The same, where it makes a difference."""
    largest = expected.abs().max()
    assert (found - expected).abs().max() < tolerance * largest
    assert (plain - expected).abs().max() > 50 * tolerance * largest


def in_family(name, kind):
    """A spec, and how it is done by hand."""
    site, frames, words = SITES[name]
    grid = (frames, *GRID[1:])
    tokens = frames * 140
    if kind == "PAG":
        return PAG, perturbed(PAG.scale, site, itself_and_others(words, tokens) if words else itself)
    if kind == "SEG":
        return SEG, perturbed(SEG.scale, site, mean_queries(words, tokens, frames))
    return SAG, self_attention(SAG.scale, site, grid, flow=name != "unet")


@pytest.mark.parametrize("kind", ["PAG", "SEG", "SAG"])
@pytest.mark.parametrize("name", SITES)
def test_families(comfy, name, kind):
    """With both texts in one call, in one each, and without a negative."""
    patcher, shape = model(comfy, name)
    spec, change = in_family(name, kind)
    patched, expected = patch_model(patcher, [spec]), by_hand(comfy, patcher, change)
    for cfg in (3.0, 1.0):
        given = {"cfg": cfg, "steps": 2}
        twice = sample(comfy, expected, shape, **given)
        close(sample(comfy, patched, shape, **given), twice, sample(comfy, patcher, shape, **given))
    with one_text_at_a_time(patcher):
        apart = sample(comfy, patched, shape, steps=2)
    close(apart, sample(comfy, expected, shape, steps=2), sample(comfy, patcher, shape, steps=2))


def from_json(patcher, spec):
    return NODE_CLASS_MAPPINGS["SlothFXFromJSON"]().execute(model=patcher, spec=json.dumps(spec.to_dict()))[0]


@pytest.mark.parametrize("name", SITES)
def test_shuffled_tokens(comfy, name):
    """Drawn for each site and moment, so it is compared with itself: both texts in one call, and in one each."""
    patcher, shape = model(comfy, name)
    patched = from_json(patcher, sloth_fx.TPG(scale=2.0, where=None))
    together = sample(comfy, patched, shape, steps=2)
    with one_text_at_a_time(patcher):
        close(sample(comfy, patched, shape, steps=2), together, sample(comfy, patcher, shape, steps=2), 1e-5)


@pytest.mark.parametrize("name", [name for name in SITES if name != "unet"])
def test_skipped_blocks(comfy, name):
    """As ComfyUI's own node leaves them out."""
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    patcher, shape = model(comfy, name)
    patched = from_json(patcher, sloth_fx.SLG(layers=(0,), scale=2.5, start=0.0, stop=1.0))
    (theirs,) = SkipLayerGuidanceDiT.execute(patcher, 2.5, 0.0, 1.0, "0", "").args
    expected = sample(comfy, theirs, shape, steps=2)
    close(sample(comfy, patched, shape, steps=2), expected, sample(comfy, patcher, shape, steps=2))
    assert {site.operators for site in report_of(patched)} == {(), ("SLG",)}


@pytest.mark.parametrize(("cfg", "sampler"), [(3.0, "euler"), (1.0, "euler"), (3.0, "euler_cfg_pp"), (3.0, "dpm_2")])
def test_comfyuis_own_pag(comfy, cfg, sampler):
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    patcher, shape = model(comfy, "unet")
    (theirs,) = PerturbedAttentionGuidance.execute(patcher, PAG.scale).args
    given = {"cfg": cfg, "sampler": sampler}
    expected, plain = sample(comfy, theirs, shape, **given), sample(comfy, patcher, shape, **given)
    close(sample(comfy, patch_model(patcher, [PAG]), shape, **given), expected, plain)


def test_comfyuis_own_sag(comfy):
    """Its kernel has 9 pixels, as ours has at a blur of 1; it guesses the grid, so not of an odd size."""
    from comfy_extras.nodes_sag import SelfAttentionGuidance

    patcher, shape = made(comfy, "unet")
    (theirs,) = SelfAttentionGuidance.execute(patcher, SAG.scale, SAG.blur_sigma).args
    expected, plain = sample(comfy, theirs, shape), sample(comfy, patcher, shape)
    close(sample(comfy, patch_model(patcher, [SAG]), shape), expected, plain)


# What a workflow has besides, of the UNet


SLOTHFUL, NAG = with_(sloth_fx.SlothfulAttention()), with_(sloth_fx.NAG(scale=5.0))
AREA = [[text, {**more, "area": (16, 19, 0, 0)}] for text, more in conditioning(1)]
BESIDE = {  # nodes beside the one of guidance, and what is sampled with
    "a LoRA": ([with_lora], {}),
    "an LCM-LoRA": ([with_lcm], {"cfg": 1.0, "sampler": "lcm", "scheduler": "sgm_uniform", "steps": 4}),
    "an IP-Adapter": ([with_adapter], {}),
    "reduced keys": ([SLOTHFUL], {}),
    "a negative prompt": ([NAG], {}),
    "a negative prompt alone": ([NAG], {"cfg": 1.0}),
    "both, and a LoRA": ([SLOTHFUL, with_lora, NAG], {}),
    "v-prediction": ([with_sampling("v_prediction")], {}),
    "no noise at all": ([with_sampling("v_prediction", True)], {}),
    "predicted images": ([with_sampling("x0")], {}),
    "edm": ([with_sampling("edm")], {}),
    "two prompts": ([], {"texts": (conditioning(1) + conditioning(7), conditioning(2))}),
    "another sampler": ([], {"sampler": "dpmpp_2m", "scheduler": "karras"}),
}


@pytest.mark.parametrize("spec", [PAG, SAG], ids=["PAG", "SAG"])
@pytest.mark.parametrize("name", BESIDE)
def test_beside(comfy, name, spec):
    """Before the node and after it, with both texts in one call and in one each: as two calls with the same beside."""
    patcher, shape = model(comfy, "unet")
    changes, given = BESIDE[name]

    def changed(base, which):
        for change in which:
            base = change(comfy, base)
        return base

    by = perturbed(PAG.scale, UNET_MIDDLE, itself) if spec is PAG else self_attention(SAG.scale, UNET_MIDDLE, GRID)
    plain = changed(patcher, changes)
    expected = sample(comfy, by_hand(comfy, plain, by), shape, **given)
    without = sample(comfy, plain, shape, **given)
    before = patch_model(plain, [spec])
    close(sample(comfy, before, shape, **given), expected, without, 1e-4)
    if changes:
        after = changed(patch_model(changed(patcher, changes[1:]), [spec]), changes[:1])
        close(sample(comfy, after, shape, **given), expected, without, 1e-4)
    with one_text_at_a_time(patcher):
        close(sample(comfy, before, shape, **given), expected, without, 1e-4)


def test_areas(comfy):
    patcher, shape = model(comfy, "unet")
    given = {"texts": (AREA + conditioning(7), conditioning(2))}
    expected = sample(comfy, by_hand(comfy, patcher, perturbed(PAG.scale, UNET_MIDDLE, itself)), shape, **given)
    close(sample(comfy, patch_model(patcher, [PAG]), shape, **given), expected, sample(comfy, patcher, shape, **given))


@pytest.mark.parametrize("spec", [PAG, SAG], ids=["PAG", "SAG"])
def test_controlnet(comfy, spec):
    """A ControlNet of ComfyUI on both texts. SAG asks with what it gave for the latent as it is, without running it."""
    patcher, shape = model(comfy, "unet")
    control = controlnet(comfy, (8 * ROWS, 8 * COLUMNS))
    run, kept = control.get_control, {}

    def as_before(x, timestep, cond, batched, options):
        """What it gave these texts in the call before."""
        sigma, groups = float(timestep[0]), tuple(options["cond_or_uncond"])
        if (sigma, groups) not in kept and (sigma, (1, 0)) in kept:
            both = kept[sigma, (1, 0)]
            part = (1, 0).index(groups[0])
            return {name: [each.chunk(2)[part] for each in maps] for name, maps in both.items()}
        kept[sigma, groups] = run(x, timestep, cond, batched, options)
        return {name: list(maps) for name, maps in kept[sigma, groups].items()}

    given = {"texts": [[[text, {**more, "control": control}]] for seed in (1, 2) for text, more in conditioning(seed)]}
    found, without = sample(comfy, patch_model(patcher, [spec]), shape, **given), sample(comfy, patcher, shape, **given)
    control.get_control = as_before
    by = perturbed(PAG.scale, UNET_MIDDLE, itself) if spec is PAG else self_attention(SAG.scale, UNET_MIDDLE, GRID)
    close(found, sample(comfy, by_hand(comfy, patcher, by), shape, **given), without)
    assert (without - sample(comfy, patcher, shape)).abs().max() > 0.1


def test_comfyuis_own_cache(comfy):
    """EasyCache keeps what each text gave, and what it gave with its attention perturbed; it runs in both calls."""
    from comfy_extras.nodes_easycache import EasyCacheNode

    patcher, shape = model(comfy, "unet")

    def cached(each):
        return EasyCacheNode.execute(each, 3.0, 0.1, 0.9, False).args[0]

    def change(args, call):
        mine = [{**each, "uuid": uuid.uuid5(each["uuid"], "mine")} for each in args["cond"]]
        options = with_attention(args["model_options"], UNET_MIDDLE, itself)
        transformer = options["transformer_options"]
        wrappers = {name: each for name, each in transformer["wrappers"].items() if name != "calc_cond_batch"}
        transformer["wrappers"] = wrappers  # the one that is left out begins its next step
        return PAG.scale * (args["cond_denoised"] - call(mine, args["input"], options))

    given = {"steps": 8}
    with one_text_at_a_time(patcher):  # together, it takes the texts for one another
        found = sample(comfy, cached(patch_model(patcher, [PAG])), shape, **given)
        plain = sample(comfy, cached(patcher), shape, **given)
        close(found, sample(comfy, by_hand(comfy, cached(patcher), change), shape, **given), plain)
        assert (plain - sample(comfy, patcher, shape, **given)).abs().max() > 0.1 * plain.abs().max()


def test_guiders(comfy):
    """Those whose scale is another at each step get what holds for any, as long as both texts are one call."""
    patcher, shape = model(comfy, "unet")
    patched = patch_model(patcher, [PAG])

    def rescaled(each):
        changed = each.clone()
        changed.set_model_sampler_cfg_function(lambda args: args["uncond"] + 4.0 * (args["cond"] - args["uncond"]))
        return changed

    found = sample(comfy, rescaled(patched), shape)
    close(found, sample(comfy, patched, shape, cfg=4.0), sample(comfy, patcher, shape, cfg=4.0))
    with one_text_at_a_time(patcher), pytest.raises(SlothError, match="another kind than CFGGuider's"):
        sample(comfy, rescaled(patched), shape)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [PAG, SAG], ids=["PAG", "SAG"])
def test_compiled_after_the_node(comfy, spec):
    """TorchCompileModel's wrapper: the same numbers, and nothing is compiled again."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    patcher, shape = model(comfy, "unet")
    patched = patch_model(SLOTHFUL(comfy, patcher), [spec], phases=2)
    expected = sample(comfy, patched, shape)
    compiled = patched.clone()
    set_torch_compile_wrapper(compiled, "eager")
    torch._dynamo.reset()
    close(sample(comfy, compiled, shape), expected, sample(comfy, patcher, shape))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    close(sample(comfy, compiled, shape), expected, sample(comfy, patcher, shape))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_every_family_is_there():
    assert set(SITES) == set(MODELS)
