"""Options that modules of ComfyUI hand to each other, and what others do with them."""

import uuid

import torch

from sloth_fx.capture.objects import HandedOn
from sloth_fx.integrations.comfy.handing import Handing

UUIDS = [uuid.UUID(int=1), uuid.UUID(int=2)]


class Executor:
    """Of ComfyUI's wrappers, where only the model is left to call."""

    class_obj = "the model"

    def __init__(self):
        self.called = []

    def __call__(self, *args, **kwargs):
        self.called.append((args, kwargs))
        return "predicted"


def cached(executor, x, *args, transformer_options):
    """As EasyCache: it asks for a dict, and writes into the latent."""
    assert type(transformer_options) is dict
    assert executor.class_obj == "the model"
    x += 1
    return executor(x, *args, transformer_options=transformer_options)


def changed(executor, x, *args):
    """Others go on with options of their own."""
    return executor(x, {**args[-1], "mine": 1})


def handed(handing, wrapper):
    return handing.options(
        {"wrappers": {"diffusion_model": {"pack": [wrapper]}}, "cond_or_uncond": [1, 0], "uuids": UUIDS}
    )


def test_wrappers_get_a_dict_and_the_model_what_is_handed_on():
    options, executor, x = handed(Handing(), cached), Executor(), torch.zeros(2, 4, 5, 3)
    (wrapper,) = options["wrappers"]["diffusion_model"]["pack"]
    assert wrapper(executor, x, None, transformer_options=options) == "predicted"
    (((latent, nothing), kwargs),) = executor.called
    assert kwargs == {"transformer_options": options}
    assert kwargs["transformer_options"] is options
    assert nothing is None
    assert (latent == 1).all()
    assert (x == 0).all()  # a further call has it


def test_options_that_a_wrapper_has_changed():
    options, executor = handed(Handing(), changed), Executor()
    (wrapper,) = options["wrappers"]["diffusion_model"]["pack"]
    wrapper(executor, torch.zeros(2), options)
    (((_, mine), _),) = executor.called
    assert isinstance(mine, HandedOn)
    assert mine["mine"] == 1
    assert mine.of_groups((False, True))["cond_or_uncond"] == [0]


def test_a_wrapper_is_the_same_in_each_call():
    """Or each would be another graph of a compiled model."""
    handing = Handing()
    one, other = (handed(handing, cached)["wrappers"]["diffusion_model"]["pack"][0] for _ in range(2))
    assert one is other


def test_a_further_call_is_told_apart():
    options = handed(Handing(), cached)
    further = options.of_groups((False, True))
    assert further["cond_or_uncond"] == [0]
    assert further["uuids"] == options.of_groups((True, True))["uuids"][1:]  # the same at each step
    assert not set(further["uuids"]) & set(UUIDS)
    assert options["uuids"] == UUIDS
