"""What a host writes in place is seen under all names that look at it, and under no other; or it is refused."""

import pytest
import torch
import torch.nn.functional as F

from sloth_fx.branching import Pair, Tokens, TwoLengths, UnwritableError
from sloth_fx.branching.values import of

IMAGE = 7


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


POSITIONS = noise(1, IMAGE, 6)


def slice_of_image(text, image):
    x = torch.cat([text, image], 1)
    x[:, text.shape[1] :] += POSITIONS
    return x, text, image


def view_of_image(text, image):
    x = torch.cat([text, image], 1)
    view = x[:, -IMAGE:]
    view.add_(POSITIONS).clamp_(max=1.0)
    return x, view, image


def view_of_text(text, image):
    x = torch.cat([image, text], 1)
    x[:, IMAGE:].mul_(3.0)
    return x, text


def whole(text, image):
    x = torch.cat([text, image], 1)
    turned = x.transpose(1, 2)
    x += 0.5
    return turned, x, text, image


def heads(text, image):
    x = torch.cat([text, image], 1)
    parts = x.unflatten(-1, (2, 3)).transpose(1, 2)
    parts *= torch.arange(1, 3)[:, None, None]
    return x, image


def by_index(text, image):
    x = torch.cat([text, image], 1)
    turned = x.transpose(1, 2)
    x[:, text.shape[1] :, :4] = image[..., 2:] * 2
    x[:, : text.shape[1]] = 0
    return turned, text, image


def piece_of_image(text, image):
    x = torch.cat([image, text], 1)
    x[:, 2:5] = image[:, :3]
    x[:1, IMAGE:] = 1.0
    return x, image


def activation(text, image):
    x = torch.cat([text, image], 1)
    found = F.silu(x, inplace=True)
    F.leaky_relu(x, 0.1, True)
    return x, found, text, image


def text_alone(text, image):
    view = text.view(2, -1)
    text += 1
    return view, image


def activation_of_text(text, image):
    view = text.view(2, -1)
    F.relu(text, True)
    F.threshold(view[:, 2:], 0.5, 0.25, inplace=True)
    return view, text, image


SEEN = (
    *(slice_of_image, view_of_image, view_of_text, whole, heads, by_index, piece_of_image, activation, text_alone),
    activation_of_text,
)


@pytest.mark.parametrize("lengths", [(5, 5), (5, 3)], ids=str)
@pytest.mark.parametrize("write", SEEN)
def test_what_is_written_is_seen_as_in_two_calls(write, lengths):
    texts, image = [noise(2, each, 6) for each in lengths], noise(2, IMAGE, 6)
    expected = [write(text.clone(), image.clone()) for text in texts]
    with TwoLengths():
        found = write(Pair(*(text.clone() for text in texts)), image.clone())
    for branch in range(2):
        for one, other in zip(found, expected[branch], strict=True):
            torch.testing.assert_close(of(one, branch), other)


REFUSED = {
    "a chunk of a sequence": lambda x, pair: x.chunk(2, 1)[0].mul_(2),
    "a view of a chunk": lambda x, pair: x.chunk(2, 1)[0].transpose(1, 2).zero_(),
    "a token": lambda x, pair: x[:, 0].mul_(2),
    "a token by index": lambda x, pair: x.__setitem__((slice(None), 0), 1.0),
    "tokens in steps": lambda x, pair: x.__setitem__((slice(None), slice(None, None, 2)), 1.0),
    "along tokens": lambda x, pair: x.cumsum_(1),
    "an activation of a copy": lambda x, pair: F.relu(x.reshape(-1, 6), inplace=True),
    "an activation of a copy, by position": lambda x, pair: F.leaky_relu(x.reshape(-1, 6), 0.1, True),
    "an activation that is not known": lambda x, pair: F.threshold(x, 0.5, 0.25, inplace=True),
    "another shape": lambda x, pair: x.transpose_(1, 2),
    "into the image what differs": lambda x, pair: x.add_(pair.mean((1, 2), keepdim=True)),
    "into the image by index": lambda x, pair: x[:, 5:].add_(pair.mean((1, 2), keepdim=True)),
    "the same data twice": lambda x, pair: x.parts[1][:, :5].view_as(pair).add_(1),
    "by an operation of torch": lambda x, pair: torch.ops.aten.add_.Tensor(x.parts[1][:, :5], pair),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_lost_or_seen_by_both_is_refused(name):
    pair = Pair(noise(2, 5, 6), noise(2, 5, 6))
    x = torch.cat([pair, noise(2, IMAGE, 6)], 1)
    assert isinstance(x, Tokens)
    with pytest.raises(UnwritableError):
        REFUSED[name](x, pair)
