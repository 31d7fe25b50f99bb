"""What the benchmarks share: their options, the models, interleaved timing, and the tables."""

from __future__ import annotations

import argparse
import copy
import datetime
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
TEXT_TOKENS = 77
FEWEST_RUNS = 3  # whatever --seconds says

# Options


def parser(doc: str | None, *, runs: int, sizes: str = "image edges in pixels") -> argparse.ArgumentParser:
    """The options that all benchmarks have. A default of None is filled in by :func:`parse`, per device."""
    options = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", type=torch.device)
    options.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="float32 on a CPU, else bfloat16")
    options.add_argument("--sizes", type=int, nargs="+", metavar="N", help=sizes)
    options.add_argument("--batch", type=int, help="1 on a CPU, else 2 (as with classifier-free guidance)")
    options.add_argument(
        "--compile",
        nargs="?",
        const="whole",
        choices=("whole", "blocks"),
        help="also compiled: whole models (the default), or only their repeated blocks, which takes far less time",
    )
    options.add_argument("--runs", type=int, default=runs, help=f"at most so many runs of each side, default {runs}")
    options.add_argument(
        "--seconds", type=float, default=float("inf"), help=f"per comparison; {FEWEST_RUNS} runs are made in any case"
    )
    options.add_argument(
        "--tiny", action="store_true", help="tiny models, to try the script out: their times mean nothing"
    )
    options.add_argument("--markdown", type=Path, metavar="FILE", help="write the table into FILE, between its markers")
    return options


def model_parser(doc: str | None, *, runs: int) -> argparse.ArgumentParser:
    """Also ``--models``."""
    options = parser(doc, runs=runs)
    options.add_argument("--models", nargs="+", choices=tuple(CONFIGS), help="sd15 on a CPU, else sd15 and sdxl")
    options.add_argument("--all", action="store_true", help="also what is left out because it takes long")
    return options


def parse(options: argparse.ArgumentParser, *, cpu: Mapping[str, Any], gpu: Mapping[str, Any]) -> argparse.Namespace:
    """The options as given, the device's defaults where they are not, and torch set up accordingly."""
    parsed = options.parse_args()
    on_cpu = parsed.device.type == "cpu"
    common = {"dtype": "float32", "batch": 1, "models": ["sd15"]} if on_cpu else {}
    common = common or {"dtype": "bfloat16", "batch": 2, "models": ["sd15", "sdxl"]}
    for name, default in {**common, **(cpu if on_cpu else gpu)}.items():
        if getattr(parsed, name, default) is None:
            setattr(parsed, name, default)
    parsed.dtype = getattr(torch, parsed.dtype)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    if parsed.compile:
        # All models here share one code object, and torch stops compiling in silence past its limit.
        torch._dynamo.config.recompile_limit = 256
    return parsed


def slow(options: argparse.Namespace, size: int, mode: str) -> bool:
    """Whether a UNet call, or compiling it, takes so long that only the commonest setting is measured."""
    return (mode == "compiled" or (options.device.type == "cpu" and size > 512)) and not options.all


def warmups(options: argparse.Namespace, mode: str) -> int:
    """How many laps are not counted. UNets on a CPU need none, unless they have to be compiled."""
    return 0 if options.device.type == "cpu" and mode == "eager" else 1


# Models

_SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}
_SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
CONFIGS: Mapping[str, Mapping[str, Any]] = {"sd15": _SD15, "sdxl": _SDXL}
_TINY = {
    "sd15": {"block_out_channels": (32, 64, 128, 128), "cross_attention_dim": 32, "attention_head_dim": 4},
    "sdxl": {
        "block_out_channels": (32, 64, 128),
        "cross_attention_dim": 32,
        "attention_head_dim": (2, 4, 8),
        "transformer_layers_per_block": (1, 1, 2),
        "projection_class_embeddings_input_dim": 6 * 256 + 64,
    },
}


def unet(name: str, *, device: torch.device | str, dtype: torch.dtype, tiny: bool = False) -> nn.Module:
    """A UNet with random weights, without gradients."""
    from diffusers import UNet2DConditionModel

    with torch.device(device):
        model = UNet2DConditionModel(**{**CONFIGS[name], **(_TINY[name] if tiny else {})})
    return nn.Module.to(model, dtype).eval().requires_grad_(False)  # diffusers' own warns


