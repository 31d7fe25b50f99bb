"""The lab's networks and objectives, on a few steps: what a training is for is shown by its results."""

import json

import distillation
import models
import numpy as np
import objectives
import pytest
import scenes
import torch
from torch import nn
from torch.nn import functional as F
from training import Loop, attention_for_training, mean_weights


class Line:
    """Fits a line."""

    def __init__(self):
        torch.manual_seed(1)
        self.networks = nn.ModuleDict({"line": nn.Linear(3, 1)})

    def loss(self, step):
        random = torch.Generator().manual_seed(step)
        x = torch.randn(16, 3, generator=random)
        return (self.networks["line"](x) - x.sum(1, keepdim=True)).square().mean()


@pytest.fixture(autouse=True)
def quiet(capfd):
    yield
    capfd.readouterr()


def test_a_loop_goes_on_as_if_it_had_not_been_stopped(tmp_path, monkeypatch):
    whole, parts = Line(), Line()
    assert Loop(tmp_path / "whole", 120, 0.05).run(whole)
    assert not Loop(tmp_path / "parts", 120, 0.05).run(parts, minutes=0)
    again = Line()
    nn.init.zeros_(again.networks["line"].weight)
    assert Loop(tmp_path / "parts", 120, 0.05).run(again)
    for one, other in zip(whole.networks.parameters(), again.networks.parameters(), strict=True):
        assert torch.equal(one, other)
    logs = [json.loads((tmp_path / name / "log.json").read_text())[-1] for name in ("whole", "parts")]
    assert logs[0]["step"] == logs[1]["step"] == 100


def test_a_loop_learns_and_keeps_the_mean(tmp_path):
    line, fresh = Line(), Line()
    before = line.loss(10_000).item()
    Loop(tmp_path, 400, 0.05, warmup=10).run(line)
    assert line.loss(10_000).item() < 0.05 * before
    assert mean_weights(tmp_path, fresh.networks) == 400
    assert torch.equal(fresh.networks["line"].weight, line.networks["line"].weight)


def test_every_word_is_a_token_and_the_longest_caption_fits():
    tokenizer = models.tokenizer()
    assert all(len(tokenizer.tokenize(word)) == 1 for word in models.WORDS)
    random = np.random.default_rng(0)
    longest = max(len(tokenizer(scenes.full_caption(scenes.random_scene(random))).input_ids) for _ in range(200))
    assert longest == models.TOKENS
    assert tokenizer("cat").input_ids != tokenizer("car").input_ids


def test_states_say_what_has_been_said():
    text = "a red circle on the left and an outlined blue cross on a striped grey background"
    states = objectives.states_of(text, models.TOKENS)
    assert len(states) == models.TOKENS
    assert states[0] == [0] * 12
    red, circle, left = 1, 1, 1
    assert states[6][5:10] == [red, circle, 0, 0, left]
    assert states[-1] == [red, circle, 0, 0, left, 3, 4, 0, 2, 0, 2, 2]


@pytest.mark.parametrize("name", ["text", "vae", "judge"])
def test_objectives_depend_on_the_step_and_move_every_weight(name):
    tokenizer, device = models.tokenizer(), torch.device("cpu")
    objective = {
        "text": lambda: objectives.Text(tokenizer, models.text_encoder(tokenizer), 3),
        "vae": lambda: objectives.Autoencoder(models.vae(), 3, device),
        "judge": lambda: objectives.Judging(models.judge(), 3, device),
    }[name]()
    objective.networks.eval()
    first, again, other = (objective.loss(step) for step in (5, 5, 6))
    assert first.item() == again.item() != other.item()
    first.backward()
    still = [key for key, each in objective.networks.named_parameters() if each.grad is None]
    assert still == []


def encode_for_unet(texts):
    return torch.stack([torch.full((24, 128), float(len(text)) / 100) for text in texts])


def encode_for_dit(texts):
    states = torch.stack([torch.full((24, 256), float(len(text)) / 100) for text in texts])
    return states, states[:, 0]


def students(batch=3):
    import train

    vae, device = models.vae(), torch.device("cpu")
    torch.manual_seed(2)
    return [
        distillation.VelocityStudent(
            models.unet(), vae, encode_for_unet, batch, device, "u", scheduler=train.unet_schedule(), guidance=3.0
        ),
        distillation.FlowStudent(
            models.dit(), vae, encode_for_dit, batch, device, "d", scheduler=train.flow_schedule(), guidance=3.0
        ),
    ]


def test_students_take_their_schedulers_steps():
    for student in students():
        latents, velocity = torch.randn(3, 4, 16, 16), torch.randn(3, 4, 16, 16)
        times = student.times()
        assert len(times) == 5
        timesteps = student.scheduler.timesteps
        for timestep, start, end in zip(timesteps, times[:-1], times[1:], strict=True):
            expected = student.scheduler.step(velocity, timestep, latents).prev_sample
            found = student.advance(latents, velocity, start, end)
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(student.velocity(latents, found, start, end), velocity, atol=2e-3, rtol=1e-3)


