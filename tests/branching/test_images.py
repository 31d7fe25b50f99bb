"""In a trial it is known what is no image: a vector of the text modulates nothing else as it does an image."""

from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
import torch
from torch import nn

from sloth_fx.branching import NoImageError, Pair, TellImages
from sloth_fx.branching.images import is_no_image


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.tokens = nn.Parameter(torch.randn(1, 3, 6))
        self.register_buffer("table", torch.randn(5, 6))


def vector():
    return Pair(torch.randn(2, 1, 6), torch.randn(2, 1, 6))


NOT_IMAGES = {
    "learned tokens": lambda model, image: model.tokens.expand(2, -1, -1),
    "through a layer": lambda model, image: model.layer(model.tokens.repeat(2, 1, 1)),
    "a table": lambda model, image: model.table[torch.arange(4)][None],
    "a mask": lambda model, image: torch.zeros(2, 5, 6),
}
IMAGES = {
    "the image": lambda model, image: image,
    "through a layer": lambda model, image: model.layer(image) + model.table[0],
    "written into a buffer": lambda model, image: _written(image),
    "a part of a sequence": lambda model, image: torch.cat([vector(), image * 2], 1)[:, 1:],
}


def _written(image):
    buffer = torch.zeros(2, 7, 6)
    buffer[:] = image
    return buffer


@pytest.mark.parametrize("name", NOT_IMAGES)
def test_what_is_made_of_weights_alone_is_no_image(name):
    model, image = Model().requires_grad_(False), torch.randn(2, 7, 6)
    with TellImages(model):
        tokens = NOT_IMAGES[name](model, image)
        with pytest.raises(NoImageError, match="learned tokens are modulated by the text"):
            _ = tokens + vector()
        assert isinstance(tokens + torch.ones(6), torch.Tensor)
    assert not is_no_image(tokens)  # nobody knows outside of a trial


@pytest.mark.parametrize("name", IMAGES)
def test_what_may_be_an_image_is_modulated(name):
    model, image = Model().requires_grad_(False), torch.randn(2, 7, 6)
    with TellImages(model):
        assert isinstance(IMAGES[name](model, image) * (1 + vector()), torch.Tensor)


def test_a_trial_knows_nothing_of_those_on_other_threads():
    """One ends while the other goes on."""
    model, other = Model(), Model()
    entered, ended = Event(), Event()

    def short():
        with TellImages(other):
            entered.set()
            assert begun.wait(60)
        ended.set()

    begun = Event()
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(short)
        assert entered.wait(60)
        with TellImages(model):
            assert is_no_image(model.tokens)
            assert not is_no_image(other.tokens)
            begun.set()
            assert ended.wait(60)
            assert is_no_image(model.tokens)
        assert not is_no_image(model.tokens)
        done.result()
