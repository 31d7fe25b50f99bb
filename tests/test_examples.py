"""Every example runs in seconds with --tiny, in a process of its own, and prints what it is there to show."""

import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import sloth_fx

EXAMPLES = Path(__file__).parents[1] / "examples"
HELPERS = {"unets.py", "pictures.py"}


def run(name: str, *arguments: object) -> str:
    done = ended(name, *arguments)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def ended(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / name), "--tiny", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found, f"{pattern!r} is not in:\n{text}"
    return float(found[1])


def test_sd15_loop() -> None:
    out = run("sd15_loop.py", "--steps", 3)
    assert "8 attention sites (4 self, 4 cross), 3 with operators" in out
    assert "unpatched: " in out
    assert 0 < number(r"relative difference of the results: ([\d.]+)", out) < 1


def test_sdxl_compiled() -> None:
    out = run("sdxl_compiled.py", "--steps", 12, "--phases", 3)
    assert 2 <= number(r"(\d+) sets of strides, all compiled", out) <= 3
    assert re.search(r"12 steps in .*nothing was compiled again", out)


def test_own_schedule() -> None:
    kept = [int(share) for share in re.findall(r"(\d+)% #", run("own_schedule.py"))]
    assert len(kept) == 20
    assert kept[0] == kept[-1] == 100
    assert min(kept) == kept[10] < 30


def test_select_sites() -> None:
    out = run("select_sites.py")
    assert [int(n) for n in re.findall(r"(\d+) sites, ", out)] == [4, 2, 3, 2, 2, 3]
    assert re.search(r"^in .* NearSightedTile ", out, re.MULTILINE)
    assert re.search(r"^out .* SlothfulAttention ", out, re.MULTILINE)
    assert "where='up_block.*' matches no site; nearest: up_blocks." in out


def test_train_through() -> None:
    out = run("train_through.py", "--steps", 6)
    before, after = (float(loss) for loss in re.findall(r"([\d.]+) (?:before|after)", out))
    assert after < before
    assert number(r"original, which shares the weights: ([\d.]+)", out) < before


@pytest.fixture(scope="module")
def scripts() -> Iterator[None]:
    """The examples and the lab, to be imported as they import each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        patch.syspath_prepend(EXAMPLES / "lab")
        yield


@pytest.fixture(scope="module")
def lab(scripts: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the lab trains, untrained."""
    import models
    from diffusers import (
        DDIMScheduler,
        FlowMatchEulerDiscreteScheduler,
        StableDiffusion3Pipeline,
        StableDiffusionPipeline,
    )
    from transformers import CLIPTextModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("lab")
    tokenizer, vae = models.tokenizer(), models.vae()
    silent_tokenizer, silent_encoder = models.silent_encoder()
    encoder = models.text_encoder(tokenizer)
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(encoder.config),
        tokenizer=tokenizer,
        unet=torch.nn.Module.half(models.unet()),
        scheduler=DDIMScheduler(prediction_type="v_prediction", clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "lab-unet")
    StableDiffusion3Pipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder,
        tokenizer_2=tokenizer,
        text_encoder_3=silent_encoder,
        tokenizer_3=silent_tokenizer,
        transformer=torch.nn.Module.half(models.dit()),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    ).save_pretrained(folder / "lab-dit")
    models.judge().save_pretrained(folder / "judge")
    return folder


TEXT, DIT_TEXT = 24, 24 + 1  # the latter with what a silent T5 adds
LEVELS = ((256, 3 * 64), (64, 3 * 96), (16, 4 * 128))  # of the UNet: tokens, and channels of all sites


def unet_left(first: float) -> float:
    """The share of pairs, weighted with channels, where ``first`` is left of self-attention at the first level."""
    other = sum(width * count * (TEXT + count) for count, width in LEVELS[1:])
    count, width = LEVELS[0]
    return (width * count * (TEXT + first * count) + other) / (width * count * (TEXT + count) + other)


