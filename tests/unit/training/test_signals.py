"""Every way of being asked to stop becomes the same flag."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from routedvit.training.proc import parent_of
from routedvit.training.signals import StopSignals, launcher_chain

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_a_wish_and_nothing_else(number):
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert not signals.wanted
        os.kill(os.getpid(), number)
        assert signals.wanted
    assert signal.getsignal(number) is before


def test_a_second_interrupt_interrupts():
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.wanted
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_parents():
    assert parent_of(os.getpid()) == os.getppid()
    assert parent_of(2**22 + 1) is None


def test_without_a_launcher_nothing_is_watched():
    assert launcher_chain() == []


# A stand-in for the command a user types, the launcher of a node, and a rank.
NODE = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[2], sys.argv[3]])"
RANK = """
import sys, time
from pathlib import Path
from routedvit.training.signals import StopSignals
signals, report = StopSignals(), Path(sys.argv[1])
report.write_text("stop" if signals.wanted else "go")
for _ in range(1000):
    time.sleep(0.01)
    if signals.wanted:
        report.write_text("stop")
        break
"""
COMMAND = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"


def wait_for(report: Path, text: str, seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if report.exists() and report.read_text() == text:
            return True
        time.sleep(0.02)
    return False


def test_a_rank_notices_that_the_command_the_user_typed_is_gone(tmp_path):
    report = tmp_path / "report"
    command = [sys.executable, "-c", COMMAND, NODE, "deepspeed.launcher.launch", RANK, str(report)]
    typed = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert wait_for(report, "go")
    typed.kill()
    typed.wait()
    assert wait_for(report, "stop")
