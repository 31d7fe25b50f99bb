"""The judge: what a prompt promises, what images show, and how far two sets of them are apart."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTForImageClassification

from sloth_fx import SlothError
from sloth_fx.cli.judge import Judge, frechet


@pytest.fixture(scope="module")
def judged(judge):
    return Judge(judge)


@pytest.fixture
def images():
    """Of several sizes, and more than one batch of them."""
    random = np.random.default_rng(0)
    sizes = [(24, 24), (31, 17)] * 10
    return [Image.fromarray(random.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


@pytest.mark.parametrize(
    ("prompt", "labels"),
    [
        ("a Red Circle on the left", ("red circle on the left", "circle")),
        ("blue squares", ()),
        ("a blue square, and circles", ("blue square",)),
        ("semicircle", ()),
        ("", ()),
    ],
)
def test_promised(judged, prompt, labels):
    assert judged.promised(prompt) == labels


def test_scores_are_the_sigmoid_of_the_model(judge, judged, images):
    model = ViTForImageClassification.from_pretrained(judge)
    pixels = torch.from_numpy(np.asarray(images[2], dtype=np.float64) / 255 * 2 - 1).float().permute(2, 0, 1)
    with torch.no_grad():
        expected = 1 / (1 + np.exp(-model(pixels[None]).logits.double().numpy()))
    scores = judged.scores(images)
    assert scores.shape == (20, 3)
    np.testing.assert_allclose(scores[2], expected[0], rtol=1e-5)
    assert judged.scores([]).shape == (0, 3)


def test_right_is_all_that_is_promised_and_nothing_else(judged, images, monkeypatch):
    scores = np.array([[0.9, 0.1, 0.6], [0.9, 0.6, 0.6], [0.2, 0.1, 0.6], [0.4, 0.1, 0.2]])
    monkeypatch.setattr(judged, "scores", lambda _: scores)
    red = "a red circle on the left"
    assert judged.right(images[:4], [red] * 4).tolist() == [True, False, False, False]
    assert judged.right(images[:4], [red, red, "a circle", "a sloth"]).tolist() == [True, False, True, True]


def test_shows(judged, images, monkeypatch):
    scores = np.array([[0.9, 0.1, 0.2], [0.1, 0.6, 0.8]])
    monkeypatch.setattr(judged, "scores", lambda _: scores)
    assert judged.shows(images[:2], "circle").tolist() == [False, True]
    assert judged.shows(images[:2], "red circle").tolist() == [True, False]
    with pytest.raises(SlothError, match="nearest: blue square"):
        judged.shows(images[:2], "blue squre")


def test_features_make_the_labels(judge, judged, images):
    model = ViTForImageClassification.from_pretrained(judge)
    features = judged.features(images)
    logits = features @ model.classifier.weight.detach().double().numpy().T + model.classifier.bias.detach().numpy()
    assert features.shape == (20, 16)
    np.testing.assert_allclose(1 / (1 + np.exp(-logits)), judged.scores(images), rtol=1e-5)


def test_frechet_of_equal_sets_is_0():
    features = np.random.default_rng(0).normal(size=(9, 5))
    assert frechet(features, features[::-1]) == pytest.approx(0, abs=1e-9)


def test_frechet_by_the_root_of_the_product():
    random = np.random.default_rng(0)
    a, b = random.normal(size=(40, 5)), random.normal(size=(31, 5)) @ random.normal(size=(5, 5)) + 2
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    values = np.linalg.eigvals(cov_a @ cov_b)  # not symmetric, but similar to what is
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b) - 2 * np.sqrt(values.real).sum()
    assert frechet(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet(b, a) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_one_dimension():
    assert frechet(np.array([[0.0], [2.0]]), np.array([[5.0], [9.0]])) == pytest.approx(36 + 2 + 8 - 2 * 4)


@pytest.mark.parametrize(("a", "b"), [((1, 5), (9, 5)), ((9, 5), (9, 4)), ((9,), (9,))])
def test_frechet_refuses(a, b):
    with pytest.raises(SlothError, match="features of shape"):
        frechet(np.zeros(a), np.zeros(b))


def test_no_judge(tmp_path, pipeline, judged, images):
    for folder in (tmp_path, pipeline / "unet", tmp_path / "nowhere"):
        with pytest.raises(SlothError, match="is no judge"):
            Judge(folder)
    with pytest.raises(SlothError, match="20 images and 1 prompts"):
        judged.right(images, ["a circle"])
