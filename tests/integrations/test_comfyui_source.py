"""What nodes of ComfyUI ask their model for between the calls of a guider, and what a negative prompt is made of."""

import gc
import uuid
import weakref

import pytest
import torch

import sloth_fx
from sloth_fx.capture.objects import HandedOn
from sloth_fx.errors import SlothError
from sloth_fx.integrations.comfy.handing import Handing
from sloth_fx.integrations.comfy.patching import patch_model
from sloth_fx.integrations.comfy.steering import negative_arguments
from sloth_fx.patch import patch_of
from tests.integrations.comfy_host import (
    NEGATIVE,
    POSITIVE,
    SIGMAS,
    CFGGuider,
    Cond,
    call,
    conditioning,
    latents,
    patcher,
    start,
)

SIGMA, SCALE = 3.5, 5.0


def predicted(patched, *calls, **options):
    patched.load()
    with torch.no_grad():
        found = [call(patched, latents(), SIGMA, SIGMAS, groups, **options) for groups in calls]
    patched.unload()
    return found


def rows_of(patched):
    return patch_of(patched.object_patches["diffusion_model"]).context.rows


def test_each_text_asked_for_on_its_own():
    """As SkipLayerGuidanceDiTSimple does, with an empty place for the other: guidance takes both all the same."""
    patched = patch_model(patcher(), [sloth_fx.PAG(scale=2.0)])
    start(CFGGuider(patched, SCALE, positive=POSITIVE, negative=NEGATIVE))
    ((u, c),), ((own,), (other,)) = predicted(patched, (1, 0)), predicted(patched, (0,), (1,))
    torch.testing.assert_close(other + SCALE * (own - other), u + SCALE * (c - u))


@pytest.mark.parametrize(("text", "row"), [(NEGATIVE, "uncond"), (POSITIVE, "cond")])
def test_one_text_alone(text, row):
    """As SelfAttentionGuidance asks for the negative: it is known by which list it is, and not by its place."""
    patched = patch_model(patcher(), [sloth_fx.NAG(scale=4.0)], negative=conditioning(seed=9))
    start(CFGGuider(patched, SCALE, positive=POSITIVE, negative=NEGATIVE))
    together = dict(zip(("uncond", "cond"), *predicted(patched, (1, 0)), strict=True))
    ((alone,),) = predicted(patched, (0,), texts=(text,))
    assert rows_of(patched) == (row,)
    torch.testing.assert_close(alone, together[row])
    assert (alone - together["cond" if row == "uncond" else "uncond"]).abs().max() > 1e-3


def test_a_text_of_nobody_is_positive():
    patched = patch_model(patcher(), [sloth_fx.PAG()])
    start(CFGGuider(patched, 1.0, positive=POSITIVE, negative=NEGATIVE))
    predicted(patched, (0,), texts=(conditioning(seed=4),))
    assert rows_of(patched) == ("cond",)


class Masking:
    """A model that ComfyUI gives a mask only where something is hidden."""

    def __init__(self, name):
        self.name = name

    def extra_conds(self, cross_attn, attention_mask=None, **given):
        made = {"c_crossattn": Cond(cross_attn), "concat_mask": Cond(given["noise"])}
        return made if attention_mask is None else {**made, self.name: Cond(attention_mask)}


HIDING = {"zeros": torch.tensor([[1, 1, 1, 0, 0]]), "added": torch.tensor([[0, 0, 0, -1e9, -1e9]])}
SHOWING = {"ones": torch.ones(1, 5), "added": torch.zeros(1, 5)}


@pytest.mark.parametrize("name", ["attention_mask", "text_embedding_mask", "text_embedding_mask_t5"])
@pytest.mark.parametrize("mask", HIDING.values(), ids=HIDING)
def test_the_mask_of_the_negative(name, mask):
    base, negative = Masking(name), [(torch.randn(1, 5, 6), {"attention_mask": mask})]
    found = negative_arguments(base, negative, latents(), {"context": 1, name: 1})
    assert found.keys() == {"context", name}
    with pytest.raises(SlothError, match=f"hides some of its tokens by {name}"):
        negative_arguments(base, negative, latents(), {"context": 1, name: None})


@pytest.mark.parametrize("mask", SHOWING.values(), ids=SHOWING)
def test_a_mask_that_hides_nothing(mask):
    negative = [(torch.randn(1, 5, 6), {"attention_mask": mask})]
    assert negative_arguments(Masking("attention_mask"), negative, latents(), {"context": 1}).keys() == {"context"}


def test_options_of_a_further_call_are_made_within_a_graph():
    options = Handing().options({"cond_or_uncond": [1, 0], "uuids": [uuid.UUID(int=1), uuid.UUID(int=2)]})

    @torch.compile(fullgraph=True, backend="eager")
    def further(x):
        own = options.of_groups((False, True))
        return x * len(own["uuids"]) + own["cond_or_uncond"][0]

    assert (further(torch.ones(3, 5)) == 1).all()
    assert isinstance(options.of_groups((False, True)), HandedOn)
    seen = options.of_groups((False, True))["uuids"]
    assert seen == options.of_groups((False, True))["uuids"]  # from run to run the same
    assert seen[0] not in (uuid.UUID(int=1), uuid.UUID(int=2))


def test_wrappers_are_remembered_while_they_are_used():
    class Wrapper:
        def __call__(self, executor, *args):
            return executor(*args)

    handing, gone = Handing(), []
    for wrapper in (Wrapper(), Wrapper(), Wrapper()):
        given = {"wrappers": {"diffusion_model": {"pack": [wrapper]}}}
        first, second = (handing.options(given)["wrappers"]["diffusion_model"]["pack"][0] for _ in range(2))
        assert first is second  # another one would be a new graph
        gone.append(weakref.ref(wrapper))
    del wrapper, given, first, second
    gc.collect()
    assert [each() is None for each in gone] == [True, True, False]
