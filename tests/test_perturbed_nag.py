"""A negative text in joint attention and guidance by perturbed attention at once: both predictions are guided.

Against two predictions by brute force, each with rows for the negative text (:mod:`tests.two_branches`), in float64.
"""

import copy
import functools
import math

import pytest
import torch
import torch._dynamo.utils as dynamo

import sloth_fx
from sloth_fx import NAG, PAG, SAG, SEG, SLG, TPG, Perturb, SlothfulAttention, branch_trials
from sloth_fx.operators.perturbation import permutation
from sloth_fx.passes.attention_map import AttentionMap
from sloth_fx.passes.perturb import PerturbedAttention
from tests.perturbed_by_hand import attend, itself_and_others, mean_queries, operations
from tests.test_perturbed import TEXT, dit, dit_inputs, run
from tests.two_branches import in_order, in_step, joint, two_branches
from tests.zoo.compare import difference
from tests.zoo.registry import MODELS, shared
from tests.zoo.registry import run as run_zoo

BATCH, SCALE, IMAGE = 4, 1.7, 35
TEXTS = NAG(scale=4.0, tau=2.0, alpha=0.5)
GROUPS = {("cond",): [0, 1, 2, 3], ("uncond", "cond"): [2, 3]}
BLOCKS, MIDDLE = 3, 1


@functools.cache
def host():
    """The model of which the text runs along, in three blocks."""
    model = dit(joint=True)
    model.blocks = model.blocks[:BLOCKS]
    return model


def negative(rows, tokens=TEXT):
    random = torch.Generator().manual_seed(8)
    return {"context": torch.randn(rows, tokens, 8, generator=random).double()}


@functools.cache
def patched(*specs, way="shared"):
    with pytest.MonkeyPatch.context() as patch:
        if way != "shared":
            patch.setattr(branch_trials, "why_not_shared", lambda *_: "for a test")
        return sloth_fx.transform(host(), specs, example_inputs=dit_inputs(2))


def made(*specs, rows=("cond",), text=None, way="shared"):
    """A patched model at the start of a run, and its context."""
    model = patched(*specs, way=way)
    context = sloth_fx.context(model)
    context.at(0.1, sigma=5.0)
    context.rows = rows
    if text is not None:
        context.set_negative(**text)
    return model, context


def by_hand(rows, text, spoilt=None, guided=range(BLOCKS), model=None):
    """The prediction with the negative ``text``, where attention is exchanged at some sites: number to function."""
    read = [
        joint(TEXT, IMAGE, guided=index in guided, attend=(spoilt or {}).get(index, attend)) for index in range(BLOCKS)
    ]
    with torch.no_grad():
        model = host() if model is None else model
        found = two_branches(model, dit_inputs(), text, TEXTS, in_order(read), batch=BATCH, run=run, rows=rows)
    return found[:BATCH]


