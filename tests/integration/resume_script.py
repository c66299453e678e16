"""Run by test_resume_elsewhere.py: `train.py` stopped on two ranks goes on on others.

Usage: resume_script.py CONFIG OUT STAGE RANKS... Trains without a stop in OUT/straight and stops
another run in OUT/stopped, both on two ranks under ZeRO-STAGE; then each of RANKS goes on from a
copy of that in OUT/on_RANKS. `seen_RANK.jsonl` beside each has the keys of every step. At last
OUT/straight is evaluated offline, on two ranks and on one, and the newest checkpoints of it and of
OUT/stopped are exported.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

from worlds import fork_world

import train
from routedvit.training.engine import Engine, StepResult

STOP_AT = 3


def run(config: str, folder: Path, stage: str, ranks: int, stop: bool = False) -> list[int]:
    """Exit codes of `python train.py` on every rank."""

    def main(rank: int) -> int:
        seen = folder.parent / f"{folder.name}.seen_{rank}.jsonl"
        original, calls = Engine.train_step, 0

        def recorded(engine: Engine, batches: list, **options: bool) -> StepResult:
            nonlocal calls
            calls += 1
            with seen.open("a") as file:
                file.write(json.dumps([key for batch in batches for key in batch["key"]]) + "\n")
            if stop and calls == STOP_AT and rank == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            return original(engine, batches, **options)

        Engine.train_step = recorded  # type: ignore[method-assign]
        return train_py(config, folder, stage)

    return fork_world(ranks, main)


def train_py(config: str, folder: Path, stage: str, *more: str) -> int:
    """`python train.py`, in this process; returns the exit code."""
    zero = json.dumps({"stage": int(stage)})
    sys.argv = ["train.py", "--config", config, "--set", f"output_dir={folder}"]
    sys.argv += ["--set", f"deepspeed.zero_optimization={zero}", *more]
    return train.main()


def main(config: str, out: Path, stage: str, others: list[str]) -> None:
    codes = {"straight": run(config, out / "straight", stage, 2)}
    codes["stopped"] = run(config, out / "stopped", stage, 2, stop=True)
    for ranks in others:
        folder = out / f"on_{ranks}"
        shutil.copytree(out / "stopped", folder)
        codes[folder.name] = run(config, folder, stage, int(ranks))
    for ranks in (2, 1):
        codes[f"evaluated_on_{ranks}"] = fork_world(
            ranks, lambda _: train_py(config, out / "straight", stage, "--evaluate", "latest")
        )
    without_data = ("--export", "latest", "--set", "data.train.shards=gone")
    for name in ("straight", "stopped"):
        codes[f"exported_{name}"] = fork_world(
            1, lambda _, folder=out / name: train_py(config, folder, stage, *without_data)
        )
    (out / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
