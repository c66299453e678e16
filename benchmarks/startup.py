"""Seconds from typing `deepspeed train.py` to its first optimiser step, beside a bare script's.

    python -m benchmarks.startup --rounds 5

Two CPU ranks. The bare script is what a tutorial tells one to write; it compiles DeepSpeed's
shared-memory op at its first start, so it is timed twice: with an empty cache of compiled ops and
with a warm one. All three alternate within a round, and the medians' ratio to the bare script with
a warm cache is what to quote. Needs `make train`'s shards.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.results import report_measured

ROOT = Path(__file__).resolve().parents[1]
BARE = [str(ROOT / "benchmarks" / "bare_deepspeed.py")]


def seconds_to_first_step(script: list[str], **environment: str) -> float:
    """Wall time until the first line on rank 0 that reports a step."""
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    began = time.perf_counter()
    with subprocess.Popen(
        [launcher, "--num_accelerators", "2", *script],
        cwd=ROOT,
        env=os.environ | {"DS_ACCELERATOR": "cpu", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        printed = []
        for line in process.stdout:
            printed.append(line)
            if line.startswith(("first step", "step ")):
                seconds = time.perf_counter() - began
                break
        else:
            raise SystemExit("".join(printed))
        process.stdout.read()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        warm = str(Path(folder) / "warm")
        train = ["train.py", "--config", "configs/quickstart.json", "--fresh"]
        for override in ("steps=2", "epochs=null", "batch_size=64"):
            train += ["--set", f"train.{override}"]
        train += ["--set", "schedule.warmup_epochs=0", "--set", f"output_dir={folder}/run"]
        cases: dict[str, Callable[[], float]] = {
            "train.py": lambda: seconds_to_first_step(train),
            "bare, warm": lambda: seconds_to_first_step(BARE, TORCH_EXTENSIONS_DIR=warm),
            "bare, nothing compiled": lambda: seconds_to_first_step(
                BARE, TORCH_EXTENSIONS_DIR=tempfile.mkdtemp(dir=folder)
            ),
        }
        cases["bare, warm"]()  # compiles
        times: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(rounds):
            for name, case in cases.items():
                times[name].append(case())
    report_measured("startup", times, unit="s", baseline="bare, warm")


if __name__ == "__main__":
    main()