def inputs(model: Any, size: int, options: argparse.Namespace, timestep: int = 600) -> dict[str, Any]:
    """Arguments of ``model`` for pictures of ``size`` by ``size`` pixels."""
    config, batch = model.config, options.batch

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=options.device).to(options.dtype)

    found: dict[str, Any] = {
        "sample": random(batch, config.in_channels, size // 8, size // 8),
        "timestep": torch.tensor(timestep, device=options.device),
        "encoder_hidden_states": random(batch, TEXT_TOKENS, config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        found["added_cond_kwargs"] = {"text_embeds": random(batch, pooled), "time_ids": random(batch, 6)}
    return found


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy with the same weights in the same memory, so that both sides read the same bytes."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def modes(options: argparse.Namespace) -> tuple[str, ...]:
    return {None: ("eager",), "whole": ("eager", "compiled"), "blocks": ("eager", "compiled blocks")}[options.compile]


def in_mode(model: Callable[..., Any], mode: str) -> Callable[..., Any]:
    """What to call in a mode; compiling blocks changes the model itself."""
    if mode == "compiled blocks" and hasattr(model, "compile_repeated_blocks"):
        model.compile_repeated_blocks(dynamic=False)
        return model
    return model if mode == "eager" else torch.compile(model, dynamic=False)


# Timing


@dataclass(frozen=True)
class Spread:
    """Median, and 20th and 80th percentile."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        low, median, high = np.percentile(list(values), (20, 50, 80))
        return cls(float(median), float(low), float(high))

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.low:{spec}} to {self.high:{spec}})"


@dataclass(frozen=True)
class Timing:
    """Seconds per lap of each side, and what each returned first."""

    seconds: Mapping[str, Sequence[float]]
    results: Mapping[str, Any]

    @property
    def runs(self) -> int:
        return len(next(iter(self.seconds.values())))

    def ms(self, name: str) -> str:
        spread = Spread.of(1e3 * each for each in self.seconds[name])
        return f"{spread:.0f}" if spread.median >= 100 else f"{spread:.2f}"

    def median(self, name: str) -> float:
        return float(np.median(self.seconds[name]))

    def ratio(self, name: str, base: str) -> Spread:
        """Time over that of ``base`` in the same lap, which cancels what drifts from lap to lap."""
        return Spread.of(a / b for a, b in zip(self.seconds[name], self.seconds[base], strict=True))

    def reached(self, name: str, base: str, best: str) -> float:
        """The median share of what ``best`` saves over ``base`` that ``name`` saves."""
        laps = zip(*(self.seconds[each] for each in (base, name, best)), strict=True)
        return Spread.of((slow - this) / (slow - fast) for slow, this, fast in laps).median


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(
    sides: Mapping[str, Callable[[], Any]], options: argparse.Namespace, *, warmup: int = 1, what: str = ""
) -> Timing:
    """Time the sides in turn, each lap beginning with another one, so that drift of the machine falls on all alike."""
    names = list(sides)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    results: dict[str, Any] = {}
    began = time.perf_counter()
    for lap in range(-warmup, options.runs):
        if lap == 0:
            began = time.perf_counter()
        if lap >= FEWEST_RUNS and time.perf_counter() - began > options.seconds:
            break
        for turn in range(len(names)):
            name = names[(turn + lap) % len(names)]
            _progress(f"{what}: {'warm-up' if lap < 0 else f'run {lap + 1} of {options.runs}'}, {name}")
            wait(options.device)
            start = time.perf_counter()
            result = sides[name]()
            wait(options.device)
            if lap >= 0:
                seconds[name].append(time.perf_counter() - start)
            results.setdefault(name, result)
    _progress("")
    return Timing(seconds, results)


def difference(a: Any, b: Any) -> str:
    """Largest difference of two results, relative to the largest value."""
    first, second = (x[0] if isinstance(x, tuple) else getattr(x, "sample", x) for x in (a, b))
    first, second = first.float(), second.float()
    return f"{((first - second).abs().max() / second.abs().max()).item():.0e}"


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


# Tables


class Table:
    """A markdown table."""

    def __init__(self, *columns: str) -> None:
        self.rows: list[Sequence[str]] = [columns]

    def add(self, *cells: str) -> None:
        self.rows.append(cells)
        named = zip(self.rows[0], cells, strict=True)
        print("; ".join(f"{column} {cell}" for column, cell in named if cell), flush=True)

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(*self.rows, strict=True)]
        lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in self.rows]
        return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def publish(options: argparse.Namespace, name: str, *tables: Table) -> None:
    """Print the tables under a line about the machine, and put them into ``--markdown``.

    There they replace what lies between the two markers of this benchmark and this type of device; without markers
    they are added at the end.
    """
    text = "\n\n".join([environment(options), *map(str, tables)])
    print(f"\n{text}\n", flush=True)
    if options.markdown is None:
        return
    path: Path = options.markdown
    begin, end = f"<!-- begin {name} {options.device.type} -->", f"<!-- end {name} {options.device.type} -->"
    page = path.read_text(encoding="utf-8") if path.exists() else ""
    if begin not in page or end not in page:
        page = f"{page.rstrip()}\n\n{begin}\n{end}\n".lstrip()
    before, rest = page.split(begin, 1)
    after = rest.split(end, 1)[1]
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def environment(options: argparse.Namespace) -> str:
    """One line: machine, versions, commit, date."""
    tiny = ", **tiny model: these times mean nothing**" if options.tiny else ""
    return (
        f"{_machine(options.device)}, {str(options.dtype).removeprefix('torch.')}, batch "
        f"{options.batch}{tiny}; torch {torch.__version__}, diffusers {metadata.version('diffusers')}, "
        f"Python {platform.python_version()}; commit {_commit()}, {datetime.date.today()}"
    )


def _machine(device: torch.device) -> str:
    if device.type == "meta":
        return "no device, counted"
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return f"{chip} ({torch.get_num_threads()} CPU threads)"


@cache
def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@cache
def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(("git", *arguments), cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (" with changes" if git("status", "--short", "sloth_fx") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
