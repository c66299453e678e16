"""launch/slurm.sbatch does what it says: two tasks train, a warning saves, the job is requeued.

`srun`, `scontrol` and `squeue` are stand-ins (fake_slurm/); bash, the script and train.py are real.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.launching import HERE, ROOT, end

SCRIPT = ROOT / "launch" / "slurm.sbatch"
STEPS = 40


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slurm")
    write = [sys.executable, "-m", "data.write", "--source", "mnist", "--out", folder]
    subprocess.run(write, cwd=ROOT, check=True, capture_output=True)
    run = json.loads((ROOT / "configs" / "quickstart.json").read_text())
    run["data"]["train"]["shards"] = str(folder / "train")
    del run["data"]["val"]
    run["output_dir"] = str(folder / "run")
    run["train"] = {"batch_size": 32, "steps": STEPS}
    run["model"]["kwargs"] |= {"depth": 2}
    run["schedule"]["warmup_epochs"] = 0
    run["log"]["every_steps"] = 1
    path = folder / "config.json"
    path.write_text(json.dumps(run))
    return path


def sbatch(config: Path, **settings: str) -> subprocess.Popen[str]:
    """The batch script as slurmd starts it on the first node."""
    environment = {
        "PATH": f"{HERE / 'fake_slurm'}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_TMPDIR": str(config.parent),
        "FAKE_SLURM_REQUEUED": str(config.parent / "requeued"),
    }
    return subprocess.Popen(
        ["bash", str(SCRIPT), str(config)],
        cwd=ROOT,
        env=os.environ | environment | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        printed, _ = process.communicate(timeout=120)
    finally:
        end(process)
    return process.returncode, printed


def requeued(config: Path) -> list[str]:
    note = config.parent / "requeued"
    return note.read_text().split() if note.exists() else []


def test_a_warned_job_saves_requeues_itself_and_goes_on(config: Path) -> None:
    process = sbatch(config)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step"):
            break
    process.send_signal(signal.SIGUSR1)  # to the batch shell, as --signal=B:USR1@300 does
    code, printed = finish(process)
    assert code == 75, printed
    assert "goes back into the queue" in printed
    assert requeued(config) == [str(os.getpid())]
    status = json.loads((config.parent / "run" / "status.json").read_text())
    assert status["status"] == "stopped"
    assert 0 < status["step"] < STEPS

    code, printed = finish(sbatch(config))
    assert code == 0, printed
    assert "2 x cpu" in printed
    assert f"finished: {STEPS} steps" in printed
    assert requeued(config) == [str(os.getpid())]


@pytest.mark.parametrize(
    ("exit_code", "state"), [(75, "COMPLETING"), (2, "RUNNING"), (1, "RUNNING"), (0, "RUNNING")]
)
def test_nothing_else_goes_back_into_the_queue(
    config: Path, tmp_path: Path, exit_code: int, state: str
) -> None:
    """A cancelled job, a mistake, a crash and a finished run end with their own code."""
    before = requeued(config)
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nexit {exit_code}\n")
    python.chmod(0o755)
    code, _ = finish(sbatch(config, PYTHON=str(python), FAKE_SLURM_STATE=state))
    assert code == exit_code
    assert requeued(config) == before
