"""Places against real tensors of whole numbers: what moves the numbers of an input has to move their places."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from sloth_fx.locate.places import NOWHERE
from tests.locate.follow import IMAGE, SEQUENCE, Run, numbered


def windows_of(x, size=2):
    """Of (B, H, W, C), as windowed transformers cut them out."""
    b, h, w, c = x.shape
    return x.view(b, h // size, size, w // size, size, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, size * size, c)


def by_chunks(x):
    out = torch.empty_like(x)
    for start in range(0, x.shape[1], 4):
        out[:, start : start + 4] = x[:, start : start + 4]
    return out


def written(x):
    out = x.clone()
    out[:, 3:5] = x[:, 8:10]
    return out


EXACT = {
    "view": lambda x: x.view(3, 3, 5, 4),
    "flatten": lambda x: x.flatten(1),
    "unflatten": lambda x: x.unflatten(1, (5, -1)).unflatten(-1, (2, 2)),
    "transpose": lambda x: x.transpose(-1, 1),
    "permute": lambda x: x.permute(2, 0, 1),
    "movedim": lambda x: x.movedim(0, -1),
    "contiguous": lambda x: x.mT.contiguous().reshape(3, -1),
    "squeeze": lambda x: x[:, None].squeeze(1)[..., None, :].squeeze(-2),
    "expand": lambda x: x[:, None].expand(3, 2, 15, 4).flatten(0, 1),
    "repeat": lambda x: x.repeat(2, 1, 1),
    "repeat_tokens": lambda x: x.repeat(1, 2, 3),
    "repeat_interleave": lambda x: x.repeat_interleave(3, dim=1),
    "tile": lambda x: x.tile(2, 1),
    "slices": lambda x: x[1:, 2:-3:2, -1:],
    "select": lambda x: x[:, 4],
    "split": lambda x: torch.cat(x.split([4, 5, 6], 1)[::-1], 1),
    "split_evenly": lambda x: torch.cat(x.split(4, 1)[::-1], 1),
    "chunk": lambda x: torch.stack(x.chunk(3, dim=1)[::-1], 1),
    "unbind": lambda x: torch.stack(x.unbind(1)[::-1], 1),
    "cat_batches": lambda x: torch.cat([x, x]),
    "cat_tokens": lambda x: torch.cat([x[:, 5:], x[:, :5]], dim=1),
    "stack": lambda x: torch.stack([x, x.flip(1)], dim=1),
    "flip": lambda x: x.flip(1, 2),
    "roll": lambda x: x.roll((2, -3), (0, 1)),
    "roll_a_map": lambda x: torch.roll(x.view(3, 3, 5, 4), shifts=(-1, 2), dims=(1, 2)),
    "index": lambda x: x[:, torch.arange(15).flip(0)],
    "index_by_two": lambda x: x[torch.tensor([[2], [0]]), torch.tensor([[1, 5, 14]])],
    "index_select": lambda x: x.index_select(1, torch.tensor([3, 3, 1, 14])),
    "gather": lambda x: x.gather(1, torch.tensor([4, 0, 9]).view(1, 3, 1).expand(3, 3, 4)),
    "take_along_dim": lambda x: x.take_along_dim(torch.tensor([4, 0, 9]).view(1, 3, 1), 1),
    "mask": lambda x: x[:, torch.arange(15) % 4 != 1],
    "mask_of_rows_and_tokens": lambda x: x[torch.arange(45).view(3, 15) % 4 != 1],
    "windows_by_unfold": lambda x: x.unfold(1, 5, 2),
    "windows_by_permute": lambda x: windows_of(x[:, :12].unflatten(1, (2, 6))),
    "einops": lambda x: rearrange(x, "b (h w) c -> (b h) w c", h=3),
    "einops_swaps": lambda x: rearrange(x, "b (h p w) (c d) -> b (h w) (d c p)", h=5, p=3, d=2),
    "a_loop_of_chunks": by_chunks,
    "index_put": lambda x: x.clone().index_put_((torch.tensor([0, 2]), torch.tensor([3, 4])), x[1, :2]),
    "index_copy": lambda x: torch.empty_like(x).index_copy_(1, torch.arange(14, -1, -1), x),
    "scatter": lambda x: torch.empty_like(x).scatter(1, torch.arange(14, -1, -1).view(1, 15, 1).expand(3, 15, 4), x),
    "masked_scatter": lambda x: x.masked_scatter((torch.arange(15) > 11)[:, None], x.flip(1)),
    "where": lambda x: torch.where((torch.arange(15) < 4)[:, None], x, x),
    "clone": lambda x: x.clone(),
    "view_as": lambda x: x.mT.view_as(x.mT),
    "a_copy_with_other_tokens": written,
    "narrow": lambda x: x.narrow(1, 3, 7),
    "hsplit": lambda x: x.tensor_split(2, dim=1)[1],
    "unfold_twice": lambda x: x.view(3, 3, 5, 4).unfold(1, 2, 1).unfold(2, 3, 2),
}


@pytest.mark.parametrize("name", EXACT)
def test_what_moves_numbers_moves_places(name):
    [expected] = numbered(SEQUENCE)
    assert (Run(EXACT[name], SEQUENCE).places == EXACT[name](expected).numpy()).all()


PADDED = {
    "constant": lambda x, n: F.pad(x, (1, 2, 0, 3), value=n),
    "negative": lambda x, n: F.pad(x, (-1, 2, 3, -2), value=n),
    "channels": lambda x, n: F.pad(x, (0, 0, 0, 0, 1, 0), value=n),
    "by_cat": lambda x, n: torch.cat([x, torch.full((2, 3, 2, 10), n, dtype=x.dtype)], dim=2),
    "into_a_buffer": lambda x, n: _buffered(x, n),
}


def _buffered(x, nothing):
    out = torch.full((2, 3, 8, 11), nothing, dtype=x.dtype)
    out[:, :, 1:7, :10] = x
    return out


@pytest.mark.parametrize("name", PADDED)
def test_padding_stands_for_nothing(name):
    [numbers] = numbered(IMAGE)
    expected = PADDED[name](numbers, -1).numpy()
    places = Run(lambda x: PADDED[name](x, 0), IMAGE).places
    assert (np.where(places == NOWHERE, -1, places) == expected).all()
