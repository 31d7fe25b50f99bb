"""Which rows a second call has: those that are guided, where these can be told from all, and otherwise all."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sloth_fx
from sloth_fx import PAG
from sloth_fx.call_rows import can_be_picked
from sloth_fx.capture.objects import HandedOn
from tests.perturbed_by_hand import attend
from tests.test_perturbed import BATCH, COND, SCALE, guided, patched, run
from tests.test_perturbed_uses import call_of_its_own

LATENT = torch.zeros(BATCH, 4, 5, 7)  # channels may be as many as rows
TOLD = {
    "text": torch.zeros(BATCH, 3, 8),
    "one text for all": torch.zeros(1, 3, 8),
    "timestep": torch.zeros(BATCH, dtype=torch.int64),
    "scale": torch.tensor(3),
    "options": {"pooled": torch.zeros(BATCH, 6), "name": "x", "flag": None},
    "residuals": [torch.zeros(BATCH, 6, 5, 7), None],
}
NOT_TOLD = {
    "rows along another axis": torch.zeros(BATCH, BATCH, 3, 8),
    "of another number": torch.zeros(2 * BATCH, 3, 8),
    "positions": torch.zeros(3, 2),
    "frames": torch.arange(BATCH),
    "mask": torch.zeros(BATCH, 3),
    "hidden": torch.zeros(BATCH, 3, dtype=torch.bool),
    "sizes": [(5, 7)] * BATCH,
    "a list of texts": [torch.zeros(3, 8)] * BATCH,
    "a list of images": [torch.zeros(BATCH, 5, 7)] * BATCH,
    "embeddings": {"image": [torch.zeros(2 * BATCH, 3, 8)]},
    "options of a host": HandedOn(),
    "an object": object(),
}


@pytest.mark.parametrize(("given", "told"), [(TOLD, True), (NOT_TOLD, False)], ids=["told", "not told"])
def test_what_rows_can_be_picked_of(given, told):
    for name, value in given.items():
        assert can_be_picked(((), {"latent": LATENT, name: value}), LATENT) == told, name
        assert can_be_picked(((LATENT,), {"x": torch.zeros(BATCH, 2), name: value}), LATENT) == told, name


class Packing(nn.Module):
    """Text is cut to the longest of the batch, and goes behind the image where the texts differ in length."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Conv2d(4, 12, 2, stride=2), nn.Linear(12, 4)
        self.context = nn.Linear(8, 12)

    def forward(self, latent, timestep, context, mask):
        b, _, h, w = latent.shape
        image, lengths = self.embed(latent).flatten(2).mT, mask.sum(1).tolist()
        text, seen = self.context(context)[:, : max(lengths)], mask[:, : max(lengths)]
        last = min(lengths) < max(lengths)
        q = torch.cat([image, text] if last else [text, image], 1).unflatten(2, (2, 6)).transpose(1, 2)
        n = image.shape[1]
        hidden = F.pad(seen, (n, 0) if last else (0, n), value=True)[:, None, None]
        read = F.scaled_dot_product_attention(3 * q, q, q, attn_mask=hidden).transpose(1, 2).flatten(2)
        read = read[:, :n] if last else read[:, -n:]
        return F.interpolate(self.out(image + read).mT.reshape(b, 4, h // 2, w // 2), size=(h, w))


def test_a_host_that_packs_its_texts():
    """Of the guided rows alone, texts are of one length, and it would lay them in front of the image."""
    torch.manual_seed(0)
    model, random = Packing().double().eval(), torch.Generator().manual_seed(3)
    latent, context = (torch.randn(shape, generator=random).double() for shape in ((BATCH, 4, 10, 14), (BATCH, 5, 8)))
    mask = torch.arange(5)[None] < torch.tensor([[2], [2], [4], [4]])
    call = {"latent": latent, "timestep": torch.tensor(3.0), "context": context, "mask": mask}
    found, _ = patched(model, PAG(scale=SCALE, where=None), call)
    assert sloth_fx.report(found).sites[0].query_place.offset == 0
    call_of_its_own(found)

    def itself_and_text(query, key, value, attn_mask=None):
        sees = torch.ones(39, 39, dtype=torch.bool)
        sees[:35, :35] = torch.eye(35, dtype=torch.bool)
        return attend(query, key, value, sees & attn_mask)

    with torch.no_grad():
        p = run(model, call)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", itself_and_text)
            q = run(model, call)[COND]
        torch.testing.assert_close(run(found, call), guided(p, q))
    assert (p[COND] - q).abs().max() > 0.01