def steered(prediction, perturbed, rows, scale=SCALE):
    change = scale * (prediction - perturbed)[rows]
    return prediction + change.repeat(len(prediction) // len(rows), 1, 1, 1)


def changed(query, key, value):
    return 0.5 * query, key, value


def by_function(query, key, value, attn_mask=None):
    return attend(*changed(query, key, value))


WAYS = {
    "PAG": (PAG(scale=SCALE), itself_and_others(TEXT, IMAGE)),
    "SEG": (SEG(scale=SCALE), mean_queries(TEXT, IMAGE)),
    "Perturb": (Perturb(changed, scale=SCALE), by_function),
}


@pytest.mark.parametrize(
    ("name", "rows", "way"),
    [
        *(("PAG", rows, way) for rows in GROUPS for way in ("shared", "rows of its own")),
        ("SEG", ("uncond", "cond"), "shared"),
        ("Perturb", ("cond",), "shared"),
    ],
)
def test_both_predictions_are_guided_by_the_text(name, rows, way):
    """At the perturbed site as well: there, what either text gives is spoilt."""
    spec, attention = WAYS[name]
    text = negative(len(GROUPS[rows]))
    model, _ = made(TEXTS, spec, rows=rows, text=text, way=way)
    notes = [site.note for site in sloth_fx.report(model) if name in site.operators]
    assert len(notes) == 1
    assert "guided by a negative text" in notes[0]
    assert "while the negative text guides, a call of its own" in notes[0]
    assert ("two branches: for a test" in notes[0]) == (way != "shared")
    p, perturbed = by_hand(GROUPS[rows], text), by_hand(GROUPS[rows], text, {MIDDLE: attention})
    with torch.no_grad():
        found = run(model, dit_inputs())
    torch.testing.assert_close(found, steered(p, perturbed, GROUPS[rows]))
    assert (p - perturbed).abs().max() > 0.01
    assert (p - run(host(), dit_inputs())).abs().max() > 0.01


def test_shuffled_tokens():
    text = negative(BATCH)
    model, _ = made(TEXTS, TPG(scale=SCALE, where="middle"), text=text)
    site = next(module for module in model.modules() if isinstance(module, PerturbedAttention))
    with torch.no_grad():
        found = run(model, dit_inputs())

    def shuffled(query, key, value, attn_mask=None):
        read = attend(query, key, value)
        order = permutation(IMAGE, site.seed, query.device)
        return torch.cat([read[:, :, :TEXT], read[:, :, TEXT:][:, :, order]], 2)

    rows = GROUPS["cond",]
    torch.testing.assert_close(found, steered(by_hand(rows, text), by_hand(rows, text, {MIDDLE: shuffled}), rows))


@pytest.mark.parametrize("rows", GROUPS, ids="/".join)
def test_a_block_that_is_left_out(rows):
    text = negative(len(GROUPS[rows]))
    model, _ = made(TEXTS, SLG(layers=[1], scale=SCALE, stop=1.0), rows=rows, text=text)
    without = copy.deepcopy(host())
    without.blocks[1].forward = lambda x, text, time: (x, text)
    expected = by_hand(GROUPS[rows], text), by_hand(GROUPS[rows], text, model=without)
    with torch.no_grad():
        torch.testing.assert_close(run(model, dit_inputs()), steered(*expected, GROUPS[rows]))


def test_different_sites():
    """The text guides at some, and passes all; another site is spoilt."""
    text, rows = negative(BATCH), GROUPS["cond",]
    spec = NAG(**{**vars(TEXTS), "where": lambda site: site.path != "blocks.1"})
    model, _ = made(spec, PAG(scale=SCALE), text=text)
    acting = [site.operators for site in sloth_fx.report(model)]
    assert acting == [("NAG",), ("PAG",), ("NAG",)]
    expected = (by_hand(rows, text, spoilt, [0, 2]) for spoilt in ({}, {MIDDLE: itself_and_others(TEXT, IMAGE)}))
    with torch.no_grad():
        torch.testing.assert_close(run(model, dit_inputs()), steered(*expected, rows))


@pytest.mark.parametrize("way", ["shared", "rows of its own"])
def test_a_degraded_image(way):
    """Both predictions are those with the negative text. Everything is blurred, to its mean; noise is predicted."""
    text, call = negative(BATCH), dit_inputs()
    model, context = made(TEXTS, SAG(scale=SCALE, blur_sigma=math.inf, threshold=0.0), text=text, way=way)
    context.prediction = "epsilon"
    only, _ = made(TEXTS, text=text)
    with torch.no_grad():
        x, p = call["latent"], run(only, call)
        signal, noise = 1 / math.hypot(1, 5), 5 / math.hypot(1, 5)
        clean = (x - noise * p) / signal
        call["latent"] = signal * clean.mean((-2, -1), keepdim=True) + noise * p
        torch.testing.assert_close(run(model, dit_inputs()), p + SCALE * (p - run(only, call)))


@pytest.mark.parametrize("way", ["shared", "rows of its own"])
def test_the_map_is_that_of_the_text(way, monkeypatch):
    """Not that of the negative text, though queries and keys of the image are the same for both."""
    text, seen = negative(BATCH), []
    model, context = made(TEXTS, SAG(), text=text, way=way)
    context.prediction = "epsilon"
    taken = AttentionMap.taken
    monkeypatch.setattr(AttentionMap, "taken", lambda self: seen.append(taken(self)) or seen[-1])

    def noted(query, key, value, attn_mask=None):
        weights = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)[:BATCH, :, TEXT:]
        received = weights.mean(1).sum(1)[:, TEXT:]
        seen.append(received / received.mean(1, keepdim=True))
        return attend(query, key, value)

    with torch.no_grad():
        run(model, dit_inputs())
    by_hand(GROUPS["cond",], text, {MIDDLE: noted})
    torch.testing.assert_close(seen[0][:BATCH], seen[1])


