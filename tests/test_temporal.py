"""Video: windows lie within frames, and ``temporal`` pools over frames as well."""

import pytest
import torch
import torch.nn.functional as F

import sloth_fx
from sloth_fx import Constant, Reduction, SlothfulAttention
from tests.zoo.registry import MODELS, run

SDPA = F.scaled_dot_product_attention


def windows(layout):
    """The tokens of each window, frame by frame, those that start it first."""
    rows, columns = layout.grid
    down, across = layout.window
    return [
        [
            (frame * rows + row) * columns + column
            for frame in range(first, min(first + layout.frame_window, layout.frames))
            for row in range(top, min(top + down, rows))
            for column in range(left, min(left + across, columns))
        ]
        for first in range(0, layout.frames, layout.frame_window)
        for top in range(0, rows, down)
        for left in range(0, columns, across)
    ]


def by_hand(model, inputs, report, layouts, monkeypatch):
    """The model with each attention over the first token of each window (text whole), in float64."""
    remaining = iter(layouts)
    calls = iter([(site, next(remaining) if site.operators else None) for site in report])

    def reference(query, key, value, *args, **kwargs):
        site, layout = next(calls)
        if layout is None:
            return SDPA(query, key, value, *args, **kwargs)
        start = site.key_place.start(key.shape[-2], layout.tokens)
        kept = [*range(start), *(start + each[0] for each in windows(layout))]
        kept += range(start + layout.tokens, key.shape[-2])
        q, k, v = query.double(), key[..., kept, :].double(), value[..., kept, :].double()
        return ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).to(query.dtype)

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", reference)
        return run(model, inputs)


@pytest.mark.parametrize("temporal", [1, 2])
@pytest.mark.parametrize("name", ["WanTransformer3DModel", "CogVideoXTransformer3DModel", "LatteTransformer3DModel"])
def test_windows_of_a_video(name, temporal, monkeypatch):
    entry = MODELS[name]
    model, inputs = entry.build(), entry.inputs()
    reduction = Reduction(rate=4.0, temporal=temporal)
    spec = SlothfulAttention(in_=reduction, out=reduction, schedule=Constant())
    patched = sloth_fx.transform(model, spec, example_inputs=inputs)
    sloth_fx.context(patched).at(0.4)
    layouts = sloth_fx.context(patched).layouts()
    report = sloth_fx.report(patched)
    assert any(site.kind == "temporal" and site.operators for site in report) == (name[0] == "L" and temporal == 2)
    out = run(patched, inputs)
    for mine, theirs in zip(out, by_hand(model, inputs, report, layouts, monkeypatch), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(out[0], run(model, inputs)[0], atol=1e-3)


def test_keys_are_pooled_over_frames():
    """Latte's temporal attention has no rotary embedding: the mean of the inputs of both frames, projected."""
    entry = MODELS["LatteTransformer3DModel"]
    model, inputs = entry.build(), entry.inputs()
    path = next(site.path for site in sloth_fx.inspect(model, example_inputs=inputs) if site.kind == "temporal")
    pooled = Reduction(rate=1.0, temporal=2, k_blend=1.0, v_blend=1.0)
    spec = SlothfulAttention(in_=pooled, out=pooled, schedule=Constant(), where={"path": path})
    patched = sloth_fx.transform(model, spec, example_inputs=inputs)
    sloth_fx.context(patched).at(0.4)
    seen = {}
    owner = model.get_submodule(path)
    handle = owner.register_forward_hook(
        lambda module, args, kwargs, out: seen.update(tokens=args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    run(model, inputs)
    handle.remove()
    tokens = seen["tokens"]  # (batch, frames, channels)
    assert tokens.shape[1] == 3
    means = torch.stack([tokens[:, :2].mean(1), tokens[:, 2]], 1)
    q, k, v = owner.to_q(tokens), owner.to_k(means), owner.to_v(means)
    q, k, v = (each.unflatten(-1, (owner.heads, -1)).transpose(1, 2).double() for each in (q, k, v))
    attended = ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2).flatten(2).float()
    with torch.no_grad():
        torch.testing.assert_close(patched.get_submodule(path)(tokens), owner.to_out[0](attended), rtol=1e-4, atol=1e-5)