def dit_left(image: int, text: int) -> float:
    """The share of pairs, where each image token sees ``image`` keys of the image, and each text token ``text``."""
    return (64 * (image + DIT_TEXT) + DIT_TEXT * (text + DIT_TEXT)) / (64 + DIT_TEXT) ** 2


def test_demo(lab: Path, tmp_path: Path) -> None:
    out = run("demo.py", "--lab", lab, "--out", tmp_path)
    merged = (32 + DIT_TEXT) ** 2 / (64 + DIT_TEXT) ** 2
    expected = {
        "lab-unet": {
            "TokenDownsample": unet_left(1 / 4),
            "HyperTile": unet_left(1 / 16),
            "TokenMerging": unet_left(1 / 4),
        },
        "lab-dit": {"TokenDownsample": dit_left(16, 16), "HyperTile": dit_left(16, 64), "TokenMerging": merged},
    }
    row = r"^  (\w+) +time +([\d.]+)x +pairs left +(\d+)% +right (\d) of 2$"
    for part, (name, shares) in zip(out.split("\n\n\n"), expected.items(), strict=True):
        assert f"{name}, a StableDiffusion" in part
        rows = re.findall(row, part, re.MULTILINE)
        assert len(rows) == 7
        assert rows[0][:3] == ("unpatched", "1.00", "100")
        left = {operator: int(share) for operator, _, share, _ in rows}
        assert {operator: left[operator] for operator in shares} == {k: round(100 * v) for k, v in shares.items()}
        assert left["NearSightedAttention"] < left["NearSightedTile"] < 100 > left["SlothfulAttention"]
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.height > 7 * 128
            assert f"picture: {tmp_path / f'{name}.png'}" in part


