"""NAG on hosts whose Python goes by numbers that are others at the next call, or in the other branch; in float64."""

import types

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import sloth_fx
from sloth_fx import SlothError, SlothfulAttention
from sloth_fx.branches import branches_of
from sloth_fx.negative import Negative, capture_whole
from tests import text_hosts
from tests.test_nag_hosts import SPEC, expected, guided, run
from tests.text_hosts import IMAGE, MASK, POOLED, SIZE, TEXT, Crossed, Host, MaskOfZeros, build, call_of
from tests.two_branches import in_step, joint
from tests.zoo.compare import difference

SCALES = [1.0] * 7 + [2.0] * 20  # by the number of tokens


def notes(patched):
    return {site.note for site in sloth_fx.report(patched) if "NAG" in site.operators}


# A length that is looked up


class Listed(Crossed):
    text = (TEXT,)

    def embed(self, text, pooled):
        return self.text_in(text) * SCALES[text.shape[1]]


class Printed(Crossed):
    text = (TEXT,)

    def embed(self, text, pooled):
        return (
            self.text_in(text)
            * {f"{tokens} tokens": scale for tokens, scale in enumerate(SCALES)}[f"{text.shape[1]} tokens"]
        )


@pytest.mark.parametrize("kind", [Listed, Printed])
def test_two_lengths_that_are_served_alike_say_nothing_of_a_third(kind):
    call = call_of(kind)
    patched, context = guided(kind)
    for tokens in (5, 6, 9, 3, 12, 5):
        negative = {TEXT: call_of(kind, tokens, 1)[TEXT]}
        context.set_negative(**negative)
        assert difference(run(patched, call), expected(kind, call, {**call, **negative})) < 1e-9


def test_lengths_that_came_out_the_same_are_not_captured_again(monkeypatch):
    """Three captures tell that nothing goes by the length; after those, any passes."""
    captured = []
    monkeypatch.setattr("sloth_fx.negative.capture_whole", lambda *args: captured.append(1) or capture_whole(*args))
    call, (patched, context) = call_of(Crossed), guided(Crossed)
    counts = []
    for tokens in (5, 6, 9, 3, 12):
        text = {name: call_of(Crossed, tokens, 1)[name] for name in Crossed.text}
        context.set_negative(**text)
        captured.clear()
        assert difference(run(patched, call), expected(Crossed, call, {**call, **text})) < 1e-9
        counts.append(len(captured))
    assert counts == [1, 2, 0, 0, 0]


# What is the same for all rows, and once the same in both texts


class OneText(Host):
    alone = TEXT

    def embed(self, text, pooled):
        return self.text_in(text).expand(text_hosts.BATCH, -1, -1)


class OneMask(Host):
    text, alone = (TEXT, MASK), MASK

    def forward(self, hidden_states, timestep, encoder_hidden_states, encoder_attention_mask):
        text = encoder_hidden_states * encoder_attention_mask[..., None]
        return super().forward(hidden_states, timestep, text)


class OneMaskInRows(MaskOfZeros):
    alone = MASK


def once_for_all_rows(kind, seed):
    """The same image, with another text; what is ``alone`` has one row."""
    text = {name: call_of(kind, 5, seed)[name] for name in kind.text}
    return {**call_of(kind), **text, kind.alone: text[kind.alone][-1:]}


@pytest.mark.parametrize("kind", [OneText, OneMask])
def test_a_call_with_the_negative_text_itself_before_another(kind):
    """What is the same for all rows does not become that of the first call for good."""
    calls = [once_for_all_rows(kind, seed) for seed in range(3)]
    if kind.alone == MASK:
        calls[0][MASK] = torch.tensor([[1, 0, 1, 1, 0]])
        calls[1][MASK] = torch.tensor([[1, 1, 1, 1, 0]])
    negative = {name: calls[0][name].clone() for name in kind.text}
    patched = sloth_fx.transform(build(kind), SPEC, example_inputs=calls[2])
    assert all("is computed once" in note for note in notes(patched))
    context = sloth_fx.context(patched)
    context.at(0.0)
    context.set_negative(**negative)
    for call in (*calls, calls[1]):
        assert difference(run(patched, call), expected(kind, call, {**call, **negative})) < 1e-9
    run(patched, calls[0])
    calls[0][kind.alone][:] = calls[1][kind.alone]  # written in place
    assert difference(run(patched, calls[0]), expected(kind, calls[0], {**calls[0], **negative})) < 1e-9


