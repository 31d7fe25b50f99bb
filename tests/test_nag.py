"""NAG on tiny models of real classes, against two branches computed by brute force (:mod:`tests.two_branches`)."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch._dynamo.utils as dynamo

import sloth_fx
from sloth_fx import NAG, NearSightedTile, Sigma, SlothError, SlothfulAttention, branch_trials
from tests import models
from tests.two_branches import CROSS, Sites, in_order, joint, two_branches
from tests.zoo.compare import difference
from tests.zoo.registry import MODELS, run, shared

UNET, PIXART, WAN = "UNet2DConditionModel/sd15", "PixArtTransformer2DModel", "WanTransformer3DModel"
SD3, FLUX = "SD3Transformer2DModel", "FluxTransformer2DModel"
SPEC = NAG(scale=4.0, tau=2.0, alpha=0.5)
BATCH = 3
TEXT, MASK, POOLED = "encoder_hidden_states", "encoder_attention_mask", "pooled_projections"


@dataclass(frozen=True)
class Case:
    """``negative`` are the arguments that a negative text consists of; ``sites`` tell, of a grid of image tokens and a
    number of text tokens, what the attentions of the model are, in order."""

    name: str
    negative: tuple[str, ...]
    sites: Callable[[int, int], list[Any]]

    def inputs(self, batch: int = BATCH, rows: int = 9, columns: int = 11) -> dict[str, Any]:
        return MODELS[self.name].inputs(batch, rows, columns)

    def other_text(self, batch: int = BATCH, tokens: int | None = None) -> dict[str, Any]:
        """Another text; a mask is that of the text."""
        given, random = self.inputs(batch), torch.Generator().manual_seed(7)

        def noise(value: torch.Tensor) -> torch.Tensor:
            shape = (batch, tokens, *value.shape[2:]) if tokens is not None and value.ndim > 2 else value.shape
            return torch.randn(shape, generator=random)

        return {name: given[name].flip(0) if name == MASK else noise(given[name]) for name in self.negative}

    def patched(self, spec: Any = SPEC, **options: Any) -> torch.nn.Module:
        return sloth_fx.transform(shared(self.name), spec, example_inputs=self.inputs(2), **options)

    def expected(self, call, negative, spec=SPEC, *, image=99, sites=None, **options: Any) -> list[torch.Tensor]:
        """By brute force; ``image`` counts the tokens of the image."""
        text, batch = call[TEXT].shape[1], call[TEXT].shape[0]
        read: Sites = in_order(self.sites(image, text) if sites is None else sites)
        out = two_branches(shared(self.name), call, negative, spec, read, batch=batch, run=run, **options)
        return [each[:batch] for each in out]


CASES = {
    case.name: case
    for case in (
        Case(UNET, (TEXT,), lambda image, text: [None, CROSS] * 7),
        Case(PIXART, (TEXT, MASK), lambda image, text: [None, CROSS] * 2),
        Case(WAN, (TEXT,), lambda image, text: [None, CROSS] * 2),
        Case(SD3, (TEXT, POOLED), lambda image, text: [joint(0, image)] * 3),
        Case(FLUX, (TEXT, POOLED), lambda image, text: [joint(text, image)] * 2),
    )
}
KEYS, BRANCHES = (UNET, PIXART, WAN), (SD3, FLUX)
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
by_keys = pytest.mark.parametrize("case", [CASES[name] for name in KEYS], ids=KEYS)
by_branches = pytest.mark.parametrize("case", [CASES[name] for name in BRANCHES], ids=BRANCHES)
one_of_each = pytest.mark.parametrize("case", [CASES[UNET], CASES[SD3]], ids=[UNET, SD3])


def guided(case: Case, spec: Any = SPEC, negative: dict[str, Any] | None = None, **options: Any) -> Any:
    """A patched model at the start of a run, and its context, with a negative text."""
    model = case.patched(spec, **options)
    context = sloth_fx.context(model)
    context.at(0.0, sigma=10.0)
    context.set_negative(**(case.other_text() if negative is None else negative))
    return model, context


# What it computes


@every_case
def test_it_equals_two_branches_and_the_same_text_changes_nothing(case):
    call, negative = case.inputs(), case.other_text()
    model, context = guided(case, negative=negative)
    found, base = run(model, call), run(shared(case.name), call)
    assert [each.shape for each in found] == [each.shape for each in base]
    assert difference(found, case.expected(call, negative)) < 1e-5
    assert difference(found, base) > 0.1
    context.set_negative(**{name: call[name] for name in case.negative})
    assert difference(run(model, call), base) < 1e-5
    context.set_negative(**negative)
    assert all(map(torch.equal, run(model, call), found))


@one_of_each
@pytest.mark.parametrize(
    "spec",
    [NAG(scale=11.0, tau=1.1, alpha=1.0, norm="l2"), NAG(scale=1.5, tau=math.inf, alpha=0.3)],
    ids=["l2", "without a limit"],
)
def test_other_settings(case, spec):
    call, negative = case.inputs(), case.other_text()
    model, _ = guided(case, spec)
    assert difference(run(model, call), case.expected(call, negative, spec)) < 1e-5


@one_of_each
@pytest.mark.parametrize("spec", [NAG(scale=1.0), NAG(alpha=0.0), NAG(start=0.3, stop=0.3)], ids=str)
def test_neutral_is_the_same_to_the_bit_and_needs_no_text(case, spec):
    call = case.inputs()
    model = case.patched(spec)
    for progress in (0.0, 0.3, 1.0):
        sloth_fx.context(model).at(progress)
        assert all(map(torch.equal, run(model, call), run(shared(case.name), call)))


@every_case
def test_one_row_of_negative_text_is_for_all_images(case):
    call, negative = case.inputs(), case.other_text(1)
    model, _ = guided(case, negative=negative)
    alike = {name: each.expand(BATCH, *each.shape[1:]) for name, each in negative.items()}
    assert difference(run(model, call), case.expected(call, alike)) < 1e-5


@pytest.mark.parametrize("case", [CASES[UNET], CASES[WAN]], ids=[UNET, WAN])
@pytest.mark.parametrize("tokens", [3, 12])
def test_a_negative_text_of_another_length(case, tokens):
    call, negative = case.inputs(), case.other_text(tokens=tokens)
    longest = max(tokens, 7)
    padded = [
        {**given, TEXT: torch.nn.functional.pad(given[TEXT], (0, 0, 0, longest - given[TEXT].shape[1]), value=9.0)}
        for given in (call, negative)
    ]
    model, _ = guided(case, negative=negative)
    expected = case.expected(*padded, sites=case.sites(99, 7), lengths=(7, tokens))
    assert difference(run(model, call), expected) < 1e-5


def test_a_negative_text_with_a_mask_of_its_own():
    """Masked tokens are as good as none; also of a call that has no mask."""
    case = CASES[PIXART]
    call, short = case.inputs(), case.other_text(tokens=4)
    call[MASK] = None
    padded = torch.cat([short[TEXT], torch.full((BATCH, 3, 24), 9.0)], 1)
    mask = torch.ones(BATCH, 7, dtype=torch.int64)
    mask[:, 4:] = 0
    model, context = guided(case, negative={TEXT: padded, MASK: mask})
    found = run(model, call)
    context.set_negative(**{TEXT: short[TEXT]})
    assert difference(run(model, call), found) < 1e-5
    call[MASK] = torch.ones(BATCH, 7, dtype=torch.int64)
    context.set_negative(**{TEXT: padded, MASK: mask})
    assert difference(run(model, call), found) < 1e-5


def test_pooled_embeddings_that_are_not_given_are_those_of_the_call():
    case = CASES[SD3]
    call, negative = case.inputs(), case.other_text()
    model, context = guided(case, negative={TEXT: negative[TEXT]})
    found = run(model, call)
    assert difference(found, case.expected(call, {TEXT: negative[TEXT]})) < 1e-5
    context.set_negative(**negative)
    assert difference(run(model, call), found) > 1e-3


@one_of_each
def test_where(case):
    """Sites that are left out read the text alone; the negative rows of a joint model go on from there."""
    call, negative = case.inputs(), case.other_text()
    report = sloth_fx.report(case.patched(NAG(where="out")))
    chosen = ["NAG" in site.operators for site in report]
    assert 0 < sum(chosen) < sum(site.text is not None for site in report)
    if case.name == UNET:
        sites = [CROSS if taken else None for taken in chosen]
    else:
        sites = [joint(0, 99, guided=taken) for taken in chosen]
    model, _ = guided(case, NAG(scale=4.0, tau=2.0, alpha=0.5, where="out"))
    found = run(model, call)
    assert difference(found, case.expected(call, negative, sites=sites)) < 1e-5
    assert difference(found, case.expected(call, negative)) > 1e-2


def test_two_specs_at_different_sites():
    """Keys at hand need no branch, so that sites may differ."""
    case = CASES[UNET]
    call = case.inputs()
    one, other = NAG(scale=4.0, tau=2.0, alpha=0.5, where="in"), NAG(scale=9.0, alpha=0.2, where="out")
    model, _ = guided(case, [one, other])
    both = run(model, call)
    assert {site.operators for site in sloth_fx.report(model) if site.kind == "cross"} == {("NAG",), ()}
    apart = [run(guided(case, each)[0], call) for each in (one, other)]
    assert all(difference(both, each) > 1e-2 for each in apart)


# Rows


@every_case
@pytest.mark.parametrize("names", [("uncond", "cond"), ("cond", "uncond", "cond")], ids=str)
def test_only_conditional_rows_are_guided(case, names):
    groups = len(names)
    call, negative = case.inputs(groups * 2), case.other_text(2)
    model, context = guided(case, negative=negative)
    context.rows = names
    assert context.halves == groups
    assert context.rows == names
    rows = [row for row in range(groups * 2) if names[row // 2] == "cond"]
    alike = {name: torch.cat([each] * (len(rows) // 2)) for name, each in negative.items()}
    found = run(model, call)
    assert difference(found, case.expected(call, alike, rows=rows)) < 1e-5
    others = [row for row in range(groups * 2) if row not in rows]
    if others:
        assert difference([found[0][others]], [run(shared(case.name), call)[0][others]]) < 1e-5


@one_of_each
def test_no_row_is_guided(case):
    """As where a pipeline calls the model once for each condition."""
    call = case.inputs()
    model, context = guided(case)
    context.rows = ("uncond",)
    assert all(map(torch.equal, run(model, call), run(shared(case.name), call)))
    context.rows = ("cond",)
    assert difference(run(model, call), case.expected(call, case.other_text())) < 1e-5


@one_of_each
def test_a_negative_text_for_every_row_of_the_batch(case):
    """As some pipelines have it: rows that are not guided have one too, which is not read."""
    call, negative = case.inputs(4), case.other_text(4)
    model, context = guided(case, negative=negative)
    context.rows = ("uncond", "cond")
    own = {name: each[2:] for name, each in negative.items()}
    assert difference(run(model, call), case.expected(call, own, rows=[2, 3])) < 1e-5


# Other calls


@every_case
def test_other_calls_after_the_transform(case):
    model, _ = guided(case, negative=case.other_text(1))
    negative = {name: each.expand(4, *each.shape[1:]) for name, each in case.other_text(1).items()}
    for size in ((4, 5, 7), (4, 9, 11), (1, 8, 6)):
        call = case.inputs(*size)
        own = {name: each[: size[0]] for name, each in negative.items()}
        image = size[1] * size[2]
        assert difference(run(model, call), case.expected(call, own, image=image)) < 1e-5


@pytest.mark.parametrize("tokens", [4, 13])
def test_a_longer_prompt_after_the_transform(tokens):
    """The negative text stays; where both pass the model side by side they are as long as each other."""
    unet, sd3 = CASES[UNET], CASES[SD3]
    model, _ = guided(unet)
    call = {**unet.inputs(), **unet.other_text(tokens=tokens)}
    found = run(model, call)
    call[TEXT] = torch.cat([call[TEXT], call[TEXT]], 1)  # reads the same
    assert difference(run(model, call), found) < 1e-5

    negative = sd3.other_text(tokens=tokens)
    model, _ = guided(sd3, negative=negative)
    call = {**sd3.inputs(), TEXT: sd3.inputs()[TEXT][:, :tokens]}
    assert difference(run(model, call), sd3.expected(call, negative)) < 1e-5


@one_of_each
def test_positional_arguments(case):
    call = case.inputs()
    model, _ = guided(case, negative=case.other_text())
    order = ["sample", "timestep", TEXT] if case.name == UNET else ["hidden_states", TEXT, POOLED, "timestep"]
    with torch.no_grad():
        found = model(*(call[name] for name in order)).sample
    assert torch.equal(found, run(model, call)[0])


@one_of_each
def test_the_first_call_serves_as_example(case):
    call, negative = case.inputs(), case.other_text()
    model = sloth_fx.transform(shared(case.name), SPEC, example_inputs="first call")
    sloth_fx.context(model).set_negative(**negative)
    sloth_fx.context(model).at(0.0)
    for _ in range(2):
        assert difference(run(model, call), case.expected(call, negative)) < 1e-5


@one_of_each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype_after_the_transform(case, dtype):
    """The negative text takes that of the call."""
    call, negative = models.cast(case.inputs(), dtype), case.other_text()
    model, _ = guided(case, negative=negative)
    found = run(model.to(dtype), call)[0]
    assert found.dtype == dtype
    expected = case.expected(case.inputs(), negative)[0]
    assert (found - expected).std() < (0.2 if dtype == torch.bfloat16 else 1e-5) * expected.std()
    assert shared(case.name).dtype == torch.float32


# When it acts


@one_of_each
def test_it_stops_in_the_middle_of_a_run(case):
    """Outside of its part of the run the original runs, bit for bit."""
    call = case.inputs()
    base = run(shared(case.name), call)
    model, context = guided(case, NAG(scale=4.0, tau=2.0, alpha=0.5, start=0.2, stop=0.6))
    acted = []
    for step in range(8):
        context.step(step, 8)
        out = run(model, call)
        acted.append(not all(map(torch.equal, out, base)))
        assert [each.shape for each in out] == [each.shape for each in base]
    assert acted == [0.2 <= step / 8 < 0.6 for step in range(8)]


@one_of_each
def test_it_stops_at_a_noise_level(case):
    call = case.inputs()
    base = run(shared(case.name), call)
    model, context = guided(case, NAG(scale=4.0, alpha=0.5, stop=Sigma(4.0)))
    acted = {}
    for sigma in (9.0, 4.0, 3.9, 0.1):
        context.at(0.5, sigma)
        acted[sigma] = not all(map(torch.equal, run(model, call), base))
    assert acted == {9.0: True, 4.0: True, 3.9: False, 0.1: False}


def test_it_follows_the_timestep_of_each_call():
    case = CASES[UNET]
    call = case.inputs()
    model, context = guided(case, NAG(scale=4.0, alpha=0.5, stop=0.5))
    context.auto()
    acted = {}
    for timestep in (999, 501, 499, 0):
        call["timestep"] = timestep
        acted[timestep] = not all(map(torch.equal, run(model, call), run(shared(UNET), call)))
    assert acted == {999: True, 501: True, 499: False, 0: False}


@one_of_each
def test_without_graph_breaks_or_further_compiles(case):
    torch._dynamo.reset()
    dynamo.counters.clear()
    call = case.inputs()
    model, context = guided(case, NAG(scale=4.0, tau=2.0, alpha=0.5, stop=0.5))
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)

    def sampled() -> int:
        for step in range(4):
            context.step(step, 4)
            assert difference(run(compiled, call), run(model, call)) < 1e-5
        assert not dynamo.counters["graph_break"]
        return dynamo.counters["stats"]["unique_graphs"]

    assert sampled() == 2
    context.set_negative(**{name: each.roll(1, 0) for name, each in case.other_text().items()})
    assert sampled() == 2
    torch._dynamo.reset()


# The model it is


@one_of_each
def test_the_original_is_untouched_and_names_stay(case):
    model = MODELS[case.name].build()
    before = models.state_of(model)
    patched = sloth_fx.transform(model, SPEC, example_inputs=case.inputs())
    sloth_fx.context(patched).set_negative(**case.other_text())
    run(patched, case.inputs())
    assert models.state_of(model) == before
    assert type(patched) is type(model)
    assert list(patched.state_dict()) == list(model.state_dict())
    assert [name for name, _ in patched.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert [name for name, _ in patched.named_buffers()] == [name for name, _ in model.named_buffers()]


@one_of_each
@pytest.mark.parametrize("ran", [False, True], ids=["fresh", "after a call"])
def test_copies_have_texts_of_their_own(case, ran):
    call, negative = case.inputs(), case.other_text()
    model, _ = guided(case, negative=negative)
    found = run(model, call) if ran else []
    other = copy.deepcopy(model)
    assert difference(run(other, call), case.expected(call, negative)) < 1e-5
    sloth_fx.context(other).set_negative(**{name: call[name] for name in case.negative})
    assert difference(run(other, call), run(shared(case.name), call)) < 1e-5
    assert difference(run(model, call), case.expected(call, negative)) < 1e-5
    assert all(map(torch.equal, run(model, call), found))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert difference(run(model, call), case.expected(call, negative)) < 1e-5


def test_other_weights_take_effect_with_the_next_text():
    """As the docstring of set_negative says."""
    case = CASES[UNET]
    call, negative = case.inputs(), case.other_text()
    model = sloth_fx.transform(MODELS[UNET].build(), SPEC)
    context = sloth_fx.context(model)
    context.at(0.0)
    context.set_negative(**negative)
    found = run(model, call)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attn2.to_v" in name:
                parameter.mul_(-1)
    context.set_negative(**negative)
    fresh = sloth_fx.transform(copy.deepcopy(model_without_patch(model)), SPEC)
    sloth_fx.context(fresh).at(0.0)
    sloth_fx.context(fresh).set_negative(**negative)
    assert all(map(torch.equal, run(model, call), run(fresh, call)))
    assert difference(run(model, call), found) > 1e-2


def model_without_patch(model: torch.nn.Module) -> torch.nn.Module:
    original = MODELS[UNET].build()
    original.load_state_dict(model.state_dict())
    return original


def test_a_gradient_passes():
    case = CASES[SD3]
    call = case.inputs()
    call["hidden_states"].requires_grad_()
    model, _ = guided(case)
    model(**call).sample.sum().backward()
    assert call["hidden_states"].grad.isfinite().all()
    assert call["hidden_states"].grad.any()


def test_the_report_says_how():
    [cross] = {site.note for site in sloth_fx.report(CASES[UNET].patched()) if "NAG" in site.operators}
    assert "keys and values are computed once" in cross
    [own] = {site.note for site in sloth_fx.report(CASES[SD3].patched()) if "NAG" in site.operators}
    assert "in a branch of its own" in own
    others = {site.note for site in sloth_fx.report(CASES[UNET].patched()) if not site.operators}
    assert others == {"self-attention"}


# With others


def test_with_slothful_attention_and_tiles_in_cross_attention():
    """What these do to self-attention stays; attention to text is guided."""
    case, others = CASES[UNET], [SlothfulAttention(), NearSightedTile(tile_size=6)]
    call, negative = case.inputs(), case.other_text()
    plain = case.patched(others)
    model, context = guided(case, [*others, SPEC])
    sloth_fx.context(plain).at(0.4)
    context.at(0.4)
    [expected] = two_branches(
        plain,
        call,
        negative,
        SPEC,
        lambda query, key: CROSS if key.shape[-2] == 7 else None,
        batch=BATCH,
        run=run,
    )
    assert difference(run(model, call), [expected[:BATCH]]) < 1e-5
    assert difference(run(plain, call), run(shared(UNET), call)) > 1e-2


@by_branches
@pytest.mark.parametrize("order", [1, -1])
def test_with_slothful_attention_and_tiles_in_joint_attention(case, order):
    """The same text as negative changes nothing that these do."""
    others = [SlothfulAttention(), NearSightedTile(tile_size=4, max_depth=8)]
    call = case.inputs()
    plain = case.patched(others)
    model, context = guided(case, [*others, SPEC][::order])
    sloth_fx.context(plain).at(0.4)
    context.at(0.4)
    found = run(model, call)
    assert all(each.isfinite().all() for each in found)
    assert difference(found, run(plain, call)) > 1e-2
    context.set_negative(**{name: call[name] for name in case.negative})
    assert difference(run(model, call), run(plain, call)) < 1e-5
    assert difference(run(plain, call), run(shared(case.name), call)) > 1e-2


# What cannot be done


def refused(model: torch.nn.Module, call: dict[str, Any]) -> str:
    with pytest.raises(SlothError) as caught:
        run(model, call)
    return str(caught.value)


@every_case
def test_no_negative_text(case):
    """The error says how to give it; afterwards all is well."""
    call = case.inputs()
    model = case.patched()
    context = sloth_fx.context(model)
    context.at(0.0)
    assert f"set_negative({TEXT}=...)" in refused(model, call)
    context.set_negative(**case.other_text())
    assert difference(run(model, call), case.expected(call, case.other_text())) < 1e-5


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((BATCH, 7, 5), ("(3, 7, 5)", "(3, 7, 16)", "the same")),
        ((BATCH, 16), ("(3, 16)", "(3, 7, 16)")),
        ((BATCH, 1, 7, 16), ("(3, 1, 7, 16)", "(3, 7, 16)")),
        ((2, 7, 16), ("2 rows", "give 1, or one for each of the 3 images")),
        ((6, 7, 16), ("6 rows", "give 1, or one for each of the 3 images")),
    ],
    ids=str,
)
def test_a_text_of_the_wrong_shape(shape, words):
    case = CASES[UNET]
    model, context = guided(case, negative={TEXT: torch.zeros(shape)})
    message = refused(model, case.inputs())
    assert all(word in message for word in (TEXT, *words)), message
    context.set_negative(**case.other_text())
    assert difference(run(model, case.inputs()), case.expected(case.inputs(), case.other_text())) < 1e-5


@by_branches
def test_rows_of_one_batch_have_one_length(case, monkeypatch):
    """What is computed once takes any length (``test_nag_lengths.py``)."""
    monkeypatch.setattr(branch_trials, "why_not_shared", lambda *_: "for a test")
    model, _ = guided(case, negative=case.other_text(tokens=5))
    message = refused(model, case.inputs())
    assert "5 tokens" in message
    assert "13" in message
    assert "pad them to the same length" in message


def test_a_single_token_is_not_spread_over_many():
    model, _ = guided(CASES[SD3], negative=CASES[SD3].other_text(tokens=1))
    assert "a single token goes with a single token only" in refused(model, CASES[SD3].inputs())


def test_a_length_that_other_arguments_do_not_share():
    """The error names what differs; afterwards all is well."""
    case = CASES[FLUX]
    model, context = guided(case, negative=case.other_text(tokens=5))
    message = refused(model, case.inputs())
    assert "encoder_hidden_states (3, 13, 32), (3, 5, 32)" in message
    assert "Give all that has a place for each token (masks, ids)" in message
    context.set_negative(**case.other_text())
    assert difference(run(model, case.inputs()), case.expected(case.inputs(), case.other_text())) < 1e-5


@by_branches
def test_an_argument_that_the_call_does_not_give(case):
    call = case.inputs()
    del call[POOLED]
    call[POOLED] = None
    model, _ = guided(case)
    assert POOLED in refused(model, call)


def test_a_mask_that_the_call_has_and_the_negative_text_has_not():
    case = CASES[PIXART]
    model, _ = guided(case, negative={TEXT: case.other_text()[TEXT]})
    message = refused(model, case.inputs())
    assert MASK in message
    assert "give that to set_negative as well" in message


@one_of_each
def test_rows_that_do_not_divide_the_batch(case):
    model, context = guided(case)
    context.rows = ("uncond", "cond")
    message = refused(model, case.inputs(3))
    assert "3 rows" in message
    assert "2 groups" in message


def test_groups_without_names():
    model, context = guided(CASES[UNET], negative=CASES[UNET].other_text(1))
    context.halves = 2
    assert 'as in ("uncond", "cond")' in refused(model, CASES[UNET].inputs(4))
    context.rows = ("uncond", "cond")
    run(model, CASES[UNET].inputs(4))


@pytest.mark.parametrize("rows", ["cond", (), ("uncond", 1), None, 2], ids=str)
def test_rows_are_names(rows):
    context = sloth_fx.context(CASES[UNET].patched())
    with pytest.raises(SlothError, match=r"rows=.*a name for each group of the batch"):
        context.rows = rows
    assert context.rows == ("cond",)


def test_set_negative_where_nothing_guides():
    context = sloth_fx.context(CASES[UNET].patched(SlothfulAttention()))
    with pytest.raises(SlothError, match=r"transform the model with NAG"):
        context.set_negative(**CASES[UNET].other_text())


@pytest.mark.parametrize("first_call", [False, True])
def test_names_that_the_model_does_not_take(first_call):
    options = {"example_inputs": "first call"} if first_call else {}
    context = sloth_fx.context(sloth_fx.transform(shared(UNET), SPEC, **options))
    with pytest.raises(SlothError, match=r"argument 'encoder_hidden_state' is unknown, nearest: encoder_hidden_states"):
        context.set_negative(encoder_hidden_state=torch.zeros(1, 7, 16))
    for nothing in ({}, {TEXT: None}):
        with pytest.raises(SlothError, match=r"give the negative text as the model takes it"):
            context.set_negative(**nothing)


def transform_refused(model: torch.nn.Module, spec: Any, **options: Any) -> str:
    before = models.state_of(model)
    with pytest.raises(SlothError) as caught:
        sloth_fx.transform(model, spec, **options)
    assert models.state_of(model) == before
    return str(caught.value)


def test_a_model_without_text():
    message = transform_refused(models.shared("unconditional"), SPEC)
    assert "NAG needs cross-attention or joint attention of image tokens to text" in message
    assert "this model has none (it has: self)" in message
    dit = "DiTTransformer2DModel"
    assert "has: self" in transform_refused(shared(dit), SPEC, example_inputs=MODELS[dit].inputs())
    # With something else to do it is refused as well: nothing is skipped in silence.
    assert "NAG needs" in transform_refused(models.shared("unconditional"), [SlothfulAttention(), SPEC])


def test_where_selects_no_attention_to_text():
    message = transform_refused(shared(UNET), NAG(where="self"))
    assert "NAG acts on cross-attention and joint attention to text" in message
    assert "selects none" in message


def test_two_at_one_site_and_two_branches():
    assert "guide" in transform_refused(shared(UNET), [SPEC, NAG()])
    blocks = [NAG(where="*transformer_blocks.0*"), NAG(scale=3.0, where="*transformer_blocks.1*")]
    assert "one NAG" in transform_refused(shared(SD3), blocks)


def test_token_merging_and_rows_of_their_own():
    message = transform_refused(shared(SD3), [sloth_fx.TokenMerging(), SPEC])
    assert "TokenMerging and NAG cannot both act here" in message
    assert "where=" in message


def test_a_noise_level_of_a_model_without_a_schedule():
    case = CASES[FLUX]
    model = case.patched(NAG(stop=Sigma(4.0)))
    context = sloth_fx.context(model)
    context.set_negative(**case.other_text())
    if context.sigma_at(0.5) is None:
        with pytest.raises(SlothError, match="sigma"):
            context.at(0.5)
    context.at(0.5, sigma=1.0)
    assert all(map(torch.equal, run(model, case.inputs()), run(shared(FLUX), case.inputs())))