def test_demo_says_what_is_missing(lab: Path, tmp_path: Path) -> None:
    (tmp_path / "lab-unet-student").symlink_to(lab / "lab-unet")
    done = ended("demo.py", "--lab", tmp_path, "--pipelines", "lab-dit", "lab-unet-student", "--out", tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"lab-dit is not in {tmp_path}: examples/lab/train.py dit trains it" in done.stderr
    assert f"judge is not in {tmp_path}" in done.stderr
    assert re.search(r"lab-unet-student, .*: 2 steps, guidance 1$", done.stdout, re.MULTILINE)
    assert "right" not in done.stdout
    assert not (tmp_path / "lab-dit.png").exists()


def test_demo_without_pipelines(tmp_path: Path) -> None:
    done = ended("demo.py", "--lab", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 1
    assert "There is no pipeline to show" in done.stderr
    assert not done.stdout
    assert not (tmp_path / "out").exists()


def test_demo_paints_from_the_same_noise(lab: Path) -> None:
    import demo
    import diffusers
    import numpy as np

    for name, text in (("lab-unet", TEXT), ("lab-dit", DIT_TEXT)):
        pipe = diffusers.DiffusionPipeline.from_pretrained(lab / name)
        seen: list[torch.Tensor] = []
        denoiser = pipe.unet if name == "lab-unet" else pipe.transformer
        denoiser.register_forward_pre_hook(
            lambda _, __, given, seen=seen: seen.append(given["encoder_hidden_states"]), with_kwargs=True
        )
        painter = demo.Painter(pipe, demo.PROMPTS[:3], 2, 4.0)
        none = sloth_fx.Reduction(rate=1.0)
        specs = (None, None, sloth_fx.TokenDownsample(), sloth_fx.SlothfulAttention(in_=none, out=none))
        plain, again, fewer, neutral = (np.stack(painter.paint(spec)[0]) for spec in specs)
        assert plain.shape == (3, 64, 64, 3)
        assert (plain == again).all()
        assert (plain == neutral).all()
        assert (plain != fewer).any(axis=(1, 2, 3)).all()
        assert {(each.shape[:2], each.dtype) for each in seen} == {((2 * 3, text), torch.float32)}


def test_the_rows_of_the_demo(scripts: None) -> None:
    import demo
    import numpy as np

    class Fake(demo.Painter):
        def paint(self, spec: object) -> tuple[list[Image.Image], float]:
            seconds = 3.0 if spec else 4.0
            return [Image.new("RGB", (8, 6))] * 3, 9.0 if self.steps == 1 else seconds

        def pairs_left(self, spec: object) -> float:
            return 0.25

    class Judge:
        def right(self, images: list[Image.Image], prompts: tuple[str, ...]) -> np.ndarray:
            return np.array([prompt == "b" for prompt in prompts])

    pipe = SimpleNamespace(set_progress_bar_config=lambda **_: None)
    rows = demo.rows_of(Fake(pipe, ("a", "b", "b"), 5, 1.0), Judge(), "some")
    assert rows[0].numbers == [("time", "1.00x"), ("pairs left", "100%"), ("right", "2 of 3")]
    assert rows[1].numbers == [("time", "0.75x"), ("pairs left", "25%"), ("right", "2 of 3")]
    assert all(row.marks == [False, True, True] for row in rows)
    named = [type(spec).__name__ for spec in demo.OPERATORS.values() if spec]
    assert [row.name for row in rows] == ["unpatched", *named]
    assert demo.rows_of(Fake(pipe, ("a", "b", "b"), 5, 1.0), None, "some")[1].marks is None


def test_the_prompts_of_the_demo_are_captions(scripts: None) -> None:
    import demo
    from scenes import BACKGROUNDS, FILLS, LABELS, RADII, TEXTURES

    def any_of(words: Iterable[str]) -> str:
        return f"(?:{'|'.join(words)})"

    thing = f"an? (?:{any_of(RADII)} )?(?:{any_of(FILLS)} )?{any_of(LABELS)}"
    background = f"an? (?:{any_of(TEXTURES)} )?{any_of(BACKGROUNDS)} background"
    for prompt in demo.PROMPTS:
        assert re.fullmatch(f"{thing}(?: and {thing})? on {background}", prompt), prompt


def test_a_sheet_of_pictures(scripts: None) -> None:
    from pictures import GAP, LABEL, MARGIN, RIGHT, WRONG, Row, font, sheet, wrapped

    colours = [["#ff0000", "#00ff00", "#0000ff"], ["#ffff00", "#00ffff", "#ff00ff"]]
    images = [[Image.new("RGB", (50, 31), colour) for colour in row] for row in colours]
    marks = [[True, False, True], None]
    rows = [Row("name", "words", [("time", "1.00x")], *each) for each in zip(images, marks, strict=True)]
    picture = sheet("title", "line", ["one word", "many words " * 9, "more"], rows, ["footer " * 90])
    lefts = [MARGIN + LABEL + column * (100 + GAP) for column in range(3)]
    top = next(y for y in range(picture.height) if picture.getpixel((lefts[0], y)) == (255, 0, 0))
    for index, row in enumerate(colours):
        for left, colour in zip(lefts, row, strict=True):
            y = top + index * (62 + GAP)
            for x, inside in ((left, True), (left + 80, True), (left - 1, False)):
                assert picture.getpixel((x, y + 1)) == rgb(colour if inside else "#ffffff")
    for left, colour in zip(lefts, (RIGHT, WRONG, RIGHT), strict=True):
        marked, unmarked = (picture.getpixel((left + 97, y + 51)) for y in (top, top + 62 + GAP))
        assert max(abs(a - b) for a, b in zip(marked, rgb(colour), strict=True)) < 8
        assert unmarked in map(rgb, colours[1])
    assert {picture.getpixel((x, picture.height - 1)) for x in range(picture.width)} == {(255, 255, 255)}
    lines = wrapped("a large filled red circle", 70, font(13))
    assert " ".join(lines) == "a large filled red circle"
    assert max(map(font(13).getlength, lines)) <= 70
    assert len(lines) > 1


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_every_example_is_tested(path: Path) -> None:
    assert path.name in HELPERS or f"def test_{path.stem}(" in Path(__file__).read_text(encoding="utf-8")
