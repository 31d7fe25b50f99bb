"""Run every benchmark, one after another, and write their tables into docs/benchmarks.md.

    python benchmarks/run_all.py                                 # CPU: half an hour on two quiet cores
    python benchmarks/run_all.py --device cuda                   # bfloat16, SD1.5 and SDXL, eager and compiled
    python benchmarks/run_all.py --only reduction -- --runs 9    # what follows -- goes to each of them

The tables replace those of the same type of device; the prose of the page stays.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "benchmarks.md"

# Per benchmark, on a CPU: what keeps the whole at half an hour.
CPU = {
    "transform_time": [],
    "attention": ["--seconds", "40"],
    "overhead": ["--seconds", "90", "--compile"],
    "reduction": ["--seconds", "200"],
    "near_sighted": ["--seconds", "120"],
    "guidance": ["--seconds", "60"],
    "step_by_step": [],
    "peers": ["--models", "sd15", "--sizes", "512", "--runs", "5", "--seconds", "150"],
}
GPU = {
    "transform_time": [],
    "attention": ["--compile"],
    "overhead": ["--compile", "--runs", "50"],
    "reduction": ["--compile", "blocks", "--runs", "15"],
    "near_sighted": ["--compile", "blocks", "--runs", "15"],
    "guidance": ["--compile", "blocks", "--runs", "15"],
    "step_by_step": ["--compile", "blocks", "--runs", "15"],
    "peers": ["--compile", "--runs", "15"],
}


def arguments() -> tuple[argparse.Namespace, list[str]]:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--dtype", choices=("float32", "float16", "bfloat16"))
    options.add_argument("--only", nargs="+", choices=tuple(CPU), default=tuple(CPU), metavar="NAME")
    options.add_argument("--markdown", type=Path, default=PAGE, metavar="FILE")
    options.add_argument("--tiny", action="store_true", help="tiny models and few runs: whether it all works")
    given = sys.argv[1:]
    here, passed = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    return options.parse_args(here), passed


def main() -> int:
    options, passed = arguments()
    chosen = CPU if options.device == "cpu" else GPU
    failed = []
    for name in options.only:
        command = [sys.executable, str(HERE / f"{name}.py"), "--device", options.device, *chosen[name]]
        command += ["--dtype", options.dtype] if options.dtype else []
        command += ["--tiny", "--runs", "3", "--seconds", "1"] if options.tiny else []
        print(f"\n== {name}", flush=True)
        start = time.perf_counter()
        result = subprocess.run([*command, "--markdown", str(options.markdown), *passed], check=False)
        print(f"== {name}: {time.perf_counter() - start:.0f} s", flush=True)
        failed += [name] if result.returncode else []
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
