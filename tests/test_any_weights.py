"""Weights that are no plain tensors, modules in front of the projections, tokens on several devices."""

import copy
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sloth_fx
from sloth_fx import Constant, NearSightedTile, Reduction, SlothfulAttention, TokenMerging
from tests import models
from tests.zoo.registry import MODELS, run

POOLED = Reduction(rate=4.0, depth_decay=0.0, k_blend=1.0, v_blend=1.0)
SPEC = SlothfulAttention(in_=POOLED, out=POOLED, schedule=Constant(), keep_middle=False)


def test_quantised_linears_are_leaves():
    """torchao's import changes what others import, hence a process of its own."""
    pytest.importorskip("importlib.metadata").version("torchao")
    code = """
        import copy, torch, sloth_fx
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
        from tests import models
        model = copy.deepcopy(models.shared("sd15"))
        quantize_(model, Int8WeightOnlyConfig())
        values = models.inputs(model, 2, 13, 21)
        neutral = sloth_fx.SlothfulAttention(in_=sloth_fx.Reduction(rate=1.0), out=sloth_fx.Reduction(rate=1.0))
        patched = [sloth_fx.transform(model, spec) for spec in (neutral, sloth_fx.SlothfulAttention())]
        with torch.no_grad():
            expected = model(**values).sample
            for each in patched:
                sloth_fx.context(each).at(0.4)
            assert torch.equal(patched[0](**values).sample, expected)
            assert not torch.allclose(patched[1](**values).sample, expected, atol=1e-3)
        weight = patched[1].down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q.weight
        assert "int8" in type(weight).__name__.lower() or "Affine" in type(weight).__name__, type(weight)
        print("as expected")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("as expected"), done.stderr[-3000:]


class Hypernetwork(nn.Module):
    """A small network in front of a projection, as hypernetworks put in front of those of keys and values."""

    def __init__(self, projection):
        super().__init__()
        width = projection.in_features
        self.body = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        self.projection = projection

    def forward(self, tokens):
        return self.projection(tokens + self.body(tokens))


@pytest.mark.parametrize(
    "spec",
    [SPEC, [SPEC, TokenMerging(max_depth=7)], [SPEC, NearSightedTile(tile_size=5)]],
    ids=["pool", "merge", "tile"],
)
def test_hypernetworks_compose(spec):
    plain = models.shared("sd15")
    model = copy.deepcopy(plain)
    torch.manual_seed(1)
    for block in (module for module in model.modules() if type(module).__name__ == "BasicTransformerBlock"):
        block.attn1.to_k, block.attn1.to_v = Hypernetwork(block.attn1.to_k), Hypernetwork(block.attn1.to_v)
    values = models.inputs(model, 2, 13, 21)
    before = models.run(model, values)
    patched = sloth_fx.transform(model, spec)
    sloth_fx.context(patched).at(0.4)
    out = models.run(patched, values)
    without = sloth_fx.transform(plain, spec)
    sloth_fx.context(without).at(0.4)
    assert torch.isfinite(out).all()
    assert not torch.allclose(out, before, atol=1e-3)
    assert not torch.allclose(out, models.run(without, values), atol=1e-3)  # they are still there
    assert torch.equal(models.run(model, values), before)


def test_what_a_hypernetwork_gives_is_pooled():
    """Nobody knows that it works on each token alone, so windows are pooled of what it made."""
    model = models.one_level()
    for block in (module for module in model.modules() if type(module).__name__ == "BasicTransformerBlock"):
        block.attn1.to_k, block.attn1.to_v = Hypernetwork(block.attn1.to_k), Hypernetwork(block.attn1.to_v)
    patched = sloth_fx.transform(model, SPEC)
    notes = {site.note for site in sloth_fx.report(patched) if site.operators}
    assert notes == {"keys and values reduced at the attention's keys and values"}


def test_tokens_that_are_spread_over_devices_are_refused():
    entry = MODELS["FluxTransformer2DModel"]
    model, inputs = entry.build(), entry.inputs()
    processor = model.transformer_blocks[0].attn.processor
    processor._parallel_config = SimpleNamespace(context_parallel_config="ring")
    with pytest.raises(sloth_fx.SlothError, match=r"transformer_blocks.0.attn.*several devices.*enable_parallelism"):
        sloth_fx.transform(model, SPEC, example_inputs=inputs)
    processor._parallel_config = None
    patched = sloth_fx.transform(model, SPEC, example_inputs=inputs)
    sloth_fx.context(patched).at(0.4)
    assert run(patched, inputs)


def test_weights_on_meta_are_enough_for_a_transformer():
    entry = MODELS["SD3Transformer2DModel"]
    model = entry.build().to("meta")
    assert {site.kind for site in sloth_fx.inspect(model)} == {"joint"}
    patched = sloth_fx.transform(model, SPEC)
    assert all(site.operators for site in sloth_fx.report(patched))