def test_what_is_degraded_is_the_same_either_way():
    found = []
    for way in ("shared", "rows of its own"):
        model, context = made(TEXTS, SAG(), text=negative(BATCH), way=way)
        context.prediction = "epsilon"
        with torch.no_grad():
            found.append(run(model, dit_inputs()))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("spec", [PAG(scale=SCALE), SLG(layers=[1], scale=SCALE, stop=1.0)], ids=["PAG", "SLG"])
def test_what_is_neutral_leaves_the_other_as_it_is_alone(spec):
    """To the bit."""
    call, text = dit_inputs(), negative(2)
    rows = ("uncond", "cond")
    off = type(spec)(**{**vars(spec), "scale": 0.0})
    with torch.no_grad():
        only = run(made(TEXTS, rows=rows, text=text)[0], call)
        assert torch.equal(run(made(TEXTS, off, rows=rows, text=text)[0], call), only)
        alone = run(made(spec, rows=rows)[0], call)
        assert torch.equal(run(made(NAG(scale=1.0), spec, rows=rows)[0], call), alone)
        same, _ = made(TEXTS, Perturb(as_it_is, scale=9.0), rows=rows, text=text)
        torch.testing.assert_close(run(same, call), only, rtol=1e-12, atol=1e-12)


def as_it_is(query, key, value):
    return query, key, value


def test_each_acts_in_its_own_part_of_the_run():
    call, text = dit_inputs(), negative(BATCH)
    specs = NAG(**{**vars(TEXTS), "stop": 0.6}), PAG(scale=SCALE, start=0.3)
    model, context = made(*specs, text=text)
    alone = [made(spec, text=text if isinstance(spec, NAG) else None) for spec in specs]
    for progress, acting in ((0.1, [0]), (0.5, [0, 1]), (0.8, [1])):
        context.at(progress)
        with torch.no_grad():
            found = run(model, call)
            each = []
            for other, own in alone:
                own.at(progress)
                each.append(torch.equal(run(other, call), found))
        assert each == [acting == [0], acting == [1]]


def test_with_fewer_keys_elsewhere():
    call, text = dit_inputs(), negative(BATCH)
    reduced = SlothfulAttention(keep_middle=False)
    one, two, base = (
        made(TEXTS, reduced, spec, text=text)[0] for spec in (PAG(scale=1.0), PAG(scale=2.0), PAG(scale=0.0))
    )
    report = sloth_fx.report(one)
    assert report.sites[MIDDLE].operators == ("NAG", "PAG")
    assert "without SlothfulAttention" in report.sites[MIDDLE].note
    assert report.sites[0].operators == ("SlothfulAttention", "NAG")
    with torch.no_grad():
        p, first, second = (run(each, call) for each in (base, one, two))
        torch.testing.assert_close(second - p, 2 * (first - p))
        assert (first - p).abs().max() > 0.01


@pytest.mark.parametrize("tokens", [3, 9])
def test_a_negative_text_of_another_length(tokens):
    text = negative(BATCH, tokens)
    model, _ = made(TEXTS, PAG(scale=SCALE), text=text)

    def guided(spoilt):
        read = []
        for length in (TEXT, tokens):
            sites = [joint(length, IMAGE) for _ in range(BLOCKS)]
            if spoilt:
                sites[MIDDLE] = joint(length, IMAGE, attend=itself_and_others(length, IMAGE))
            read.append(in_order(sites))
        model = copy.deepcopy(host()).requires_grad_(False)  # in threads, which know no torch.no_grad
        return in_step(model, (dit_inputs(), {**dit_inputs(), **text}), TEXTS, tuple(read), run=run)

    with torch.no_grad():
        torch.testing.assert_close(
            run(model, dit_inputs()), steered(guided(False), guided(True), GROUPS["cond",]), rtol=1e-6, atol=1e-6
        )


