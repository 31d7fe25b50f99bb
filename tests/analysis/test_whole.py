"""Whole models as one graph: the same bits, the same kind of result, and every attention a core."""

import pytest
import torch
from torch import nn

from sloth_fx import SlothError
from sloth_fx.analysis import whole_graph
from sloth_fx.passes.core import attention_cores
from tests.analysis.tiny import TINY, tiny

CORES = {"sd15": 20, "sdxl": 22, "sd3": 2, "flux": 2, "wan": 4, "pixart": 4}


@pytest.mark.parametrize("name", list(TINY))
@pytest.mark.parametrize("canonical", [False, True])
def test_whole_models_keep_their_bits(name, canonical):
    model, inputs = tiny(name)
    whole = whole_graph(model, **inputs, canonical=canonical)
    other = {
        key: value + 0.5
        if isinstance(value, torch.Tensor) and value.is_floating_point() and "ids" not in key
        else value
        for key, value in inputs.items()
    }
    with torch.no_grad():
        expected, out = model(**other), whole(model, **other)
    assert type(out) is type(expected)
    assert torch.equal(out.sample, expected.sample)
    leaves = [node.meta["module"] for node in whole.graph.nodes if node.op == "call_module"]
    assert all(type(leaf).__module__.startswith("torch.nn.") for leaf in leaves)
    if canonical:
        cores = attention_cores(whole.graph)
        assert len(cores) == CORES[name]
        assert all(core.refusal is None for core in cores)


def test_another_kind_of_call_is_refused():
    model, inputs = tiny("sd3")
    whole = whole_graph(model, **inputs)
    assert list(whole.inputs) == ["hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"]
    with pytest.raises(SlothError, match="captured for another kind of call"):
        whole(model, **inputs, return_dict=False)


class DependsOnData(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


def test_what_cannot_be_captured_says_why():
    with pytest.raises(SlothError, match="DependsOnData cannot be captured as a whole"):
        whole_graph(DependsOnData(), torch.randn(2, 3))
