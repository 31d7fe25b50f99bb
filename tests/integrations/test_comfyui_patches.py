"""A model that nodes have patched, beside the patches of other packs, and compiled."""

import pytest
import torch

import sloth_fx
from sloth_fx.errors import SlothError
from sloth_fx.integrations.comfy.patching import patch_model
from tests.integrations.comfy_host import (
    NEGATIVE,
    SIGMAS,
    CFGGuider,
    call,
    conditioning,
    latents,
    patcher,
    sample,
    start,
)
from tests.integrations.comfy_patched import (
    FULL,
    NEUTRAL,
    PERTURBING,
    SCALE,
    TILE,
    WEIGHT,
    guided,
    model_of,
    predicted,
)


def patches(model, **functions):
    other = model.clone()
    other.model_options["transformer_options"]["patches"] = {name: [each] for name, each in functions.items()}
    return other


def replaced(model, attention, block, function=lambda q, k, v, extra: v):
    other = model.clone()
    other.model_options["transformer_options"]["patches_replace"] = {attention: {block: function}}
    return other


def scaled(query, key, value, extra):
    return query, key * 1.5, value * 0.5


def by_group(query, key, value, extra):
    """As IP-Adapter, which has other keys for the positive: one part of the batch for each group."""
    parts = key.chunk(len(extra["cond_or_uncond"]))
    return (
        query,
        torch.cat([part * (2 - each) for part, each in zip(parts, extra["cond_or_uncond"], strict=True)]),
        value,
    )


def replaced_by_group(query, key, value, extra):
    """As IP-Adapter where it replaces attention."""
    return by_group(query, value, key, extra)[1].mean(1, keepdim=True) + query


def halved(query, key, value, extra):
    return query, key[:, ::2], value[:, ::2]


def test_patches_that_go_together():
    base = patcher()
    for change in (
        lambda model: patches(model, attn2_patch=scaled),
        lambda model: patches(model, attn1_patch=scaled),
        lambda model: replaced(model, "attn2", ("input", 1), lambda q, k, v, extra: q),
        lambda model: replaced(model, "attn1", ("middle", 0)),  # which is kept
    ):
        expected = sample(change(base))
        assert torch.equal(sample(change(patch_model(base, [NEUTRAL]))), expected)
        assert (expected - sample(base)).abs().max() > 1e-3


def halved_result(attend, *args, **kwargs):
    return attend(*args, **kwargs) * 0.5


def test_a_hosts_choice_of_attention_stays():
    base = patcher()
    patched = patch_model(base, [NEUTRAL])
    for each in (base, patched):
        each.model_options["transformer_options"]["optimized_attention_override"] = halved_result
    assert torch.equal(sample(patched), sample(base))


COLLISIONS = {
    "attn1_patch": (
        lambda model: patches(model, attn1_patch=halved),
        FULL,
        "the patch halved .* changes the tokens of attn1",
    ),
    "attn1_replace": (
        lambda model: replaced(model, "attn1", ("output", 1)),
        FULL,
        r"replaces attn1 at block \('output', 1\), and so does",
    ),
    "one transformer": (lambda model: replaced(model, "attn1", ("output", 1, 0)), FULL, "replaces attn1 at block"),
    "attn2_replace": (lambda model: replaced(model, "attn2", ("input", 1)), sloth_fx.NAG(), "replaces attn2 at block"),
}


FIRST_BLOCK = sloth_fx.SLG(layers=(0,), start=0.0, stop=1.0)  # that of input 1


@pytest.mark.parametrize("spec", [sloth_fx.SAG(), sloth_fx.PAG(), FIRST_BLOCK], ids=["SAG", "PAG", "SLG"])
@pytest.mark.parametrize(
    "change",
    [
        lambda model: patches(model, attn2_patch=by_group),
        lambda model: replaced(model, "attn2", ("input", 1), replaced_by_group),
    ],
    ids=["patch", "replace"],
)
def test_patches_of_rows_with_perturbed_guidance(change, spec):
    """Together and apart the same: a call that degrades one group says so to whoever tells rows by their group."""
    base = patcher()
    patched, plain = change(patch_model(base, [spec])), patch_model(base, [spec])
    for each in (patched, plain):
        start(CFGGuider(each, SCALE))
    together = guided(predicted(patched, (1, 0)))
    for calls in ([(0, 1)], [(1,), (0,)]):
        found = guided(predicted(patched, *calls))
        assert (found - together).abs().max() < 1e-5 * together.abs().max()
    assert (together - guided(predicted(plain, (1, 0)))).abs().max() > 1e-3
    assert (together - guided(predicted(change(base), (1, 0)))).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["PAG", "SLG", "SAG"])
