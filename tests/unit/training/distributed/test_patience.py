"""A rank that waits in vain is ended in words; what takes long by right is not.

Each case is a forked process whose "step" is a sleep, with bounds of a fraction of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from routedvit.training.distributed.patience import Patience, bound_of_a_wait
from routedvit.training.distributed.signals import REQUEUE_EXIT_CODE

Life = Callable[[Patience], None]
SURVIVED = 42


def lives(life: Life, folder: Path, *, rank: int = 0, **bounds: object) -> tuple[int | None, str]:
    """Exit code of a process that lives so, and what it told and logged."""

    def main() -> None:
        sys.stdout = sys.stderr = (folder / "log").open("w")
        told = (folder / "told").open("w")
        patience = Patience(
            rank, tell=lambda line: print(line, file=told, flush=True), poll_seconds=0.02,
            grace_seconds=0.1, **bounds,
        )  # fmt: skip
        with patience:
            life(patience)
        time.sleep(0.3)  # nothing may end it any more
        os._exit(SURVIVED)

    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    process.join(20)
    alive = process.is_alive()
    process.kill()
    assert not alive
    return process.exitcode, (folder / "told").read_text() + (folder / "log").read_text()


def blocks_in_its_fourth_step(patience: Patience) -> None:
    for step in range(1, 4):
        patience.stepped(step)
    time.sleep(60)


@pytest.mark.parametrize("rank", [0, 3])
def test_a_step_that_waits_in_vain_ends_the_process_in_words(tmp_path: Path, rank: int) -> None:
    code, told = lives(blocks_in_its_fourth_step, tmp_path, rank=rank, limit=0.3)
    assert code == 1
    assert told.startswith(f"rank {rank} on ")
    assert "since step 3 ended: another rank has died or hangs" in told
    assert "goes on from the newest checkpoint" in told
    assert "blocks_in_its_fourth_step" in told  # the stack


def first_step_compiles(patience: Patience) -> None:
    time.sleep(1)
    patience.stepped(1)


def saves_for_long(patience: Patience) -> None:
    patience.stepped(1)
    with patience.busy():
        with patience.busy():
            time.sleep(0.5)
        time.sleep(0.5)
    patience.stepped(2)


def takes_long_steps(patience: Patience) -> None:
    patience.stepped(1)
    time.sleep(0.75)
    patience.stepped(2)
    time.sleep(1.2)  # beyond the bound, but not beyond that and the step before
    patience.stepped(3)


@pytest.mark.parametrize(
    ("life", "limit"), [(first_step_compiles, 0.3), (saves_for_long, 0.3), (takes_long_steps, 0.9)]
)
def test_what_takes_long_by_right_is_let_be(tmp_path: Path, life: Life, limit: float) -> None:
    assert lives(life, tmp_path, limit=limit) == (SURVIVED, "")


def test_the_time_of_a_save_is_not_held_against_the_next_step(tmp_path: Path) -> None:
    def life(patience: Patience) -> None:
        saves_for_long(patience)
        time.sleep(60)

    began = time.monotonic()
    assert lives(life, tmp_path, limit=0.3)[0] == 1
    assert time.monotonic() - began < 10


def test_without_a_bound_a_step_may_wait_for_ever(tmp_path: Path) -> None:
    def life(patience: Patience) -> None:
        patience.stepped(1)
        time.sleep(0.6)

    assert lives(life, tmp_path) == (SURVIVED, "")


def test_a_wish_to_stop_ends_a_step_that_does_not(tmp_path: Path) -> None:
    code, told = lives(
        blocks_in_its_fourth_step, tmp_path, wish_seconds=0.3, stop_wanted=lambda: True
    )
    assert code == 1
    assert "since step 3 ended: it was asked to stop, but this step does not end" in told


def test_a_wish_before_the_first_step_has_ended_loses_nothing(tmp_path: Path) -> None:
    code, told = lives(
        lambda _: time.sleep(60), tmp_path, wish_seconds=0.3, stop_wanted=lambda: True
    )
    assert code == REQUEUE_EXIT_CODE
    assert told.startswith("stopped before the first step; the same command starts it")


def test_steps_that_end_and_the_save_after_them_outlive_a_wish(tmp_path: Path) -> None:
    def life(patience: Patience) -> None:
        for step in range(10):
            time.sleep(0.1)
            patience.stepped(step)
        with patience.busy():
            time.sleep(1)

    assert lives(life, tmp_path, wish_seconds=0.5, stop_wanted=lambda: True) == (SURVIVED, "")


def test_what_another_rank_fails_of_ends_this_one_even_in_a_save(tmp_path: Path) -> None:
    heard = SimpleNamespace(heard="rank 5 on node2 failed: OSError: no gcc")

    def life(patience: Patience) -> None:
        with patience.busy():
            time.sleep(60)

    code, told = lives(life, tmp_path, last_words=heard, fault_seconds=0.2)
    assert code == 1
    assert told.startswith("rank 5 on node2 failed: OSError: no gcc; its own output")


def test_a_rank_that_meets_the_same_error_ends_by_itself(tmp_path: Path) -> None:
    heard = SimpleNamespace(heard="rank 0 on node1 failed: ConfigError: too large")
    heard.close = lambda: None
    life = lambda patience: time.sleep(0.1)  # noqa: E731
    assert lives(life, tmp_path, last_words=heard, fault_seconds=0.5) == (SURVIVED, "")


def test_an_error_is_said_to_the_others() -> None:
    said: list[str] = []
    words = SimpleNamespace(heard=None, say=said.append, close=lambda: None)
    with pytest.raises(OSError, match="gcc"), Patience(3, last_words=words):  # type: ignore[arg-type]
        raise OSError("no gcc\nat all")
    [line] = said
    assert line.startswith("rank 3 on ")
    assert line.endswith(" failed: OSError: no gcc")
    with Patience(3, last_words=words):  # type: ignore[arg-type]
        pass
    assert len(said) == 1


def test_a_console_that_is_gone_does_not_keep_the_process(tmp_path: Path) -> None:
    def life(patience: Patience) -> None:
        sys.stderr.close()
        blocks_in_its_fourth_step(patience)

    assert lives(life, tmp_path, limit=0.3)[0] == 1


@pytest.mark.parametrize(("timeout", "bound"), [(600.0, 570.0), (60.0, 30.0), (10.0, 5.0)])
def test_words_come_before_the_watchdog_of_torch(timeout: float, bound: float) -> None:
    assert bound_of_a_wait(timeout) == bound
