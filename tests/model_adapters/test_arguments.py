"""Reading calls: the latent, its size, the text, the timestep."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sloth_fx.model_adapters import Arguments, ModelAdapter, arguments


class Model(nn.Module):
    def forward(self, sample, timestep=None, encoder_hidden_states=None, controlnet_cond=None, ids=None, **rest):
        return sample


def read(**fields):
    return Arguments(Model(), ModelAdapter(**fields))


def coordinates(frames, rows, columns, *, first=(0, 0, 0)):
    """(N, 3), by counting: unlike the library, which counts distinct values."""
    grid = [(t, y, x) for t in range(frames) for y in range(rows) for x in range(columns)]
    return torch.tensor(grid, dtype=torch.float32) + torch.tensor(first)


@pytest.mark.parametrize(
    ("shape", "axes", "size"),
    [
        ((3, 4, 9, 14), None, (1, 9, 14)),
        ((3, 4, 5, 9, 14), None, (5, 9, 14)),
        ((3, 5, 4, 9, 14), "btchw", (5, 9, 14)),
        ((3, 5, 9, 14, 4), "bthwc", (5, 9, 14)),
        ((3, 9, 14), "bhw", (1, 9, 14)),
        ((3, 4, 21), "bcw", (1, 1, 21)),
        ((3, 21, 4), "bwc", (1, 1, 21)),
        ((3, 126, 4), None, None),  # packed, and nothing says how
        ((3, 126, 4, 1, 2, 2), "bnc___", None),
        ((3, 126, 4), "bchw", None),  # not what the axes say
        ((3, 126), None, None),
    ],
)
def test_size_by_axes(shape, axes, size):
    latent = torch.zeros(shape)
    assert read(latent="sample", axes=axes).size((latent,), {}) == size
    assert read(latent="sample", axes=axes).size((), {"sample": latent}) == size


def test_the_latent_is_the_first_feature_map():
    sample, text = torch.zeros(3, 4, 9, 14), torch.zeros(3, 7, 24)
    call = (), {"encoder_hidden_states": text, "timestep": torch.tensor([1, 2, 3]), "sample": sample}
    assert read().latent(*call) is sample
    assert read(latent="encoder_hidden_states").latent(*call) is text
    assert read().latent((torch.zeros(3, 9, 14, dtype=torch.long), 3, text), {}) is text
    assert read().latent((), {}) is None


def test_a_list_of_latents():
    latents = [torch.zeros(4, 2, 9, 14), torch.zeros(4, 2, 7, 11)]
    assert read(latent="sample", axes="cthw").latent((latents,), {}) is latents[0]
    assert read(latent="sample", axes="cthw").size((latents,), {}) == (2, 9, 14)
    assert read(latent="sample", axes="cthw").size(([],), {}) is None


def test_integer_tokens_where_the_adapter_names_them():
    assert read(latent="sample", axes="bhw").size((torch.zeros(3, 9, 14, dtype=torch.long),), {}) == (1, 9, 14)


def test_timestep():
    assert read(timestep="timestep").timestep((torch.zeros(1), 7), {}) == 7
    assert read(timestep="timestep").timestep((torch.zeros(1),), {"timestep": 8}) == 8
    assert read(timestep="timestep").timestep((), {}) is None
    assert read().timestep((torch.zeros(1), 7), {}) is None


def test_text_is_what_nothing_else_is():
    text, picture = torch.zeros(3, 7, 24), torch.zeros(3, 4, 9, 14)
    given = {
        "encoder_hidden_states": text,
        "controlnet_cond": picture,
        "image_embeds": text,
        "encoder_hidden_states_image": text,
        "second_caption": text,
        "masked_latents": picture,
        "text_ids": text,
        "text_lengths": torch.zeros(3),
        "caption_tokens": torch.zeros(3, 7, 2, dtype=torch.long),
    }
    assert list(read().text((picture,), given)) == ["encoder_hidden_states", "second_caption"]
    assert read().text((picture, 3, text), {})["encoder_hidden_states"] is text


def test_text_that_is_named():
    text, long = torch.zeros(3, 7), [torch.zeros(5, 24), torch.zeros(8, 24)]
    found = read(text=("encoder_hidden_states", "ids", "absent")).text((None, 3, text), {"ids": long})
    assert list(found) == ["encoder_hidden_states", "ids[0]", "ids[1]"]
    assert found["ids[1]"] is long[1]
    assert read(text=()).text((), {"encoder_hidden_states": torch.zeros(3, 7, 24)}) == {}


def packed(ids, **fields):
    return read(latent="sample", ids="ids", **fields).size((torch.zeros(3, ids.shape[-2], 4),), {"ids": ids})


@pytest.mark.parametrize(("rows", "columns"), [(9, 14), (1, 5), (7, 1), (14, 9)])
def test_size_by_ids(rows, columns):
    ids = coordinates(1, rows, columns)
    assert packed(ids) == (1, rows, columns)
    assert packed(ids.expand(3, -1, -1).contiguous()) == (1, rows, columns)
    assert packed(ids[:, 1:], id_axes="hw") == (1, rows, columns)
    assert packed(ids.flip(1), id_axes="wh_") == (1, rows, columns)
    assert packed(nn.functional.pad(ids, (0, 1)) * 0.5) == (1, rows, columns)  # a fourth column; scaled coordinates


@pytest.mark.parametrize(
    "reference",
    [
        coordinates(1, 6, 10, first=(1, 0, 0)),
        coordinates(1, 9, 14, first=(10, 0, 0)),
        coordinates(1, 6, 10, first=(0, 9, 14)),
        coordinates(1, 9, 10, first=(0, 0, 14)),
        coordinates(1, 6, 10, first=(0, 9, 0)),
        coordinates(1, 6, 14, first=(0, 12, 0)),
    ],
)
def test_reference_images_do_not_count(reference):
    assert packed(torch.cat([coordinates(1, 9, 14), reference])) == (1, 9, 14)


def test_text_in_front_does_not_count():
    zeros, counted = torch.zeros(13, 3), torch.arange(13.0)[:, None].expand(-1, 3)
    assert packed(torch.cat([zeros, coordinates(1, 9, 14)])) == (1, 9, 14)
    assert packed(torch.cat([counted, coordinates(1, 9, 14, first=(99, 99, 99))])) == (1, 9, 14)


def test_frames_count():
    assert packed(coordinates(5, 9, 14), id_axes="fhw") == (5, 9, 14)
    assert packed(coordinates(5, 9, 14), id_axes="thw") == (1, 9, 14)  # there they are five images


def test_some_of_the_coordinates():
    ids = torch.cat([torch.arange(11.0)[:, None].expand(-1, 3), coordinates(2, 9, 14)])
    adapter = read(latent="sample", ids="ids", id_axes="fhw", id_rows="rows")
    assert adapter.size((), {"ids": ids, "rows": torch.arange(11, len(ids))}) == (2, 9, 14)


def test_ids_without_values():
    meta = coordinates(1, 9, 14).to("meta")
    with FakeTensorMode():
        fake = torch.zeros(126, 3)
    assert packed(meta) is None
    assert packed(fake) is None
    assert read(latent="sample", ids="ids").size((torch.zeros(3, 126, 4),), {}) is None
    assert packed(torch.zeros(126, 2)) is None  # too few columns


def test_ids_are_read_once(monkeypatch):
    calls = []
    read_ids = arguments._read_ids
    monkeypatch.setattr(arguments, "_read_ids", lambda *args: calls.append(args) or read_ids(*args))
    ids = coordinates(1, 9, 14)
    for _ in range(3):
        assert packed(ids) == (1, 9, 14)
    assert len(calls) == 1
    ids[:, 1] = ids[:, 1].clamp(max=3)  # in place: read again
    assert packed(ids).columns == 14
    assert packed(ids.clone()).columns == 14
    assert len(calls) == 3
    with torch.inference_mode():
        assert packed(coordinates(1, 9, 14)) == (1, 9, 14)


def test_ids_are_not_kept_alive():
    before = len(arguments._seen)
    packed(coordinates(1, 9, 14))
    assert len(arguments._seen) == before


@pytest.mark.parametrize(
    ("shapes", "target", "size"),
    [
        ([[(1, 9, 14)], [(1, 9, 14)], [(1, 9, 14)]], 0, (1, 9, 14)),
        ([[(1, 9, 14), (1, 6, 10)]] * 3, 0, (1, 9, 14)),
        ([[(1, 6, 10), (1, 9, 14)]] * 3, -1, (1, 9, 14)),
        ([(2, 9, 14)] * 3, 0, (2, 9, 14)),
        ([(2, 9, 14), (1, 6, 10)], -1, (2, 9, 14)),
        ((2, 9, 14), 0, (2, 9, 14)),
        ([9, 14], 0, (1, 9, 14)),
        ([[(1, 9, 14)]], 3, None),
        ([], 0, None),
        (None, 0, None),
        (7, 0, None),
    ],
)
def test_size_by_shapes(shapes, target, size):
    found = read(latent="sample", shapes="img_shapes", target=target).size((), {"img_shapes": shapes})
    assert found == size


def test_size_by_numbers():
    numbers = {"num_frames": 5, "height": 9, "width": torch.tensor(14)}
    assert read(sizes=("num_frames", "height", "width")).size((), numbers) == (5, 9, 14)
    assert read(sizes=("height", "width")).size((), numbers) == (1, 9, 14)
    assert read(sizes=("num_frames", "height", "width")).size((), {**numbers, "height": None}) is None


def test_progress():
    assert [ModelAdapter().progress(t) for t in (1001, 1000, 750, 0, -1)] == [0, 0, 0.25, 1, 1]
    assert ModelAdapter(timesteps=1).progress(0.25) == 0.75
    assert [ModelAdapter(timesteps=0, final_timestep=1).progress(t) for t in (0, 0.25, 1)] == [0, 0.25, 1]