def test_students_learn_from_guided_teachers():
    for student in students():
        first, again = student.loss(4), student.loss(4)
        assert first.item() == again.item() > 0
        first.backward()
        assert all(each.grad is None for each in student.teacher.parameters())
        student.guidance = 5.0
        assert student.loss(4).item() != first.item()


def test_teachers_lose_nothing_on_what_they_are_asked_for():
    """With a network that knows the answer the loss is zero; the answer is derived here in another way."""
    import train

    class Oracle(nn.Module):
        def forward(self, noisy, *arguments):
            return type("Out", (), {"sample": self.answer(noisy, arguments)})

    class OfUNet(Oracle):
        def answer(self, noisy, arguments):
            alpha = train.unet_schedule().alphas_cumprod[arguments[0]][:, None, None, None].double()
            noise = (noisy - alpha.sqrt() * drawn) / (1 - alpha).sqrt()
            return (alpha.sqrt() * noise - (1 - alpha).sqrt() * drawn).float()

    class OfDiT(Oracle):
        def answer(self, noisy, arguments):
            sigma = arguments[2][:, None, None, None].double() / 1000
            return ((noisy - drawn) / sigma).float()

    vae, device = models.vae(), torch.device("cpu")
    teachers = [
        objectives.Velocity(OfUNet(), vae, encode_for_unet, 5, device, "unet", 99, scheduler=train.unet_schedule()),
        objectives.Flow(OfDiT(), vae, encode_for_dit, 5, device, "dit", 99),
    ]
    for teacher in teachers:
        drawn = teacher.drawn(7)[0].double()
        assert teacher.loss(7).item() < 1e-3
        drawn = -drawn
        assert teacher.loss(7).item() > 0.01


@pytest.mark.parametrize("count", [1, 7, 48])
def test_the_silent_encoder_gives_as_many_zeros_as_it_is_asked_for(count, tmp_path):
    words, encoder = models.silent_encoder()
    words.save_pretrained(tmp_path)
    words = type(words).from_pretrained(tmp_path)
    assert words(["", "a red\ncircle, and more"]).input_ids == [[words.eos_token_id]] * 2  # nothing to truncate
    ids = words("a red circle", padding="max_length", max_length=count, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(encoder(ids)[0], torch.zeros(1, count, 2 * models.TEXT_WIDTH))


def test_texts_are_followed_by_silence_of_any_length():
    text = torch.randn(2, 24, 5)
    random = np.random.default_rng(0)
    found = [objectives.with_silence(text, random) for _ in range(300)]
    assert all(torch.equal(each[:, :24], text) and not each[:, 24:].any() for each in found)
    lengths = {each.shape[1] - 24 for each in found}
    assert min(lengths) == 1
    assert 200 < max(lengths) <= 256


def test_a_pool_is_of_fixed_scenes_with_texts_that_belong_to_them(monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        scenes, "random_text", lambda scene, random: drawn.setdefault(scenes.full_caption(scene), scene).texture
    )
    import train

    vae = models.vae()
    teacher = objectives.Velocity(
        models.unet(), vae, encode_for_unet, 40, torch.device("cpu"), "unet", 7, scheduler=train.unet_schedule()
    )
    latents, texts, _ = teacher.drawn(3)
    again, same_texts, _ = teacher.drawn(3)
    assert torch.equal(latents, again)
    assert texts == same_texts
    assert len(drawn) == 7 == len({latent.sum().item() for latent in latents})
    known, _ = teacher._pool
    with torch.no_grad():
        own = vae.encode(objectives.pictures([known[5]])).latent_dist.mean * vae.config.scaling_factor
    at = [torch.allclose(latent, own[0], atol=1e-4) for latent in latents]
    assert {text for text, here in zip(texts, at, strict=True) if here} == {known[5].texture}


def test_attention_for_training_is_attention():
    query, key, value = (torch.randn(2, 3, count, 8, requires_grad=True) for count in (15, 7, 7))
    expected = F.scaled_dot_product_attention(query, key, value)
    fused = F.scaled_dot_product_attention
    with attention_for_training("cpu"):
        assert F.scaled_dot_product_attention is not fused
        torch.testing.assert_close(F.scaled_dot_product_attention(query, key, value), expected)
        scaled = F.scaled_dot_product_attention(query, key, value, scale=0.1)
        causal = F.scaled_dot_product_attention(query, query, query, is_causal=True)
    assert F.scaled_dot_product_attention is fused
    torch.testing.assert_close(scaled, fused(query, key, value, scale=0.1))
    torch.testing.assert_close(causal, fused(query, query, query, is_causal=True))
