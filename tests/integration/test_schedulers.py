"""Under Slurm and Kubernetes two processes train, a warning saves, and the exit code restarts them.

Slurm's `srun`, `scontrol` and `squeue` are stand-ins (fake_slurm/), and the pods are processes with
a pod's environment; bash, launch/slurm.sbatch, the pod's command line and train.py are real.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.integration.launching import HERE, ROOT, end
from tests.integration.short_run import short_run

SCRIPT = ROOT / "launch" / "slurm.sbatch"
STEPS = 40


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slurm")
    path = folder / "config.json"
    path.write_text(json.dumps(short_run(folder, STEPS)))
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
    run = f"output_dir={config.parent / 'slurm'}"
    return popen(["bash", SCRIPT, config, "--set", run], environment | settings)


def pod(config: Path, index: int, port: int) -> subprocess.Popen[str]:
    """What kubelet runs in pod `index` of launch/kubernetes/train.yaml, on a machine of one CPU."""
    documents = yaml.safe_load_all((ROOT / "launch" / "kubernetes" / "train.yaml").read_text())
    job = next(document for document in documents if document["kind"] == "Job")
    [container] = job["spec"]["template"]["spec"]["containers"]
    environment = {entry["name"]: entry.get("value", str(index)) for entry in container["env"]}
    environment |= {
        "GPUS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "TRITON_CACHE_DIR": str(config.parent / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(config.parent / "inductor"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
    }
    command = container["command"]
    assert command[-1] == "configs/vit_b.json"
    run = f"output_dir={config.parent / 'pods'}"
    return popen([*command[:-1], config, "--set", run], environment)


def popen(command: list[object], environment: dict[str, str]) -> subprocess.Popen[str]:
    """Started in the checkout, in a process group of its own."""
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_a_step(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    printed = []
    for line in process.stdout:
        printed.append(line)
        if line.startswith("step"):
            return
    raise AssertionError("".join(printed))


def wait_for_the_tasks(started: Path) -> None:
    deadline = time.monotonic() + 60
    while not started.exists():
        assert time.monotonic() < deadline, "srun has started no tasks"
        time.sleep(0.01)


def stopped_at(run: Path) -> int:
    """Step of a run that was stopped and saved."""
    status = json.loads((run / "status.json").read_text())
    assert status["status"] == "stopped"
    assert (run / "checkpoints" / f"step_{status['step']:08d}").is_dir()
    return int(status["step"])


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        printed, _ = process.communicate(timeout=120)
    finally:
        end(process)
    return process.returncode, printed


def requeued(config: Path) -> list[str]:
    note = config.parent / "requeued"
    return note.read_text().split() if note.exists() else []


def test_a_job_warned_before_python_listens_goes_back_into_the_queue(config: Path) -> None:
    before = requeued(config)
    started = config.parent / "started"
    process = sbatch(config, FAKE_SLURM_STARTED=str(started))
    wait_for_the_tasks(started)  # which begin to import torch
    process.send_signal(signal.SIGUSR1)
    code, printed = finish(process)
    assert code == 75, printed
    assert requeued(config) == [*before, str(os.getpid())]
    (config.parent / "requeued").unlink()


def test_a_warned_job_saves_requeues_itself_and_goes_on(config: Path) -> None:
    process = sbatch(config)
    wait_for_a_step(process)
    process.send_signal(signal.SIGUSR1)  # to the batch shell, as --signal=B:USR1@300 does
    code, printed = finish(process)
    assert code == 75, printed
    assert "goes back into the queue" in printed
    assert requeued(config) == [str(os.getpid())]
    assert 0 < stopped_at(config.parent / "slurm") < STEPS

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


def test_a_task_of_an_array_goes_back_alone(config: Path, tmp_path: Path) -> None:
    """Also the one that Slurm gives the number of the array."""
    before, job = requeued(config), str(os.getpid())
    code, _ = finish(
        sbatch(config, PYTHON=stopped(tmp_path), SLURM_ARRAY_JOB_ID=job, SLURM_ARRAY_TASK_ID="3")
    )
    assert code == 75
    assert requeued(config) == [*before, f"{job}_3"]
    (config.parent / "requeued").unlink()


def test_a_queue_that_takes_nothing_back_hides_no_exit_code(config: Path, tmp_path: Path) -> None:
    settings = {"PYTHON": stopped(tmp_path), "FAKE_SLURM_NO_REQUEUE": "1"}
    code, printed = finish(sbatch(config, **settings))
    assert code == 75
    assert "submit it again" in printed


def stopped(folder: Path) -> str:
    """A Python whose run was stopped and saved."""
    python = folder / "python"
    python.write_text("#!/bin/sh\nexit 75\n")
    python.chmod(0o755)
    return str(python)


@pytest.mark.parametrize(
    ("saved", "state"), [(True, "RUNNING"), (False, "RUNNING"), (True, "COMPLETING")]
)
def test_a_crash_is_tried_again_where_the_job_got_further(
    config: Path, tmp_path: Path, saved: bool, state: str
) -> None:
    before = requeued(config)
    python = tmp_path / "python"
    touch = 'touch "$ROUTEDVIT_PROGRESS"\n' if saved else ""
    python.write_text(f"#!/bin/sh\n{touch}exit 134\n")
    python.chmod(0o755)
    code, printed = finish(sbatch(config, PYTHON=str(python), FAKE_SLURM_STATE=state))
    assert code == 134
    again = saved and state == "RUNNING"
    assert requeued(config) == [*before, *([str(os.getpid())] if again else [])]
    assert ("crashed (134) after it had saved" in printed) == again
    (config.parent / "requeued").unlink(missing_ok=True)


def test_a_pod_that_is_evicted_stops_all_of_them_with_a_checkpoint(config: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    first, second = (pod(config, index, port) for index in (0, 1))
    try:
        wait_for_a_step(first)
        second.terminate()  # kubelet's SIGTERM, to the first process of the pod
    finally:
        ends = [finish(process) for process in (first, second)]
    assert [code for code, _ in ends] == [75, 75], ends
    assert 0 < stopped_at(config.parent / "pods") < STEPS


def test_a_task_has_the_cores_that_the_configs_were_planned_on() -> None:
    """With fewer than a core for each loader process the GPU waits for images."""
    [line] = [x for x in SCRIPT.read_text().splitlines() if x.startswith("#SBATCH --cpus-per-task")]
    cores = int(line.partition("=")[2])
    for path in (ROOT / "configs").glob("*.json"):
        run = json.loads(path.read_text())
        planned = re.match(r"(\d+) x .*, (\d+) CPU cores", run.get("about", {}).get("hardware", ""))
        if planned:
            assert cores == int(planned[2]) // int(planned[1]), path
            assert cores > run["data"]["num_workers"], path
