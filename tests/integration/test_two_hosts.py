"""Two machines train what one machine trains, and survive each other's death.

The machines are namespaces of this one (two_hosts.py). Slow: about ten launches of some 15 s.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.integration.launching import ROOT, launch
from tests.integration.short_run import short_run
from tests.integration.two_hosts import Host, two_hosts, what_is_missing

MISSING = what_is_missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]

BIN = Path(sys.executable).parent
TRAIN = ROOT / "train.py"
STEPS = 30
CPU = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "DEEPSPEED_TIMEOUT": "1"}
ENVIRONMENT = {key: os.environ[key] for key in ("PATH", "HOME")} | CPU | {"PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """Where the commands are typed: the quickstart on a short leash, a hostfile, settings."""
    folder: Path = tmp_path_factory.mktemp("hosts")
    run = short_run(folder, STEPS)
    run["data"]["val"] = {"shards": str(folder / "shards" / "val")}
    run["model"]["kwargs"] |= {"proj_drop_rate": 0.1}
    run["schedule"]["warmup_epochs"] = 0.01
    run["checkpoint"]["every_steps"] = 5
    (folder / "config.json").write_text(json.dumps(run))
    (folder / "hostfile").write_text("node1 slots=1\nnode2 slots=1\n")
    shipped = (ROOT / "launch" / "deepspeed_env").read_text()
    ours = "".join(f"{key}={value}\n" for key, value in CPU.items())
    (folder / ".deepspeed_env").write_text(shipped + ours)
    return folder


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: Any) -> Iterator[tuple[Host, Host]]:
    """Both are alive when the tests begin; those that kill one start their own."""
    with two_hosts(tmp_path_factory.mktemp("net")) as pair:
        yield pair


@pytest.fixture(scope="module")
def one_host(folder: Path) -> Path:
    """The run of two ranks on one machine."""
    launch(TRAIN, *arguments(folder, "one_host"))
    return folder / "one_host"


def arguments(folder: Path, name: str) -> list[object]:
    """Of train.py."""
    return ["--config", folder / "config.json", "--set", f"output_dir={folder / name}"]


def over_ssh(folder: Path, name: str) -> list[object]:
    """What a user types on one machine."""
    launcher = [BIN / "deepspeed", "--hostfile", folder / "hostfile", "--log_level", "critical"]
    return [*launcher, TRAIN, *arguments(folder, name)]


def without_ssh(folder: Path, name: str, rank: int) -> list[object]:
    """What a user types on machine `rank`."""
    launcher = [BIN / "deepspeed", "--hostfile", folder / "hostfile", "--log_level", "critical"]
    launcher += ["--no_ssh", "--node_rank", str(rank), "--master_addr", "node1"]
    return [*launcher, TRAIN, *arguments(folder, name)]


def with_torchrun(folder: Path, name: str, rank: int) -> list[object]:
    launcher = [BIN / "torchrun", "--nnodes", "2", "--node-rank", str(rank)]
    launcher += ["--master-addr", "node1", "--nproc-per-node", "1"]
    return [*launcher, TRAIN, *arguments(folder, name)]


def run_on(
    hosts: tuple[Host, ...], commands: list[list[object]], folder: Path
) -> list[tuple[int, str]]:
    """Exit code and output of one command a host, all at once."""
    processes = [
        host.start(command, cwd=folder, env=ENVIRONMENT)
        for host, command in zip(hosts, commands, strict=True)
    ]
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    return [(p.returncode, output) for p, output in zip(processes, outputs, strict=True)]


def losses(run: Path) -> list[float]:
    """Every step's loss, as TensorBoard has it."""
    events = EventAccumulator(str(run)).Reload().Scalars("train/loss")
    assert [event.step for event in events] == list(range(1, STEPS + 1))
    return [event.value for event in events]


def assert_same_run(run: Path, reference: Path) -> None:
    """To the last bit: with two ranks a sum has one order, wherever they are."""
    assert losses(run) == losses(reference)
    weights = [(path / "weights" / "model.safetensors").read_bytes() for path in (run, reference)]
    assert weights[0] == weights[1]


