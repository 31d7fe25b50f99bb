"""What a workflow of ComfyUI has beside nodes that change keys and values: stock nodes, patches, LoRA, ControlNet."""

import pytest
import torch

import sloth_fx
from sloth_fx.errors import SlothError
from sloth_fx.integrations.comfy.patching import patch_model
from tests.integrations import comfy_real as hand
from tests.integrations.comfy_beside import controlnet, with_, with_adapter, with_lcm, with_lora, with_sampling
from tests.integrations.comfy_real import (
    ONLY_THERE,
    called,
    conditioning,
    made,
    one_text_at_a_time,
    sample,
)
from tests.perturbed_by_hand import itself

pytestmark = ONLY_THERE
ROWS, COLUMNS = 27, 19
SHAPE = (2, 4, ROWS, COLUMNS)
FEWER = sloth_fx.TokenDownsample()
NEGATIVE = with_(sloth_fx.NAG(scale=5.0))


def by_hand(comfy, patcher):
    """A clone that does what FEWER says by ComfyUI's own way to override attention."""

    def override(attend, query, key, value, heads, *args, **more):
        if query.shape[1] == key.shape[1] == ROWS * COLUMNS:
            key, value = (each.unflatten(1, (ROWS, COLUMNS))[:, ::2, ::2].flatten(1, 2) for each in (key, value))
        return attend(query, key, value, heads, *args, **more)

    changed = patcher.clone()
    changed.model_options["transformer_options"]["optimized_attention_override"] = override
    return changed


def stock(module, name, *values):
    """A node of ComfyUI's own."""

    def change(comfy, patcher):
        node = getattr(__import__(f"comfy_extras.{module}", fromlist=[name]), name)
        found = getattr(node if hasattr(node, "define_schema") else node(), node.FUNCTION)(patcher, *values)
        return getattr(found, "args", found)[0]

    return change


def close(found, expected, plain):
    """The same, where it makes a difference."""
    largest = expected.abs().max()
    assert (found - expected).abs().max() < 2e-5 * largest
    assert (plain - expected).abs().max() > 2e-3 * largest


def changed(comfy, patcher, changes):
    for change in changes:
        patcher = change(comfy, patcher)
    return patcher


BESIDE = {
    "nothing": ([], {}),
    "a LoRA": ([with_lora], {}),
    "an LCM-LoRA": ([with_lcm], {"cfg": 1.0, "sampler": "lcm", "scheduler": "sgm_uniform"}),
    "an IP-Adapter": ([with_adapter], {}),
    "a negative prompt and a LoRA": ([NEGATIVE, with_lora], {}),
    "v-prediction": ([with_sampling("v_prediction")], {}),
    "FreeU": ([stock("nodes_freelunch", "FreeU_V2", 1.3, 1.4, 0.9, 0.2)], {}),
    "RescaleCFG": ([stock("nodes_model_advanced", "RescaleCFG", 0.7)], {}),
    "ComfyUI's PAG": ([stock("nodes_pag", "PerturbedAttentionGuidance", 3.0)], {}),
}


@pytest.mark.parametrize("name", BESIDE)
def test_beside(comfy, name):
    """Before the node and after it, with both texts in one call and in one each."""
    patcher, _ = made(comfy, "unet")
    changes, given = BESIDE[name]
    plain = changed(comfy, patcher, changes)
    expected, without = sample(comfy, by_hand(comfy, plain), SHAPE, **given), sample(comfy, plain, SHAPE, **given)
    close(sample(comfy, patch_model(plain, [FEWER]), SHAPE, **given), expected, without)
    after = changed(comfy, patch_model(patcher, [FEWER]), changes)
    close(sample(comfy, after, SHAPE, **given), expected, without)
    with one_text_at_a_time(patcher):
        close(sample(comfy, after, SHAPE, **given), expected, without)


def test_controlnet(comfy):
    patcher, _ = made(comfy, "unet")
    control = controlnet(comfy, (8 * ROWS, 8 * COLUMNS))
    given = {"texts": [[[text, {**more, "control": control}]] for seed in (1, 2) for text, more in conditioning(seed)]}
    found, without = (sample(comfy, each, SHAPE, **given) for each in (patch_model(patcher, [FEWER]), patcher))
    control.get_control = overridden_off(control.get_control)
    close(found, sample(comfy, by_hand(comfy, patcher), SHAPE, **given), without)
    assert (without - sample(comfy, patcher, SHAPE)).abs().max() > 0.1


def overridden_off(run):
    """The ControlNet has attention of its own, which is not to be changed."""

    def get_control(x, timestep, cond, batched, options):
        return run(x, timestep, cond, batched, {**options, "optimized_attention_override": None})

    return get_control


SPECS = [  # for each of them another kind of change
    sloth_fx.NearSightedTile(tile_size=8),
    sloth_fx.NAG(scale=5.0),
    sloth_fx.PAG(scale=2.0),
]


