"""The names of torch that have no public spelling: if one of them moves, this says so."""

import sys

import torch
import torch.nn.functional as F

from sloth_fx.capture.torch_private import VMAP, undispatched


def test_vmap_is_where_it_was(monkeypatch):
    seen = []
    module = sys.modules[VMAP.module]
    original = getattr(module, VMAP.name)
    monkeypatch.setattr(module, VMAP.name, lambda *args, **kwargs: seen.append(args) or original(*args, **kwargs))
    x = torch.randn(3, 5)
    assert torch.equal(torch.vmap(lambda row: row * 2)(x), x * 2)
    assert seen[0][-1] is x


def test_a_functions_own_code_runs_for_tensors_with_a_torch_function():
    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs)

    seen = []
    x = torch.randn(3, 5).as_subclass(Watched)
    expected = F.layer_norm(x, (5,))
    assert seen[0] is F.layer_norm
    seen.clear()
    assert torch.equal(undispatched(F.layer_norm)(x, (5,)), expected)
    assert F.layer_norm not in seen
