"""Loader processes outlive signals that the trainer answers, and never outlive the trainer."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.errors import DataError
from tests.unit.data.test_loaders import SIZES, train_loader

ROOT = Path(__file__).resolve().parents[3]

SCRIPT = """
import itertools, os, signal, sys
from data.config import DataConfig
from data.loaders import build_train_loader
config = DataConfig(train={"shards": sys.argv[1]}, num_workers=2, augment={"mode": "none"})
loader = build_train_loader(config, input_size=(1, 8, 8), mean=(0.5,), std=(0.5,),
    interpolation="bilinear", seed=0, global_batch_size=4, micro_batch_size=4, rank=0, world_size=1)
batches = loader.batches(0)
next(batches)
"""


def test_workers_go_on_after_sigterm_and_sigint(make_set, make_config):
    config = make_config(make_set(SIZES), num_workers=2)
    batches = train_loader(config).batches(0)
    next(batches), next(batches)  # of either worker: both have begun
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGTERM)
        os.kill(child.pid, signal.SIGINT)
    assert len(list(itertools.islice(batches, 20))) == 20
    batches.close()
    assert not multiprocessing.active_children()


def test_a_killed_worker_is_an_error_in_one_line(make_set, make_config):
    config = make_config(make_set(SIZES), num_workers=1, prefetch_factor=1)
    batches = train_loader(config).batches(0)
    next(batches)
    (child,) = multiprocessing.active_children()
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(DataError, match=r"DataLoader worker .*lower data\.num_workers") as error:
        list(itertools.islice(batches, 10_000))
    assert "\n" not in str(error.value)


def test_a_worker_killed_while_the_trainer_computes_is_the_same_error(make_set, make_config):
    """Torch's handler raises wherever the main process is, which is seldom in the loader."""
    config = make_config(make_set(SIZES), num_workers=1, prefetch_factor=1)
    batches = train_loader(config).batches(0)
    next(batches)
    (child,) = multiprocessing.active_children()

    def compute_while_it_dies() -> None:
        os.kill(child.pid, signal.SIGKILL)
        time.sleep(20)

    with pytest.raises(DataError, match=r"DataLoader worker .*lower data\.num_workers"):
        compute_while_it_dies()
    batches.close()


def test_a_mistake_in_a_loader_process_is_no_death_of_it(make_set, make_config):
    """What went wrong, and where, is the traceback; it comes again after every restart."""
    loader = train_loader(make_config(make_set(SIZES), num_workers=1))
    whole = loader.dataset.transform
    cut = lambda image: whole(image)[:, 1:]  # noqa: E731
    cut.levels = whole.levels
    loader.dataset.transform = cut
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*must match the existing size"):
        next(loader.batches(0))


def test_a_trainer_that_fails_in_mid_stream_ends_its_workers(make_set):
    folder = make_set(SIZES)
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT + "raise KeyError", str(folder)],
        cwd=ROOT,
        timeout=60,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr.decode()
    assert time.monotonic() - started < 40


def test_workers_notice_that_their_trainer_was_killed(make_set):
    """No orphan keeps memory: torch's watchdog sees the parent gone within its 5 s poll."""
    _expect_no_orphans(SCRIPT, make_set(SIZES))


def test_workers_with_batches_that_nobody_fetches_end_with_a_killed_trainer(make_set):
    """Their queue, a pipe of 64 KiB that the other workers hold open, stays full for ever."""
    until_it_is_full = """
import array, fcntl, termios, time
from data.workers import _LIVE
(queue,) = (batches._worker_result_queue for batches in _LIVE)
filled = array.array("i", [0])
while filled[0] < 50_000:
    time.sleep(0.05)
    fcntl.ioctl(queue._reader.fileno(), termios.FIONREAD, filled)
"""
    script = SCRIPT.replace("batch_size=4", "batch_size=2048") + until_it_is_full
    _expect_no_orphans(script, make_set(SIZES))


def _expect_no_orphans(script: str, folder: Path) -> None:
    script += """
import multiprocessing
print(*[child.pid for child in multiprocessing.active_children()], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    try:
        assert process.wait(timeout=60) == -signal.SIGKILL
        assert len(pids) == 2
        deadline = time.monotonic() + 20
        while any(_alive(pid) for pid in pids):
            assert time.monotonic() < deadline, "orphaned loader processes"
            time.sleep(0.2)
    finally:
        process.stdout.close()
        for pid in filter(_alive, pids):
            os.kill(pid, signal.SIGKILL)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_hanging_worker_is_an_error_and_not_a_hang(make_set, make_config, monkeypatch):
    monkeypatch.setattr("data.workers.PATIENCE", 1)
    monkeypatch.setattr(
        "torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.5
    )  # wait less at exit
    config = make_config(make_set(SIZES), num_workers=1, prefetch_factor=1)
    batches = train_loader(config).batches(0)
    next(batches)
    (child,) = multiprocessing.active_children()
    os.kill(child.pid, signal.SIGSTOP)
    with pytest.raises(DataError, match=r"timed out after 1 seconds; a loader process hangs"):
        list(itertools.islice(batches, 10))
    assert not multiprocessing.active_children()