class Compared(TorchFunctionMode):
    """Counts comparisons of values."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.equal
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "times"), [(OneMask, [1, 0, 1]), (OneText, [0, 0, 0])])
def test_values_are_compared_once(kind, times):
    """To read them at each step would wait for the device; what is text is never taken for the same."""
    call, other = once_for_all_rows(kind, 1), once_for_all_rows(kind, 2)
    patched = sloth_fx.transform(build(kind), SPEC, example_inputs=call)
    negative = Negative.of({name: other[name] for name in kind.text})
    later = {**call, "hidden_states": call["hidden_states"] + 1}
    counts = []
    for given in (call, later, {**later, kind.alone: call[kind.alone].clone()}):
        with Compared() as compared:
            branches_of(patched).prepare(patched, ((), given), negative, (True,))
        counts.append(compared.count)
    assert counts == times


def test_rows_that_lie_side_by_side_have_what_is_the_same_for_all():
    """Another mask would not be seen."""
    kind = OneMaskInRows
    call, other = once_for_all_rows(kind, 0), once_for_all_rows(kind, 1)
    other[MASK] = torch.tensor([[1, 0, 1, 1, 0]])
    patched = sloth_fx.transform(build(kind), SPEC, example_inputs=call)
    assert all("two branches" in note for note in notes(patched))
    context = sloth_fx.context(patched)
    context.at(0.0)
    context.set_negative(**{TEXT: other[TEXT], MASK: call[MASK].clone()})
    found = run(patched, call)
    assert difference(found, expected(kind, call, {**call, TEXT: other[TEXT]})) < 1e-9
    with pytest.raises(
        SlothError, match=r"the negative encoder_attention_mask .* differs .* give .* each of the 2 rows"
    ):
        run(patched, {**call, MASK: other[MASK]})
    context.set_negative(**{TEXT: other[TEXT], MASK: other[MASK]})
    with pytest.raises(
        SlothError, match=r"the negative encoder_attention_mask .* differs .* give .* each of the 2 rows"
    ):
        run(patched, call)


# Hosts that are steered by what they compute


class SteeredByData(Host):
    """Not to be run without data."""

    def forward(self, hidden_states, timestep, *args, **kwargs):
        if float(hidden_states.mean()) > 1e9:
            return None
        return super().forward(hidden_states, timestep, *args, **kwargs)


class Reading(nn.Module):
    """Reads a number of the text, so it is called for each branch."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, SIZE)

    def forward(self, text):
        return self.layer(text) if float(text.mean()) < 1e9 else text


class Adapted(SteeredByData):
    """A module has a forward of its own, as hooks and adapters have it."""

    def __init__(self):
        super().__init__()
        self.reading = Reading()
        self.reading.forward = types.MethodType(lambda self, text: 3.0 * Reading.forward(self, text), self.reading)

    def embed(self, text, pooled):
        return self.reading(text)


def test_a_module_that_is_called_for_each_branch_keeps_its_forward():
    call, negative = call_of(Adapted), {TEXT: call_of(Adapted, 5, 1)[TEXT]}
    patched, context = guided(Adapted)
    assert branches_of(patched).apart == ["reading"]
    context.set_negative(**negative)
    assert difference(run(patched, call), expected(Adapted, call, {**call, **negative})) < 1e-9
    context.rows = ("uncond",)
    assert all(map(torch.equal, run(patched, call), run(build(Adapted), call)))


class Modulated(nn.Module):
    """Self-attention of the image in a block whose Python reads what modulates it."""

    def __init__(self):
        super().__init__()
        self.attention = text_hosts.Cross()

    def forward(self, image, vector):
        if float(vector.mean()) > 1e9:
            return image
        image = image * (1 + vector[:, None])
        return self.attention(image, image)


class SelfModulated(SteeredByData):
    text = (TEXT, POOLED)

    def __init__(self):
        super().__init__()
        self.own = Modulated()

    def embed(self, text, pooled):
        self.vector = self.pooled_in(pooled)
        return self.text_in(text)

    def run(self, text, image, vector, mask):
        image = super().run(text, image, vector, mask)
        return image + self.own(image, self.vector)


def test_a_module_with_operators_is_not_called_for_each_branch():
    """What they do stays as it is."""
    kind, other = SelfModulated, SlothfulAttention(where="self")
    call = call_of(kind)
    negative = {name: call_of(kind, 5, 1)[name] for name in kind.text}
    patched, context = guided(kind, [other, SPEC])
    [note] = notes(patched)
    assert "two branches: TypeError" in note
    context.set_negative(**negative)
    models = {}
    for name in ("text", "negative"):
        models[name] = sloth_fx.transform(build(kind), other, example_inputs=call)
        sloth_fx.context(models[name]).at(0.0)

    def run_one(_, name):
        return run(models[name], call if name == "text" else {**call, **negative})

    def site(query, key):
        return joint(5, IMAGE) if key.shape[-2] == 5 + IMAGE else None

    found = run(patched, call)
    assert difference(found, in_step(None, ("text", "negative"), SPEC, (site, site), run=run_one)) < 1e-9
    context.set_negative(**{name: call[name] for name in kind.text})
    assert difference(run(patched, call), run(models["text"], call)) < 1e-9
    assert difference(run(models["text"], call), run(build(kind), call)) > 1e-3


class LearnedByMask(SteeredByData):
    """Learned tokens are modulated by how many tokens the text has."""

    text = (TEXT, MASK)

    def embed(self, text, pooled):
        learned = self.learned.expand(len(text), -1, -1) * (1 + 3 * self.time_in(self.share))[:, None]
        return torch.cat([learned, self.text_in(text)], 1)

    def forward(self, hidden_states, timestep, encoder_hidden_states, encoder_attention_mask):
        self.share = encoder_attention_mask.to(hidden_states.dtype).mean(1, keepdim=True)
        return super().forward(hidden_states, timestep, encoder_hidden_states)


def test_learned_tokens_are_not_taken_for_an_image_where_numbers_are_read():
    kind = LearnedByMask
    call = call_of(kind)
    negative = {TEXT: call_of(kind, 5, 1)[TEXT], MASK: torch.tensor([[1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])}
    patched, context = guided(kind)
    [note] = notes(patched)
    assert "two branches: NoImageError" in note
    context.set_negative(**negative)
    assert difference(run(patched, call), expected(kind, call, {**call, **negative})) < 1e-9
