"""Arguments at another size, by hand: 2 x the rows, 3 x the columns, an image more, three words more; then less."""

import pytest
import torch
from torch import nn

from sloth_fx.capture.skeleton import Skeleton
from sloth_fx.locate.resize import resized_calls
from sloth_fx.model_adapters import Arguments, ModelAdapter
from sloth_fx.site import LatentSize

SKELETON = Skeleton(nn.Identity())


class Host(nn.Module):
    def forward(self, sample, timestep=None, text=None, mask=None, ids=None, extra=None, rows=None, columns=None):
        raise NotImplementedError


class PackedHost(nn.Module):
    def forward(self, tokens, text=None, img_shapes=None, ids=None, height=None, width=None):
        raise NotImplementedError


def fake(*shape):
    return SKELETON.fake(torch.empty(shape, device="meta"))


def calls(host, adapter, *args, size, **kwargs):
    """All trials: their arguments, and the size of the latent there."""
    return list(resized_calls(adapter, Arguments(host(), adapter), (args, kwargs), size, SKELETON.fake))


def shapes(call):
    args, kwargs = call
    named = {**{str(index): value for index, value in enumerate(args)}, **kwargs}
    return {name: tuple(value.shape) for name, value in named.items() if isinstance(value, torch.Tensor)}


def test_an_image_and_text():
    """What is refused is tried with less: without more text, without more images, then at half the rows."""
    tried = calls(Host, ModelAdapter(), fake(2, 4, 6, 10), 500, text=fake(2, 7, 24), size=LatentSize(1, 6, 10))
    assert [(shapes(call)["0"], shapes(call)["text"]) for call, _ in tried] == [
        ((3, 4, 12, 30), (3, 10, 24)),
        ((3, 4, 12, 30), (3, 7, 24)),
        ((2, 4, 12, 30), (2, 7, 24)),
        ((3, 4, 3, 10), (3, 10, 24)),
        ((3, 4, 3, 10), (3, 7, 24)),
        ((2, 4, 3, 10), (2, 7, 24)),
    ]
    assert [size for _, size in tried] == [(1, 12, 30)] * 3 + [(1, 3, 10)] * 3
    assert all(call[0][1] == 500 for call, _ in tried)


def test_maps_that_go_with_the_latent():
    """As large, or a whole multiple: a mask, a control image of 8 x the size. A map of another size stays."""
    first, _ = calls(
        Host,
        ModelAdapter(),
        fake(2, 4, 6, 10),
        extra={"control": fake(2, 3, 48, 80), "mask": [fake(2, 1, 6, 10), fake(2, 1, 5, 10)]},
        size=LatentSize(1, 6, 10),
    )[0]
    extra = first[1]["extra"]
    assert tuple(extra["control"].shape) == (3, 3, 96, 240)
    assert [tuple(each.shape) for each in extra["mask"]] == [(3, 1, 12, 30), (3, 1, 5, 10)]
    assert isinstance(extra["mask"], list)


def test_a_video_keeps_its_frames():
    first, size = calls(Host, ModelAdapter(), fake(2, 4, 5, 6, 10), text=fake(10, 7, 24), size=LatentSize(5, 6, 10))[0]
    assert shapes(first)["0"] == (3, 4, 5, 12, 30)
    assert shapes(first)["text"] == (15, 10, 24)  # one for each frame
    assert size == (5, 12, 30)


def test_masks_of_text_grow_with_it():
    first, _ = calls(
        Host,
        ModelAdapter(text=("text",)),
        fake(2, 4, 6, 10),
        text=fake(2, 7, 24),
        mask=fake(2, 7),
        ids=fake(7, 3),
        size=LatentSize(1, 6, 10),
    )[0]
    assert shapes(first) == {"0": (3, 4, 12, 30), "text": (3, 10, 24), "mask": (3, 10), "ids": (10, 3)}


def test_values_are_kept_where_they_can_be():
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    scale = torch.tensor([[1.0, 2.0]])
    first, _ = calls(
        Host,
        ModelAdapter(text=("text",)),
        fake(2, 4, 6, 10),
        text=fake(2, 5, 24),
        mask=mask,
        extra=scale,
        size=LatentSize(1, 6, 10),
    )[0]
    assert first[1]["mask"].tolist() == [[1, 1, 1, 0, 0, 0, 0, 0], [1] * 8, [1] * 8]
    assert first[1]["extra"] is scale


def test_packed_tokens_and_their_shapes():
    adapter = ModelAdapter(latent="tokens", text=("text",), shapes="img_shapes", axes="bnc")
    size = LatentSize(1, 6, 10)
    tried = calls(
        PackedHost,
        adapter,
        tokens=fake(2, 60, 16),
        text=fake(2, 7, 24),
        ids=fake(60, 3),
        img_shapes=[[(1, 6, 10)], [(1, 6, 10)]],
        size=size,
    )
    first, new = tried[0]
    assert shapes(first) == {"tokens": (3, 360, 16), "text": (3, 10, 24), "ids": (360, 3)}
    assert first[1]["img_shapes"][0] == [(1, 12, 30)]
    assert new == (1, 12, 30)
    halved, new = tried[3]
    assert shapes(halved)["tokens"] == (3, 30, 16)
    assert new == (1, 3, 10)


def test_packed_tokens_and_their_numbers():
    adapter = ModelAdapter(latent="tokens", text=("text",), sizes=("height", "width"), axes="bnc")
    first, new = calls(
        PackedHost, adapter, tokens=fake(2, 60, 16), text=fake(2, 7, 24), height=6, width=10, size=LatentSize(1, 6, 10)
    )[0]
    assert (first[1]["height"], first[1]["width"]) == (12, 30)
    assert new == (1, 12, 30)
    assert shapes(first)["tokens"] == (3, 360, 16)


def test_a_waveform_has_one_row():
    adapter = ModelAdapter(latent="sample", text=("text",), axes="bcw")
    first, size = calls(Host, adapter, fake(2, 4, 15), text=fake(2, 7, 24), size=LatentSize(1, 1, 15))[0]
    assert shapes(first) == {"0": (3, 4, 45), "text": (3, 10, 24)}
    assert size == (1, 1, 45)


def test_what_is_unknown_stays():
    """Without a size, a map is not resized; the batch and the text are."""
    first, size = calls(Host, ModelAdapter(text=("text",)), fake(2, 6, 10), text=fake(2, 7, 24), size=None)[0]
    assert size is None
    assert shapes(first)["text"] == (3, 10, 24)


def test_arguments_without_a_latent_are_not_resized():
    assert calls(Host, ModelAdapter(), 3, size=None) == []


@pytest.mark.parametrize("kind", [tuple, list])
def test_containers_keep_their_type(kind):
    first, _ = calls(
        Host, ModelAdapter(), fake(2, 4, 6, 10), extra=kind([fake(2, 8), None, "word"]), size=LatentSize(1, 6, 10)
    )[0]
    extra = first[1]["extra"]
    assert type(extra) is kind
    assert (tuple(extra[0].shape), extra[1:]) == ((3, 8), kind([None, "word"]))
