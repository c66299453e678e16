"""Everything that needs a GPU, in one call: `python -m benchmarks.gpu` (or `make gpu`).

    python -m benchmarks.gpu [--minutes 8] [--profile FOLDER]

The tests marked `gpu`, then each benchmark that has something to say about a GPU, the most telling
first, since time on a GPU is short: what the minutes do not suffice for is cut off and named. Goes
on after a failure, tells at the end what failed, and exits with 1 if anything did. Rows are
appended to the results as they are measured, and so survive a cut.
"""

import argparse
import importlib.util
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
# Most of the tests' time is the host's, which compiles some 250 kernels.
SIDE_BY_SIDE = ("-n", "8") if importlib.util.find_spec("xdist") else ()
STEPS = (
    ("-m", "pytest", "-m", "gpu", *SIDE_BY_SIDE, "tests/unit/ops", "tests/gpu"),
    ("-m", "benchmarks.router"),
    ("-m", "benchmarks.tokens"),
    ("-m", "benchmarks.train_step", "--rounds", "10", "--only", "224,512"),
    ("-m", "benchmarks.utilisation"),
    ("-m", "benchmarks.router", "--forward"),
    ("-m", "benchmarks.train_step", "--rounds", "10", "--only", "all_heavy,seed"),
    ("-m", "benchmarks.block"),
    ("-m", "benchmarks.drop_path", "--model", "colt5_vit_l", "--depth", "24"),
)
PROFILING = ("benchmarks.train_step", "benchmarks.utilisation")


def run_all(steps: Sequence[Sequence[str]], seconds: float) -> list[str]:
    """Run `python STEP` for each, `seconds` in all; what went wrong, a line each."""
    wrong = []
    end = time.monotonic() + seconds
    for step in steps:
        name, began = " ".join(step), time.monotonic()
        if began >= end:
            wrong.append(f"not begun, the time was over: {name}")
            continue
        print(f"== python {name}", flush=True)
        try:
            status = subprocess.run(
                [sys.executable, *step], cwd=ROOT, timeout=end - began
            ).returncode
        except subprocess.TimeoutExpired:
            wrong.append(f"cut off, the time was over: {name}")
        else:
            if status:
                wrong.append(f"exit status {status}: {name}")
        print(f"== {time.monotonic() - began:.0f} s\n", flush=True)
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything together")
    parser.add_argument("--profile", help="folder for a table of kernels per training step")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device here: nothing to run")
    steps = [
        (*step, "--profile", arguments.profile)
        if arguments.profile and step[1] in PROFILING
        else step
        for step in STEPS
    ]
    if wrong := run_all(steps, 60 * arguments.minutes):
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
