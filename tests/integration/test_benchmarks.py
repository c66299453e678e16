"""The benchmarks still run: few rounds of the quick ones, the results in a file of their own."""

import csv
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import STEPS, run_all
from benchmarks.profiles import write_profiles

ROOT = Path(__file__).resolve().parents[2]
OFTEN = ["--set", "log.gradients_every_steps=4", "--set", "log.routing_every_steps=3"]
MODULES = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"bare_deepspeed"}))  # a script
def test_every_benchmark_can_be_imported(module: str) -> None:
    importlib.import_module(f"benchmarks.{module}")


@pytest.mark.parametrize(
    ("command", "rows"),
    [
        (["benchmarks.router", "--rounds", "1"], 18),
        pytest.param(["benchmarks.utilisation", "--rounds", "1"], 3, marks=pytest.mark.slow),
        pytest.param(
            ["benchmarks.trainer", "--rounds", "1", "--steps", "12", *OFTEN],
            3,
            marks=pytest.mark.slow,
        ),
        pytest.param(["benchmarks.resume", "--rounds", "1"], 8, marks=pytest.mark.slow),
        pytest.param(
            ["benchmarks.quality", "--seeds", "1", "--epochs", "3", "--cases", "all light"],
            1,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["benchmarks.saving", "--rounds", "1", "--set", "model.name=colt5_vit_test"],
            4,
            marks=pytest.mark.slow,
        ),
        pytest.param(["benchmarks.loader", "--rounds", "1"], 9, marks=pytest.mark.slow),
        pytest.param(["benchmarks.tokens", "--rounds", "1"], 20, marks=pytest.mark.slow),
        pytest.param(["benchmarks.block", "--rounds", "1"], 12, marks=pytest.mark.slow),
        pytest.param(
            ["benchmarks.checkpointing", "--model", "colt5_vit_test"], 4, marks=pytest.mark.slow
        ),
        pytest.param(
            ["benchmarks.drop_path", "--rounds", "1", "--depth", "2"], 6, marks=pytest.mark.slow
        ),
        pytest.param(
            ["benchmarks.capacity", "--rounds", "1", "--depth", "1", "--batch", "1"],
            6,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["benchmarks.train_step", "--rounds", "1", "--depth", "1"], 20, marks=pytest.mark.slow
        ),
    ],
)
def test_a_short_run_ends_in_rows_with_a_baseline(
    command: list[str], rows: int, tmp_path: Path
) -> None:
    file = tmp_path / "results.csv"
    environment = {**os.environ, "BENCHMARK_RESULTS": str(file), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    with file.open(newline="", encoding="utf-8") as lines:
        found = list(csv.DictReader(lines))
    assert len(found) == rows
    assert all(row["baseline"] and float(row["median"]) > 0 and row["hardware"] for row in found)


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < "2.15", reason="reaches into Inductor as it is there")
def test_compiled_for_a_gpu_a_block_moves_less_than_its_dense_twin_and_than_with_kernels() -> None:
    command = [sys.executable, "-m", "benchmarks.traffic", "--batch", "64"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    passes = [float(line.split(" passes")[0].split()[-1]) for line in done.stdout.splitlines()]
    dense, kernels, fused = (sum(passes[at : at + 2]) for at in (0, 2, 4))
    assert fused < 0.9 * dense
    assert fused < 0.8 * kernels


def test_the_gpu_run_names_what_failed_and_what_its_minutes_did_not_suffice_for() -> None:
    sleep = ("-c", "import time; time.sleep(60)")
    wrong = run_all([("-c", ""), ("-c", "raise SystemExit(3)"), sleep, ("-c", "")], seconds=3)
    assert [line.split(":")[0] for line in wrong] == [
        "exit status 3", "cut off, the time was over", "not begun, the time was over",
    ]  # fmt: skip


def test_the_gpu_run_knows_its_benchmarks() -> None:
    modules = {step[1].removeprefix("benchmarks.") for step in STEPS} - {"pytest"}
    assert modules <= set(MODULES)


def test_a_profile_names_the_operators_of_a_step(tmp_path: Path) -> None:
    write_profiles(
        tmp_path, "224 px,", {"product": lambda: torch.ones(64, 64).mm(torch.ones(64, 64))}
    )
    assert "aten::mm" in (tmp_path / "224_px_product.txt").read_text(encoding="utf-8")
