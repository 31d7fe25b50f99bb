"""The private names of torch that sloth_fx/dynamo.py stands on do what it says."""

import torch
import torch._dynamo.utils as dynamo

from sloth_fx.dynamo import get_eval_frame_callback, never_compile, outside_graphs


def test_hook_of_a_compiled_module_runs_as_python_once_never_compile_said_so():
    seen = []

    def hook(module, args):
        seen.append((torch.compiler.is_compiling(), callable(get_eval_frame_callback())))

    class Module(torch.nn.Module):
        def forward(self, x):
            return x + 1

    module = Module()
    never_compile(hook)
    module.register_forward_pre_hook(hook)
    torch._dynamo.reset()
    dynamo.counters.clear()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    for _ in range(3):
        compiled(torch.ones(2, 3))
    assert seen == [(False, True)] * 3
    assert dynamo.counters["stats"]["unique_graphs"] == 1
    module(torch.ones(2, 3))
    assert seen[-1] == (False, False)


def test_outside_graphs_hides_what_it_calls():
    seen = []

    def inner():
        seen.append(torch.compiler.is_compiling())

    def function():
        inner()

    hidden = outside_graphs(function)
    compiled = torch.compile(lambda x: (x + 1, hidden())[0], backend="eager")
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0))
    assert seen == [False]