def test_over_ssh(hosts: tuple[Host, Host], folder: Path, one_host: Path) -> None:
    [(code, printed)] = run_on(hosts[:1], [over_ssh(folder, "ssh")], folder)
    assert code == 0, printed
    assert "2 x cpu" in printed
    assert_same_run(folder / "ssh", one_host)


@pytest.mark.parametrize("command", [without_ssh, with_torchrun])
def test_one_command_a_machine(
    hosts: tuple[Host, Host], folder: Path, one_host: Path, command: Any
) -> None:
    name = command.__name__
    for code, printed in run_on(hosts, [command(folder, name, rank) for rank in (0, 1)], folder):
        assert code == 0, printed
    assert_same_run(folder / name, one_host)


def test_settings_reach_the_other_machine(hosts: tuple[Host, Host], folder: Path) -> None:
    """The shipped settings pass DeepSpeed's parser and the remote shell."""
    script = folder / "show.py"
    script.write_text("import os, socket\nprint(socket.gethostname(), os.environ)")
    command = [BIN / "deepspeed", "--hostfile", folder / "hostfile", script]
    [(code, printed)] = run_on(hosts[:1], [command], folder)
    assert code == 0, printed
    seen = [line for line in printed.splitlines() if "environ({" in line]
    assert sorted(line.split(":")[0] for line in seen) == ["node1", "node2"]
    for line in seen:
        assert "'TRITON_CACHE_DIR': '/tmp/routedvit-root/triton'" in line
        assert "'NCCL_DEBUG': 'WARN'" in line


def test_machines_with_another_config_are_told(hosts: tuple[Host, Host], folder: Path) -> None:
    commands = [without_ssh(folder, "differ", rank) for rank in (0, 1)]
    commands[1] += ["--set", "optim.lr=0.5"]
    (code, printed), (other, _) = run_on(hosts, commands, folder)
    assert code == 2, printed
    assert "rank 1 on node2 has config.optim.lr = 0.5, rank 0 on node1 has 0.003" in printed
    assert "Traceback" not in printed
    assert other != 0
    assert not (folder / "differ").exists()


def test_a_run_folder_that_is_not_shared_is_named(hosts: tuple[Host, Host], folder: Path) -> None:
    run = folder / "private"
    run.mkdir()
    hosts[1].run(["mount", "-t", "tmpfs", "tmpfs", run])
    commands = [without_ssh(folder, "private", rank) for rank in (0, 1)]
    (code, printed), (other, _) = run_on(hosts, commands, folder)
    assert code == 2, printed
    assert f"rank 1 on node2 does not see the files of rank 0 in {run}" in printed
    assert other != 0


@pytest.mark.parametrize(("death", "seconds"), [("kill", 30), ("cut_power", 90)])
def test_a_host_dies_and_the_same_command_goes_on(
    folder: Path, one_host: Path, tmp_path: Path, death: str, seconds: float
) -> None:
    """Without a last word from the dead host, the others give up after DEEPSPEED_TIMEOUT."""
    with two_hosts(tmp_path / "before") as (first, second):
        process = first.start(over_ssh(folder, death), cwd=folder, env=ENVIRONMENT)
        read_until(process, f"step 12/{STEPS}")
        getattr(second, death)()
        died = time.monotonic()
        words = read_until(process, "crashed: ")
        assert time.monotonic() - died < seconds
        assert "lost contact with another rank" in words
        assert "the same command goes on from the newest checkpoint" in words
        process.communicate(timeout=90)
        assert process.returncode != 0
    with two_hosts(tmp_path / "after") as pair:
        [(code, printed)] = run_on(pair[:1], [over_ssh(folder, death)], folder)
    assert code == 0, printed
    assert f"step 11/{STEPS}" in printed
    assert f"step 10/{STEPS}" not in printed
    weights = [path / "weights" / "model.safetensors" for path in (folder / death, one_host)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """The first line of its output that has `text`."""
    assert process.stdout is not None
    printed = []
    for line in process.stdout:
        printed.append(line)
        if text in line:
            return line
    raise AssertionError("".join(printed))
