"""Tiles in joint and video attention: what each query sees, written out one by one."""

import pytest
import torch
import torch.nn.functional as F

import sloth_fx
from tests.zoo.registry import MODELS, run

SDPA = F.scaled_dot_product_attention
NAMES = (
    "SD3Transformer2DModel",  # [image, text]
    "FluxTransformer2DModel",  # [text, image], with rotary embeddings
    "FluxTransformer2DModel/kontext",  # [text, image, reference]
    "PRXTransformer2DModel",  # queries of the image alone
    "CogVideoXTransformer3DModel",  # [text, video]
    "WanTransformer3DModel",  # video alone
)


def attended(query, key, value, seen):
    """softmax over the keys that are ``seen`` (queries, keys), in float64; keys may be seen several times."""
    q, k, v = query.double(), key.double(), value.double()
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    weights = (q @ k.mT * q.shape[-1] ** -0.5).exp() * seen
    return ((weights / weights.sum(-1, keepdim=True)) @ v).to(query.dtype)


def seen_by(layout, site, queries, keys):
    """How often each query sees each key."""
    rows, columns = layout.grid
    first = {
        name: place.start(n, layout.tokens)
        for name, place, n in (("query", site.query_place, queries), ("key", site.key_place, keys))
    }
    places = [divmod(number % (rows * columns), columns) for number in range(layout.tokens)]
    tile_of = [(row // layout.tile[0], column // layout.tile[1]) for row, column in places]
    seen = torch.ones(queries, keys, dtype=torch.float64)  # others see, and are seen by, everyone
    for i in range(layout.tokens):
        for j in range(layout.tokens):
            row, column = places[j]
            sampled = layout.samples is not None and row % layout.samples[0] == column % layout.samples[1] == 0
            seen[first["query"] + i, first["key"] + j] = (tile_of[i] == tile_of[j]) + sampled
    return seen


@pytest.mark.parametrize("ratio", [0.0, 0.7])
@pytest.mark.parametrize("name", NAMES)
def test_tiles_see_their_own_tokens_the_samples_and_all_text(name, ratio, monkeypatch):
    entry = MODELS[name]
    model, inputs = entry.build(), entry.inputs()
    spec = sloth_fx.NearSightedTile(tile_size=4, global_ratio=ratio, max_depth=8)
    patched = sloth_fx.transform(model, spec, example_inputs=inputs)
    sloth_fx.context(patched).at(0.4)
    out = run(patched, inputs)
    sites = list(sloth_fx.report(patched))
    layouts = iter(sloth_fx.context(patched).layouts())
    wanted = [(site, next(layouts) if site.operators else None) for site in sites]
    assert sum(layout is not None for _, layout in wanted) >= 2
    calls = iter(wanted)

    def reference(query, key, value, *args, **kwargs):
        site, layout = next(calls)
        if layout is None:
            return SDPA(query, key, value, *args, **kwargs)
        assert (query.shape[-2], key.shape[-2]) == (site.q_tokens, site.kv_tokens)
        seen = seen_by(layout, site, query.shape[-2], key.shape[-2])
        mask = kwargs.get("attn_mask", args[0] if args else None)
        return attended(query, key, value, seen if mask is None else seen * mask)

    monkeypatch.setattr(F, "scaled_dot_product_attention", reference)
    expected = run(model, inputs)
    monkeypatch.undo()
    for mine, theirs in zip(out, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(out[0], run(model, inputs)[0], atol=1e-3)