def test_what_it_costs():
    """Two calls with both texts; the second one has the rows alone that are guided."""
    call, text = dit_inputs(), negative(2)
    call["timestep"] = call["timestep"].expand(BATCH)
    rows = ("uncond", "cond")
    only, both = (made(*specs, rows=rows, text=text)[0] for specs in ((TEXTS,), (TEXTS, SEG(scale=SCALE))))
    for model in (only, both):
        run(model, call)  # the text is prepared once
    assert 1.4 < operations(lambda: run(both, call)) / operations(lambda: run(only, call)) < 1.7


def test_compiled_it_is_one_graph_for_all_steps():
    torch._dynamo.reset()
    dynamo.counters.clear()
    call, text = dit_inputs(), negative(2)
    model, context = made(NAG(**{**vars(TEXTS), "stop": 0.5}), PAG(adaptive=0.001), rows=("uncond", "cond"), text=text)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    with torch.no_grad():
        for graphs, progress in ((1, 0.0), (1, 0.2), (1, 0.4), (2, 0.5), (2, 0.8)):
            context.at(progress)
            torch.testing.assert_close(run(compiled, call), run(model, call))
            assert dynamo.counters["stats"]["unique_graphs"] == graphs
        context.set_negative(context=text["context"].flip(0))
        context.at(0.3)
        torch.testing.assert_close(run(compiled, call), run(model, call))
    assert dynamo.counters["stats"]["unique_graphs"] == 2
    assert not dynamo.counters["graph_break"]
    torch._dynamo.reset()


def test_copies_and_the_original():
    call, text = dit_inputs(), negative(BATCH)
    model, _ = made(TEXTS, PAG(scale=SCALE), text=text)
    with torch.no_grad():
        found = run(model, call)
        other = copy.deepcopy(model)
        sloth_fx.context(other).set_negative(context=text["context"].flip(0))
        assert not torch.allclose(run(other, call), found)
        assert torch.equal(run(model, call), found)


SD3, FLUX = "SD3Transformer2DModel", "FluxTransformer2DModel"
HOSTS = {SD3: ("encoder_hidden_states", "pooled_projections"), FLUX: ("encoder_hidden_states", "pooled_projections")}


@pytest.mark.parametrize("rows", GROUPS, ids="/".join)
@pytest.mark.parametrize("name", HOSTS)
def test_hosts(name, rows):
    call, random = MODELS[name].inputs(BATCH, 9, 11), torch.Generator().manual_seed(7)
    guided, tokens = GROUPS[rows], call["encoder_hidden_states"].shape[1]
    text = {key: torch.randn((len(guided), *call[key].shape[1:]), generator=random) for key in HOSTS[name]}
    model = sloth_fx.transform(shared(name), [TEXTS, PAG(scale=SCALE)], example_inputs=MODELS[name].inputs(2, 9, 11))
    context = sloth_fx.context(model)
    context.at(0.1)
    context.rows = rows
    context.set_negative(**text)
    acting = [site.operators for site in sloth_fx.report(model)]
    assert acting.count(("NAG", "PAG")) == 1
    assert set(acting) == {("NAG",), ("NAG", "PAG")}
    first = 0 if name == SD3 else tokens

    def expected(spoils):
        read = [
            joint(first, 99, attend=itself_and_others(first, 99)) if spoils and "PAG" in names else joint(first, 99)
            for names in acting
        ]
        found = two_branches(shared(name), call, text, TEXTS, in_order(read), batch=BATCH, run=run_zoo, rows=guided)
        return [each[:BATCH] for each in found]

    pairs = list(zip(expected(False), expected(True), strict=True))
    found = run_zoo(model, call)
    for p, perturbed in pairs:
        assert difference([p], [perturbed]) > 0.1
    assert difference(found, [p + _change(p - q, guided) for p, q in pairs]) < 1e-5


def _change(difference, rows):
    return SCALE * difference[rows].repeat(len(difference) // len(rows), *[1] * (difference.ndim - 1))
