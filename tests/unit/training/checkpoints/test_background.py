"""A call in a thread: its result, its error, and that the process may end without it."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from routedvit.training.checkpoints.background import Background

DYING = """
import sys, time
from routedvit.training.checkpoints import background
background.SECONDS_AT_EXIT = {patience}
def act():
    time.sleep({length})
    print("came to its end", flush=True)
background.Background(act, "save")
sys.exit(7)
"""


def test_its_result_is_waited_for():
    go = threading.Event()
    call = Background(lambda: go.wait(20), "save")
    assert call.running
    go.set()
    assert call.result() is True
    assert not call.running


def test_its_error_is_raised_where_the_result_is_asked_for():
    def fail() -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        Background(fail, "save").result()


@pytest.mark.parametrize(("length", "patience", "ends"), [(0.5, 20, True), (60, 0.2, False)])
def test_a_process_that_ends_gives_it_a_little_time(length, patience, ends):
    began = time.monotonic()
    code = DYING.format(length=length, patience=patience)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 7
    assert ("came to its end" in done.stdout) == ends
    assert time.monotonic() - began < 50
