"""A rank that fails alone under NCCL is gone at once; whoever ends with the others disconnects.

Each case is a process of its own, in which NCCL is a name and a `destroy_process_group` that waits
for peers that never come.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]

STAND_IN = """
import atexit, logging, os, sys, time
from pathlib import Path
import torch.distributed as dist
from routedvit.training.distributed.parting import leave
from routedvit.training.watch.console import Console

def destroy():
    print("disconnecting", file=REAL, flush=True)
    time.sleep(0 if sys.argv[2] == "together" else 60)

class Mistake(ValueError):
    pass

REAL = os.fdopen(os.dup(1), "w")
dist.is_initialized = lambda: True
dist.get_backend = lambda: sys.argv[1]
atexit.register(destroy)
"""


def end(body: str, backend: str, peers: str, cwd: Path) -> tuple[int, str, str, float]:
    """Exit code, stdout, stderr and the seconds from the error to the end of the process."""
    code = STAND_IN + "BEGAN = time.time()\n" + textwrap.dedent(body)
    process = subprocess.run(
        [sys.executable, "-c", code, backend, peers],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=50,
    )
    seconds = time.time() - float((cwd / "began").read_text())
    return process.returncode, process.stdout, process.stderr, seconds


RAISES = """
with Console(0, user_errors=(Mistake,), leave=leave) as console:
    console.log_to(Path("log"))
    print("chatter that is not flushed", end="")
    Path("began").write_text(str(time.time()))
    raise {error}
"""


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        ("RuntimeError('one rank broke')", 1, "crashed: RuntimeError: one rank broke"),
        ("Mistake('no such file')", 2, "error: no such file"),
        ("KeyboardInterrupt", 130, ""),
    ],
)
def test_an_error_of_one_rank_does_not_wait_for_the_others_under_nccl(
    tmp_path: Path, error: str, code: int, told: str
) -> None:
    result = end(RAISES.format(error=error), "nccl", "alone", tmp_path)
    assert result[0] == code
    assert "disconnecting" not in result[1]
    assert told in result[2]
    assert result[3] < 10
    log = (tmp_path / "log").read_text()
    assert "chatter that is not flushed" in log


@pytest.mark.parametrize("code", [0, 75])
def test_ranks_that_end_together_disconnect_under_nccl(tmp_path: Path, code: int) -> None:
    body = f"""
    Path("began").write_text(str(time.time()))
    with Console(0, leave=leave):
        leave({code})
    """
    result = end(body, "nccl", "together", tmp_path)
    assert (result[0], result[1]) == (code, "disconnecting\n")


def test_gloo_disconnects_after_an_error_too(tmp_path: Path) -> None:
    result = end(RAISES.format(error="Mistake('x')"), "gloo", "together", tmp_path)
    assert (result[0], result[1]) == (2, "disconnecting\n")


WRITES = """
import threading, torch
from safetensors.torch import save_file
from routedvit.training.background import Background

def write():
    while True:
        save_file({"weight": torch.zeros(1 << 20)}, "weights.safetensors")

for _ in range(3):
    Background(write, "save")
time.sleep(0.5)
"""


def test_a_thread_that_still_writes_does_not_change_the_exit_code(tmp_path: Path) -> None:
    """Cut off by the interpreter's end, it would abort the process."""
    for _ in range(3):
        code, _, told, seconds = end(
            WRITES + RAISES.format(error="Mistake('no such file')"), "gloo", "together", tmp_path
        )
        assert code == 2
        assert "no such file" in told
        assert seconds < 10