def test_any_order(comfy):
    """Three of our nodes and a LoRA."""
    patcher, _ = made(comfy, "unet")
    tile, nag, pag = map(with_, SPECS)
    orders = [[with_lora, tile, nag, pag], [pag, nag, with_lora, tile], [nag, tile, pag, with_lora]]
    found = [sample(comfy, changed(comfy, patcher, order), SHAPE, steps=1) for order in orders]
    for each in found[1:]:
        torch.testing.assert_close(each, found[0])
    for count in (2, 3):  # each of them takes part
        fewer = sample(comfy, changed(comfy, patcher, orders[0][:count]), SHAPE, steps=1)
        assert (fewer - found[0]).abs().max() > 1e-3


@pytest.mark.parametrize("spec", [FEWER, SPECS[1]], ids=lambda each: type(each).__name__)
@torch.inference_mode()
def test_lora_and_lowvram(comfy, spec):
    """With a LoRA on either side, also where weights are cast and patched when they are used, as one that is merged."""
    patcher, _ = made(comfy, "unet")
    merged, _ = made(comfy, "unet")
    with_lora(comfy, merged).patch_model()
    expected = called_loaded(with_(spec)(comfy, merged))
    without = called_loaded(with_(spec)(comfy, patcher))
    for patched in (with_lora(comfy, with_(spec)(comfy, patcher)), with_(spec)(comfy, with_lora(comfy, patcher))):
        for memory in (20_000, 0):  # bytes; 0 is all
            found = called_loaded(patched, memory)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            assert (found - without).abs().max() > 1e-2


def called_loaded(patched, memory=0):
    patched.patch_model(torch.device("cpu"), lowvram_model_memory=memory)
    cast = [getattr(each, "comfy_cast_weights", False) for each in patched.model.modules()]
    assert any(cast) == (memory > 0)
    try:
        return called(patched, SHAPE)
    finally:
        patched.unpatch_model(torch.device("cpu"))


COLLISIONS = {
    "HyperTile": (stock("nodes_hypertile", "HyperTile", 64, 2, 0, False), "hypertile_in of .*nodes_hypertile changes"),
    "ToMe": (stock("nodes_tomesd", "TomePatchModel", 0.5), "tomesd_m of .*nodes_tomesd changes the tokens"),
}


@pytest.mark.parametrize("name", COLLISIONS)
def test_stock_nodes_that_collide(comfy, name):
    change, words = COLLISIONS[name]
    patcher, _ = made(comfy, "unet")
    shape = (2, 4, 32, 32)  # on which they act
    plain = sample(comfy, patcher, shape)
    assert not torch.equal(sample(comfy, change(comfy, patcher), shape), plain)
    for patched in (change(comfy, patch_model(patcher, [FEWER])), patch_model(change(comfy, patcher), [FEWER])):
        with pytest.raises(SlothError, match=words):
            sample(comfy, patched, shape)
    assert torch.equal(sample(comfy, patcher, shape), plain)


def test_an_image_that_shrinks_on_its_way(comfy):
    """Kohya's Deep Shrink: what needs no grid, or one of the latent's size, goes with it; what does not is refused."""
    patcher, _ = made(comfy, "unet")
    node = stock("nodes_model_downscale", "PatchModelAddDownscale", 1, 2.0, 0.0, 1.0, True, "bicubic", "bicubic")
    shrunk = node(comfy, patcher)
    plain = sample(comfy, shrunk, SHAPE)
    assert not torch.equal(sample(comfy, patcher, SHAPE), plain)
    close(sample(comfy, patch_model(shrunk, [FEWER]), SHAPE), sample(comfy, by_hand(comfy, shrunk), SHAPE), plain)
    pag = hand.by_hand(comfy, shrunk, hand.perturbed(2.0, hand.UNET_MIDDLE, itself))
    close(sample(comfy, patch_model(shrunk, [sloth_fx.PAG(scale=2.0)]), SHAPE), sample(comfy, pag, SHAPE), plain)
    for spec in (sloth_fx.TokenDownsample(factors=(2, 2)), sloth_fx.NearSightedTile(tile_size=8)):
        with pytest.raises(SlothError, match=r"blocks\.3\.1.*attn1: 35 tokens do not fit a grid of 14 x 10"):
            sample(comfy, patch_model(shrunk, [spec]), SHAPE)


@pytest.mark.slow
def test_the_stock_node_that_compiles(comfy):
    """TorchCompileModel after ours: the same numbers; neither another run nor the node executed again compiles again.
    Of its backends, which need a compiler, none is used."""
    patcher, _ = made(comfy, "unet")
    nodes = [with_lora, with_(FEWER), NEGATIVE]
    patched = changed(comfy, patcher, nodes)
    expected, plain = sample(comfy, patched, SHAPE, steps=2), sample(comfy, patcher, SHAPE, steps=2)
    torch._dynamo.reset()
    compiling = stock("nodes_torch_compile", "TorchCompileModel", "eager")
    close(sample(comfy, compiling(comfy, patched), SHAPE, steps=2), expected, plain)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0
    again = compiling(comfy, changed(comfy, patcher, nodes))
    close(sample(comfy, again, SHAPE, steps=2), expected, plain)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