def test_perturbed_guidance_beside_other_nodes(name):
    """In any order of the nodes, together and apart: of keys that are reduced elsewhere, and of a negative prompt."""
    base, negative = patcher(), conditioning(7, seed=5)
    reduced = sloth_fx.SlothfulAttention(keep_middle=True)
    specs = PERTURBING[name], reduced, sloth_fx.NAG(scale=5.0)
    one = patch_model(base, specs, negative=negative)
    other = base
    for each in reversed(specs):
        other = patch_model(other, [each], negative=negative if isinstance(each, sloth_fx.NAG) else None)
    for each in (one, other):
        start(CFGGuider(each, SCALE))
    together = guided(predicted(one, (1, 0)))
    torch.testing.assert_close(guided(predicted(one, (1,), (0,))), together)
    torch.testing.assert_close(guided(predicted(other, (0, 1))), together)
    for fewer in (patch_model(base, specs[1:], negative=negative), patch_model(base, specs[:2])):
        start(CFGGuider(fewer, SCALE))
        assert (guided(predicted(fewer, (1, 0))) - together).abs().max() > 1e-3


def test_a_degraded_call_has_one_group():
    """What is asked once more are the rows of one text, and the options say which."""
    seen = []

    def noted(query, key, value, extra):
        seen.append((len(query), extra["cond_or_uncond"], len(extra["uuids"])))
        return query, key, value

    patched = patches(patch_model(patcher(), [sloth_fx.SAG()]), attn2_patch=noted)
    patched.load()
    with torch.no_grad():
        call(patched, latents(3), 3.5, SIGMAS, (1, 0))
    patched.unload()
    assert seen == [(6, [1, 0], 2)] * 4 + [(3, [1], 1)] * 4


@pytest.mark.parametrize("case", COLLISIONS)
def test_patches_that_collide(case):
    change, spec, words = COLLISIONS[case]
    base = patcher()
    patched = change(patch_model(base, [spec], negative=NEGATIVE if isinstance(spec, sloth_fx.NAG) else None))
    plain = sample(base)
    with pytest.raises(SlothError, match=words):
        sample(patched)
    assert torch.equal(sample(base), plain)


def test_a_compiled_model_before_the_node():
    base = patcher()
    base.wrappers = {"apply_model": {"torch.compile": [lambda executor, *args: executor(*args)]}}
    with pytest.raises(SlothError, match="put TorchCompileModel after the nodes of Sloth FX"):
        patch_model(base, [FULL])


def test_modules_exchanged_by_others():
    base = patcher()
    plain = sample(base)
    patched = patch_model(base, [FULL])
    patched.add_object_patch(f"{WEIGHT}.forward", lambda x, **options: x)
    with pytest.raises(SlothError, match=r"another node has exchanged diffusion_model\.output_blocks"):
        sample(patched)
    with pytest.raises(SlothError, match="another node has exchanged"):
        patch_model(patched, [TILE])
    assert torch.equal(sample(base), plain)


def test_an_owner_exchanged_during_the_run():
    patched = patch_model(patcher(), [FULL])
    owner = model_of(patched).get_submodule(WEIGHT.removeprefix("diffusion_model."))
    owner.forward = lambda x, **options: x
    with pytest.raises(SlothError, match=r"exchanged output_blocks\.1\.1\.transformer_blocks\.0\.attn1 of this"):
        sample(patched)


def test_options_that_were_replaced():
    patched = patch_model(patcher(), [FULL])
    patched.model_options = {"transformer_options": {}}
    with pytest.raises(SlothError, match="without the transformer_options of its patcher"):
        sample(patched)


@pytest.mark.slow
def test_compiled_after_the_node():
    patched = patch_model(patcher(), [FULL], phases=2)
    expected = sample(patched)
    model = model_of(patched)
    patched.object_patches["diffusion_model"] = torch.compile(model, backend="eager")
    torch._dynamo.reset()
    torch.testing.assert_close(sample(patched), expected)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch.testing.assert_close(sample(patched), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
