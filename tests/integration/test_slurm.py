"""launch/slurm.sbatch on a real Slurm of two machines: it trains, and survives what Slurm does.

Slow: a dozen starts of two ranks, and Slurm looks at time limits only now and then.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.launching import ROOT, launch
from tests.integration.short_run import short_run
from tests.integration.slurm_cluster import Cluster, slurm_cluster, what_is_missing

MISSING = what_is_missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]

SIZE = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"]
ENVIRONMENT = os.environ | {
    "PYTHON": sys.executable,
    "DS_ACCELERATOR": "cpu",
    "DEEPSPEED_TIMEOUT": "1",
}
STEPS = 200


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the config, the run folders and the logs are."""
    folder = tmp_path_factory.mktemp("jobs")
    run = short_run(folder, STEPS)
    run["model"]["kwargs"] |= {"proj_drop_rate": 0.1}
    run["checkpoint"]["every_steps"] = 5
    (folder / "config.json").write_text(json.dumps(run))
    return folder


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> bytes:
    """Weights of the same run on one machine without Slurm."""
    run = folder / "undisturbed"
    launch(ROOT / "train.py", "--config", folder / "config.json", "--set", f"output_dir={run}")
    return weights(run)


def weights(run: Path) -> bytes:
    return (run / "weights" / "model.safetensors").read_bytes()


class Job:
    """launch/slurm.sbatch, submitted, with a run folder and a log of its own."""

    def __init__(
        self, cluster: Cluster, folder: Path, name: str, *options: str, setting: str | None = None
    ) -> None:
        self.cluster = cluster
        self.run = folder / name
        self.log = folder / f"{name}.log"
        script = ["launch/slurm.sbatch", folder / "config.json", "--set", f"output_dir={self.run}"]
        script += ["--set", setting] if setting else []
        command = [*SIZE, *options, f"--output={self.log}", *script]
        self.number = cluster.sbatch(command, cwd=ROOT, env=ENVIRONMENT)

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """The job has printed this."""
        deadline = time.monotonic() + seconds
        while text not in self.printed():
            assert time.monotonic() < deadline, self.printed()
            time.sleep(0.1)

    def wait_for_the_queue(self, seconds: float = 90) -> None:
        """It is back in the queue; what Slurm makes a job wait there, two minutes, is left out."""
        deadline = time.monotonic() + seconds
        while self.cluster.restarts(self.number) == 0:
            assert time.monotonic() < deadline, self.printed()
            time.sleep(0.2)
        self.cluster.wait_for(self.number, "PENDING", seconds=seconds)
        # What started it before is revoked, by the second: in the same one Slurm ends it at once.
        time.sleep(3)
        while self.cluster.state(self.number) == "PENDING":
            assert time.monotonic() < deadline, self.printed()
            self.cluster.hurry(self.number)
            time.sleep(0.5)

    def finish(self) -> None:
        state = self.cluster.wait_for(self.number, "COMPLETED", "FAILED", "TIMEOUT", seconds=200)
        assert state == "COMPLETED", self.printed()
        assert self.cluster.exit_code(self.number) == 0

    def printed(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def ranks(self) -> list[int]:
        """Processes of train.py on all machines, seen from outside, the launching ones first."""
        needle = (
            f"train.py\0--config\0{self.run.parent / 'config.json'}\0--set\0output_dir={self.run}"
        )
        lines = {path: _read(path) for path in Path("/proc").glob("[0-9]*/cmdline")}
        found = [path for path, line in lines.items() if needle in line and "srun" not in line]
        return sorted(int(path.parent.name) for path in found)


def _read(path: Path) -> str:
    """Empty where the process has just ended."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def test_two_machines_train_what_one_trains(
    cluster: Cluster, folder: Path, undisturbed: bytes
) -> None:
    job = Job(cluster, folder, "whole")
    job.finish()
    assert "2 x cpu" in job.printed()
    assert weights(job.run) == undisturbed


def test_a_job_at_its_time_limit_saves_and_goes_on(cluster: Cluster, folder: Path) -> None:
    """Slurm's own warning, as `#SBATCH --signal` asks for it; it looks every half minute."""
    limit = ["--time=2", "--signal=B:USR1@70"]
    job = Job(cluster, folder, "limit", *limit, setting="train.steps=100000")
    job.wait_for_the_queue(seconds=150)
    assert "stopped; job" in job.printed()
    step = json.loads((job.run / "status.json").read_text())["step"]
    cluster.run("scontrol", "update", f"jobid={job.number}", "timelimit=60")
    job.wait_for(f"{step} of them done")
    job.wait_for(f"\nstep {step + 1:6}/")
    cluster.run("scancel", job.number)
    cluster.wait_for(job.number, "CANCELLED")


def test_a_preempted_job_makes_room_and_goes_on(
    cluster: Cluster, folder: Path, undisturbed: bytes
) -> None:
    job = Job(cluster, folder, "preempted")
    job.wait_for("\nstep  20/")
    urgent = [*SIZE, "--exclusive", "--partition=urgent", "--output=/dev/null", "--wrap=sleep 2"]
    number = cluster.sbatch(urgent, cwd=ROOT)
    cluster.wait_for(number, "COMPLETED")
    assert "stopped at step" in job.printed()
    job.wait_for_the_queue()
    job.finish()
    assert weights(job.run) == undisturbed


def test_a_job_whose_machine_fails_goes_on(
    cluster: Cluster, folder: Path, undisturbed: bytes
) -> None:
    job = Job(cluster, folder, "failed_machine")
    job.wait_for("\nstep  20/")
    cluster.run("scontrol", "update", "nodename=node2", "state=DOWN", "reason=test")
    job.wait_for_the_queue()
    job.finish()
    assert weights(job.run) == undisturbed


def test_a_job_that_lost_a_rank_goes_on(cluster: Cluster, folder: Path, undisturbed: bytes) -> None:
    """A rank that is killed, for its memory say, ends the others; the job had saved before."""
    job = Job(cluster, folder, "lost_rank")
    job.wait_for("\nstep  20/")
    os.kill(max(job.ranks()), signal.SIGKILL)
    job.wait_for_the_queue()
    assert "after it had saved; job" in job.printed()
    job.finish()
    assert weights(job.run) == undisturbed


def test_a_cancelled_job_saves_and_stays_cancelled(cluster: Cluster, folder: Path) -> None:
    job = Job(cluster, folder, "cancelled")
    job.wait_for("\nstep  20/")
    cluster.run("scancel", job.number)
    cluster.wait_for(job.number, "CANCELLED", "COMPLETED", "FAILED", "PENDING")
    status = json.loads((job.run / "status.json").read_text())
    assert status["status"] == "stopped"
    assert (job.run / "checkpoints" / f"step_{status['step']:08d}").is_dir()
    assert cluster.state(job.number) == "CANCELLED"


def test_a_mistake_is_not_tried_again(cluster: Cluster, folder: Path) -> None:
    job = Job(cluster, folder, "mistake", setting="optim.lrr=1")
    cluster.wait_for(job.number, "FAILED", "COMPLETED", "CANCELLED")
    assert cluster.exit_code(job.number) == 2
    assert "goes back into the queue" not in job.printed()
