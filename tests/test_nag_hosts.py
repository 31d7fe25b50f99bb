"""NAG on small hosts with awkward idioms, in float64, against two separate calls in step."""

import pytest
import torch
import torch._dynamo.utils as dynamo

import sloth_fx
from sloth_fx import NAG, SlothError
from tests import text_hosts
from tests.text_hosts import IMAGE, build, call_of
from tests.two_branches import CROSS, ReadsText, in_step, joint
from tests.zoo.compare import difference

SPEC = NAG(scale=4.0, tau=2.0, alpha=0.5)
# What texts of another length do.
WORKS, ROWS_OF_ITS_OWN, COUNTS = "works", "pad them to the same length", "a number of its own in each branch"
HOSTS = {
    "Plain": WORKS,
    "PooledRegisters": ROWS_OF_ITS_OWN,
    "MaskOfZeros": ROWS_OF_ITS_OWN,
    "Resampled": WORKS,
    "WrittenPositions": WORKS,
    "Counted": COUNTS,
    "Crossed": WORKS,
    "Trimmed": WORKS,
    "SteeredText": WORKS,
    "CrossResampled": WORKS,
}


def site(query: torch.Tensor, key: torch.Tensor) -> ReadsText | None:
    """What an attention is, by its tokens; the image comes last."""
    if query.shape[-2] < IMAGE or key.shape[-2] == IMAGE:
        return None
    if key.shape[-2] < IMAGE:
        return CROSS
    return joint(key.shape[-2] - IMAGE, IMAGE)


def run(model, call):
    with torch.no_grad():
        return [model(**call)]


def expected(kind, call, other):
    models = {id(each): build(kind) for each in (call, other)}  # hosts may keep what they have computed
    return in_step(
        models[id(call)], (call, other), SPEC, (site, site), run=lambda _, given: run(models[id(given)], given)
    )


def guided(kind, spec=SPEC):
    patched = sloth_fx.transform(build(kind), spec, example_inputs=call_of(kind))
    context = sloth_fx.context(patched)
    context.at(0.0)
    return patched, context


@pytest.mark.parametrize("name", HOSTS)
def test_it_equals_two_calls_in_step(name):
    """One text after the other, with masks of their own: nothing of one may stay for the next."""
    kind, call = getattr(text_hosts, name), call_of(getattr(text_hosts, name))
    patched, context = guided(kind)
    for tokens, seed in ((5, 1), (5, 2), (9, 1), (3, 3), (9, 2)):
        negative = {each: call_of(kind, tokens, seed)[each] for each in kind.text}
        context.set_negative(**negative)
        if tokens != 5 and HOSTS[name] != WORKS:
            with pytest.raises(SlothError, match=HOSTS[name]):
                run(patched, call)
            continue
        found = run(patched, call)
        assert difference(found, expected(kind, call, {**call, **negative})) < 1e-9
        assert difference(found, run(build(kind), call)) > 0.1


def test_the_image_is_read_and_not_learned_tokens():
    for kind in (text_hosts.Resampled, text_hosts.CrossResampled):
        report = sloth_fx.report(guided(kind)[0])
        assert [site.path for site in report if site.operators] == ["blocks.0", "blocks.1"]


def test_attention_that_goes_by_the_length_of_the_text():
    """Both lengths are captured: where the graphs are one and the same it serves both, and else neither."""
    kind = text_hosts.Steered
    patched, context = guided(kind)
    for tokens, other in ((5, 7), (9, 12), (7, 9)):
        call, negative = (
            call_of(kind, tokens),
            {"encoder_hidden_states": call_of(kind, other, 1)["encoder_hidden_states"]},
        )
        context.set_negative(**negative)
        if (tokens > 8) == (other > 8):
            for _ in range(2):
                assert difference(run(patched, call), expected(kind, call, {**call, **negative})) < 1e-9
            continue
        for _ in range(2):
            with pytest.raises(
                SlothError, match="SteeredJoint does not compute the same for the text and the negative"
            ):
                run(patched, call)


def test_what_a_host_keeps_does_not_come_back_as_a_result():
    kind = text_hosts.Remembering
    patched, context = guided(kind, NAG(scale=4.0, stop=0.5))
    call = call_of(kind)
    context.set_negative(encoder_hidden_states=call_of(kind, seed=1)["encoder_hidden_states"])
    run(patched, call)
    context.at(0.9)
    with pytest.raises(SlothError, match="has kept of an earlier call"):
        run(patched, call)


def test_a_call_of_two_lengths_is_one_graph():
    torch._dynamo.reset()
    dynamo.counters.clear()
    model = build(text_hosts.Plain)
    del model.blocks[1:]
    patched = sloth_fx.transform(model, SPEC, example_inputs=call_of(text_hosts.Plain))
    context = sloth_fx.context(patched)
    context.at(0.0)
    compiled = torch.compile(patched, fullgraph=True, backend="eager")
    for tokens, other in ((5, 3), (7, 9), (5, 3)):
        call = call_of(text_hosts.Plain, tokens)
        context.set_negative(encoder_hidden_states=call_of(text_hosts.Plain, other, 1)["encoder_hidden_states"])
        assert difference(run(compiled, call), run(patched, call)) < 1e-12
    assert dynamo.counters["stats"]["unique_graphs"] == 2
    assert not dynamo.counters["graph_break"]
    torch._dynamo.reset()
