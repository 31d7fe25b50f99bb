"""torch.compile and torch.export of patched models: one graph for each set of strides and tiles, and never again."""

import pathlib
import subprocess
import sys
import warnings

import pytest
import torch
import torch._dynamo.utils as dynamo

import sloth_fx
from tests import models

NEAR_SIGHTED = sloth_fx.NearSightedAttention(base_tile_size=5, peak_tile_size=9)
SPECS = {
    "slothful": sloth_fx.SlothfulAttention(),
    "slothful 2023-12-11": sloth_fx.SlothfulAttention.from_node(release="2023-12-11"),
    "near-sighted": NEAR_SIGHTED,
    "both": [sloth_fx.SlothfulAttention(), sloth_fx.NearSightedTile(tile_size=6)],
}
# Inductor imports a part of torch that torch itself calls deprecated.
inductor = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    dynamo.counters.clear()
    with torch._dynamo.config.patch(recompile_limit=64):
        yield
    torch._dynamo.reset()


def graphs() -> int:
    assert not dynamo.counters["graph_break"]
    return dynamo.counters["stats"]["unique_graphs"]


class Toy(torch.nn.Module):
    """The least that is a denoiser with attention: most of what is tested here does not need more."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = torch.nn.Conv2d(4, 16, 1), torch.nn.Conv2d(16, 4, 1)
        self.attention = torch.nn.ModuleList(Attention() for _ in range(2))

    def forward(self, sample, timestep):
        sample = self.enter(sample) + torch.as_tensor(timestep).float().cos()
        tokens = sample.flatten(2).transpose(1, 2)
        for attention in self.attention:
            tokens = tokens + attention(tokens)
        return self.leave(tokens.transpose(1, 2).reshape(sample.shape))


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (torch.nn.Linear(16, 16) for _ in range(3))

    def forward(self, tokens):
        heads = (each(tokens).unflatten(-1, (2, 8)).transpose(1, 2) for each in (self.to_q, self.to_k, self.to_v))
        return torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


def inputs(rows=13, columns=21):
    return {"sample": torch.randn(2, 4, rows, columns), "timestep": 500}


def run(model, values):
    with torch.no_grad():
        return model(**values)


def patched(spec, **options):
    model = sloth_fx.transform(Toy(), spec, example_inputs=inputs(), **options)
    context = sloth_fx.context(model)
    context.auto(sloth_fx.NoiseSchedule())
    return model, context, inputs()


@pytest.mark.parametrize("name", SPECS)
def test_phases_bound_the_number_of_graphs(name):
    model, context, values = patched(SPECS[name], phases=3)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    phases = set()
    for i in range(30):
        context.step(i, 30)
        phases.add(context.phase)
        run(compiled, values)
    assert phases == {0, 1, 2}
    first = graphs()
    assert 1 < first <= 3
    for i in range(30):
        context.step(i, 30)
        run(compiled, values)
    assert graphs() == first


@pytest.mark.slow
@inductor
def test_inductor_agrees_with_eager():
    spec = [
        sloth_fx.SlothfulAttention(in_=sloth_fx.Reduction(rate=6.0, k_blend=0.3)),
        sloth_fx.NearSightedTile(tile_size=6),
    ]
    model, context, values = patched(spec)
    context.at(0.4)
    eager = run(model, values)
    compiled = run(torch.compile(model, fullgraph=True), values)
    assert (compiled - eager).abs().max() <= 1e-4
    assert graphs() == 1


def test_undriven_model_breaks_no_graph_and_follows_its_timestep():
    model, context, values = patched(SPECS["slothful"])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    outputs = []
    for timestep in (990, 600, 10):
        values["timestep"] = torch.tensor(timestep)
        outputs.append(run(compiled, values))
        assert context.progress == pytest.approx(1 - timestep / 1000)
        assert torch.equal(run(model, values), outputs[-1])
    assert graphs() > 1
    assert not torch.equal(outputs[0], outputs[1])


def test_the_first_call_in_a_process_may_be_compiled():
    """What runs outside of graphs has to exist before TorchDynamo looks on; an earlier eager call would hide it."""
    code = (
        "import torch, sloth_fx; from tests.test_compile import *\n"
        "model, context, values = patched(SPECS['slothful'])\n"
        "run(torch.compile(model, fullgraph=True, backend='eager'), values)\n"
        "print(graphs(), context.progress)"
    )
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert done.stdout.split() == ["1", "0.5"], done.stderr[-2000:]


def test_another_size_compiles_once_more():
    model, context, values = patched(SPECS["slothful"])
    context.at(0.4)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    for _ in range(2):
        for size in ((13, 21), (9, 31)):
            values = inputs(*size)
            assert torch.equal(run(compiled, values), run(model, values))
    assert graphs() == 2


def test_driven_model_inlines_into_a_larger_graph():
    model, context, values = patched(SPECS["near-sighted"])
    larger = torch.compile(lambda: model(**values) * 2, fullgraph=True, backend="eager")
    run(model, values)  # the size of the latent is read outside of graphs
    for _ in range(2):
        for progress in (0.4, 0.9):
            context.at(progress)
            with torch.no_grad():
                assert torch.equal(larger(), run(model, values) * 2)
    assert graphs() == 2


def test_repeated_blocks_share_graphs():
    model = sloth_fx.transform(models.sd15(), SPECS["slothful"])
    context, values = sloth_fx.context(model), models.inputs(model, 2, 13, 21)
    context.at(0.4)
    eager = models.run(model, values)
    blocks = [block for block in model.modules() if type(block).__name__ == "BasicTransformerBlock"]
    settings = {
        (operator.layout, operator.pooling, block.attn1.to_k.in_features)
        for block in blocks
        for operator in block.attn1.children()
        if hasattr(operator, "layout")
    }
    untouched = {block.attn1.to_k.in_features for block in blocks if not hasattr(block.attn1, "sloth_reduce_0")}
    model.compile_repeated_blocks(fullgraph=True, backend="eager", dynamic=False)
    assert torch.equal(models.run(model, values), eager)
    assert graphs() <= len(settings) + len(untouched) < len(blocks)
    models.run(model, values)
    assert graphs() <= len(settings) + len(untouched)


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_a_fixed_phase(strict):
    model, context, values = patched(SPECS["near-sighted"])
    context.at(0.4)
    values["timestep"] = torch.tensor(500)
    if strict:  # strict export calls no hooks, so the context has to know the size
        context.resize((13, 21))
    exported = torch.export.export(model, (), values, strict=strict)
    with torch.no_grad():
        assert torch.allclose(exported.module()(**values), run(model, values), atol=1e-6)
    context.at(0.9)
    run(model, values)  # and the model still follows its context


def test_export_without_a_driven_context_says_what_to_do():
    model, _, values = patched(SPECS["slothful"])
    values["timestep"] = torch.tensor(500)
    with pytest.raises(sloth_fx.SlothError, match=r"drive the context with at\(progress\)"):
        torch.export.export(model, (), values, strict=False)


def test_warmup_leaves_nothing_to_compile_and_the_context_as_it_was(capsys):
    model, context, values = patched(SPECS["slothful"], phases=4)
    context.at(0.7)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    sets = sloth_fx.warmup(compiled, values)
    assert sets == len(context.moments()) == graphs()
    assert context.progress == 0.7
    assert "compiling phases" in capsys.readouterr().err
    for i in range(30):
        context.step(i, 30)
        run(compiled, values)
    assert graphs() == sets


def test_too_many_sets_for_torch_warn_once():
    model, context, values = patched(SPECS["near-sighted"])
    for i in range(2):  # eager: no reason to warn
        context.step(i, 30)
        run(model, values)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    sets = len(context.moments(30))
    with torch._dynamo.config.patch(recompile_limit=3):
        context.step(0, 30)
        with pytest.warns(UserWarning, match=rf"{sets} distinct sets .* phases=3"):
            run(compiled, values)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            context.step(1, 30)
            run(compiled, values)


def test_too_many_layouts_for_blocks_that_are_compiled_one_by_one():
    model = sloth_fx.transform(models.sd15(), sloth_fx.SlothfulAttention())
    context, values = sloth_fx.context(model), models.inputs(model, 2, 13, 21)
    for block in model.modules():
        if type(block).__name__ == "BasicTransformerBlock":
            block.compile(backend="eager")
    context.step(12, 30)
    with torch._dynamo.config.patch(recompile_limit=2), pytest.warns(UserWarning, match=r"distinct sets .* phases=2"):
        models.run(model, values)


def test_a_call_that_no_capture_covers_says_so_when_compiled():
    model, context, values = patched(SPECS["slothful"])
    context.at(0.4)
    run(model, values)
    block = torch.compile(model.attention[0], fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="run the patched model once with these arguments"):
        block(tokens=torch.randn(2, 13 * 21, 16))  # captured as a positional argument
