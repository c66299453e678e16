"""Every way of being asked to stop becomes the same flag."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from routedvit.training.distributed.proc import parent_of
from routedvit.training.distributed.signals import REQUEUE_EXIT_CODE, StopSignals, launcher_chain

ROOT = Path(__file__).parents[4]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_a_wish_and_nothing_else(number):
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert not signals.wanted
        os.kill(os.getpid(), number)
        assert signals.wanted
    assert signal.getsignal(number) is before


def test_a_terminal_that_closes_means_nothing_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not signals.wanted
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_interrupt_interrupts():
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.wanted
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def wait_for_a_rank_that_never_comes(port: int, wish: Callable[[StopSignals], None]) -> None:
    """What a rank does at its start, in a process of its own."""
    with StopSignals() as signals:
        wish(signals)
        with signals.at_once(lambda line: None):
            dist.TCPStore("127.0.0.1", port, 2, is_master=True, timeout=timedelta(seconds=60))


def sent_while_it_waits(number: int) -> Callable[[StopSignals], None]:
    return lambda signals: threading.Timer(0.3, os.kill, [os.getpid(), number]).start()


def sent_before(signals: StopSignals) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def launcher_dies_while_it_waits(signals: StopSignals) -> None:
    gone = (os.getpid(), -1)
    threading.Timer(0.3, signals._launchers.append, [gone]).start()


@pytest.mark.parametrize(
    "wish",
    [
        sent_before,
        launcher_dies_while_it_waits,
        *map(sent_while_it_waits, [signal.SIGTERM, signal.SIGHUP, signal.SIGINT]),
    ],
)
def test_a_wish_ends_the_wait_for_other_ranks_at_once(wish):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    rank = context.Process(target=wait_for_a_rank_that_never_comes, args=(port, wish))
    rank.start()
    rank.join(5)
    alive = rank.is_alive()
    rank.kill()
    assert not alive
    assert rank.exitcode == REQUEUE_EXIT_CODE


def test_once_the_ranks_have_met_a_wish_is_a_wish_again():
    threads = threading.active_count()
    with StopSignals() as signals:
        with signals.at_once(lambda line: None):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.wanted
    assert threading.active_count() == threads  # and nothing is left that would end the process


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
from routedvit.training.distributed.signals import StopSignals
signals, report = StopSignals(), Path(sys.argv[1])
report.write_text("stop" if signals.wanted else "go")
for _ in range(6000):
    time.sleep(0.01)
    if signals.wanted:
        report.write_text("stop")
        break
"""
COMMAND = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"


def wait_for(report: Path, text: str, seconds: float = 60) -> bool:
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
