"""Keys and values that depend on the text alone: which, why not, and that a full run gives the same ones."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sloth_fx import SlothError
from sloth_fx.analysis import text_kv, whole_graph
from sloth_fx.analysis.dependencies import Dependencies
from sloth_fx.capture.call import read_call
from sloth_fx.capture.generate import generate
from sloth_fx.passes.core import attention_cores
from tests.analysis.tiny import tiny

TEXT, MASK = "encoder_hidden_states", "encoder_attention_mask"
FOUND = {"sd15": (10, 20), "sdxl": (11, 22), "sd3": (0, 2), "wan": (2, 4), "pixart": (2, 4)}


def of_a_full_run(whole, model, cores, inputs):
    """Keys, values and masks that the whole graph computes."""
    found = attention_cores(whole.graph)
    (output,) = (node for node in whole.graph.nodes if node.op == "output")
    output.args = ({index: (found[index].key, found[index].value, found[index].mask) for index in cores},)
    return generate(whole.graph, "test")(model, *read_call((), inputs)[1])


@pytest.mark.parametrize("name", list(FOUND))
def test_the_slice_gives_what_a_full_run_computes(name):
    model, inputs = tiny(name)
    whole = whole_graph(model, **inputs)
    masks = [MASK] if MASK in inputs else []
    found = text_kv(whole, [TEXT, *masks])
    count, total = FOUND[name]
    assert len(found.cores) == count
    assert len(found.reasons) == total - count
    latent = next(iter(whole.inputs))
    assert all(latent in reason for reason in found.reasons.values())
    text = torch.randn_like(inputs[TEXT])
    later = {**inputs, TEXT: text}
    if isinstance(inputs["timestep"], torch.Tensor):
        later["timestep"] = inputs["timestep"] / 3
    with torch.no_grad():
        got = found(model, text, *(inputs[each] for each in masks))
        expected = of_a_full_run(whole, model, found.cores, later)
    assert got.keys() == expected.keys() == set(found.cores)
    for index in found.cores:
        assert got[index][0].shape[-2] == text.shape[1]
        for one, other in zip(got[index], expected[index], strict=True):
            assert one is other is None or torch.equal(one, other)


def test_bad_names_and_shapes_are_refused():
    model, inputs = tiny("pixart")
    whole = whole_graph(model, **inputs)
    with pytest.raises(SlothError, match="prompt: no inputs of the model; it takes hidden_states"):
        text_kv(whole, ["prompt"])
    found = text_kv(whole, [TEXT, MASK])  # it reads the number of samples from the latent
    with pytest.raises(SlothError, match="captured for"):
        found(model, torch.randn(3, 7, 24), inputs[MASK])
    with pytest.raises(SlothError, match="0 tensors are given for encoder_hidden_states, encoder_attention_mask"):
        found(model)


def test_a_mask_comes_with_its_keys():
    model, inputs = tiny("pixart")
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    inputs = {**inputs, TEXT: torch.randn(2, 5, inputs[TEXT].shape[-1]), MASK: mask}
    whole = whole_graph(model, **inputs)
    assert not text_kv(whole, [TEXT]).cores
    found = text_kv(whole, [TEXT, MASK])
    assert len(found.cores) == 2
    for key, _, hidden in found(model, inputs[TEXT], 1 - mask).values():
        assert key.shape[-2] == 5
        assert torch.equal(hidden.expand(2, -1, -1, -1)[:, 0, 0] < 0, mask.bool())


class Writing(nn.Module):
    """The keys are the text's, but what is written into them may not be."""

    def __init__(self, source):
        super().__init__()
        self.to_k, self.source = nn.Linear(6, 6), source

    def forward(self, x, text):
        key = torch.zeros(x.shape[0], text.shape[1] + 1, 6)
        key[:, 1:] = self.to_k(text)
        view = key[:, :1]
        view.copy_((x if self.source == "x" else text).mean(1, keepdim=True))
        return F.scaled_dot_product_attention(x[:, None], key[:, None], torch.zeros_like(key)[:, None])


@pytest.mark.parametrize(("source", "names"), [("x", {"x", "text"}), ("text", {"text"})])
def test_what_is_written_counts_and_what_is_only_asked_for_its_shape_does_not(source, names):
    model, x, text = Writing(source), torch.randn(2, 5, 6), torch.randn(2, 3, 6)
    whole = whole_graph(model, x, text)
    (core,) = attention_cores(whole.graph)
    dependencies = Dependencies(whole.graph)
    assert {str(node.target) for node in dependencies.placeholders(core.key)} == names
    assert dependencies.placeholders(core.value) == frozenset()
    found = text_kv(whole, ["text"])
    assert len(found.cores) == (source == "text")
    if found.cores:
        key, value, mask = found(model, text)[0]
        assert mask is None
        assert torch.equal(key[:, 0, 1:], model.to_k(text))
        assert torch.equal(key[:, 0, 0], text.mean(1))
        assert not value.any()
