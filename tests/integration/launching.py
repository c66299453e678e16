"""Starts scripts as a user does, through the real launchers, on CPU ranks."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent


def start(
    script: Path,
    *args: object,
    ranks: int = 2,
    quiet: bool = False,
    torchrun: bool = False,
    restarts: int = 0,
) -> subprocess.Popen[str]:
    """`deepspeed script args` in a process group of its own; stderr comes with stdout.

    `quiet` keeps the launcher's own lines away, as the Makefile does; `torchrun` takes that one.
    With `restarts` torchrun starts ranks that crash again, so many times.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    programs = Path(sys.executable).parent
    command = [programs / "deepspeed", "--num_accelerators", ranks, "--master_port", port]
    if quiet:
        command += ["--log_level", "critical"]
    if torchrun:
        command = [programs / "torchrun", "--nproc-per-node", ranks, "--master-port", port]
    if restarts:  # as launch/README.md says
        command = [programs / "torchrun", "--nproc-per-node", ranks, "--standalone"]
        command += ["--max-restarts", restarts]
    command += [script, *args]
    return _start(command)


def _start(command: Sequence[object]) -> subprocess.Popen[str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def launch(script: Path, *args: object, torchrun: bool = False, timeout: float = 150) -> str:
    """Run to the end and return what it printed; fails the test on a bad exit or a hang."""
    return _finish(start(script, *args, torchrun=torchrun), timeout)


def run_script(script: Path, *args: object, timeout: float = 300) -> str:
    """`python script args` likewise, for a script that forks its ranks itself."""
    return _finish(_start([sys.executable, script, *args]), timeout)


def _finish(process: subprocess.Popen[str], timeout: float) -> str:
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        end(process)
    assert process.returncode == 0, output
    return output


def end(process: subprocess.Popen[str]) -> None:
    """Kill what is left of the group: the launcher leaves its ranks behind when it dies."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
