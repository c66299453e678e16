"""A checkpoint that is written beside the training is what it was when it was taken, and is seen
once it is whole.
"""

from __future__ import annotations

import gc
import os
import weakref

import pytest

from routedvit.training.checkpoints import commit, pending
from routedvit.training.checkpoints.checkpoint import Checkpoints
from routedvit.training.checkpoints.commit import SaveError
from routedvit.training.checkpoints.fence import OwnershipLost
from routedvit.training.checkpoints.ownership import take
from routedvit.training.checkpoints.retention import Retention
from routedvit.training.checkpoints.run_state import RunState
from tests.unit.training.checkpoints.saving import load
from tests.unit.training.fake_engine import FakeEngine

pytestmark = pytest.mark.usefixtures("one_writer")


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def checkpoints(engine, tmp_path, told) -> Checkpoints:
    return Checkpoints(tmp_path, engine, keep=2, tell=told.append)


def finish(checkpoints: Checkpoints) -> None:
    """The disk is free, and what was begun is written."""
    checkpoints.engine.disk.set()
    checkpoints.pending.let_it_end(20)
    assert not checkpoints.pending.writing


def begin(checkpoints: Checkpoints, step: int) -> RunState:
    """Save in the background on a disk that waits."""
    engine: FakeEngine = checkpoints.engine
    finish(checkpoints)
    engine.disk.clear()
    engine.value = step
    state = RunState(step=step, best={"val/top1": float(step)})
    checkpoints.save(state, in_background=True)
    return state


def test_it_is_as_it_was_taken_whatever_came_after(checkpoints, engine, tmp_path):
    state = begin(checkpoints, 1)
    engine.value = 99
    state.best["val/top1"], state.step = 99.0, 2
    engine.disk.set()
    checkpoints.settle()
    loaded, engine = load(tmp_path)
    assert (loaded.step, engine.value, loaded.best) == (1, 1, {"val/top1": 1.0})


def test_it_is_seen_once_it_is_settled(checkpoints, engine, tmp_path):
    begin(checkpoints, 1)
    assert checkpoints.pending
    assert checkpoints.pending.writing
    finish(checkpoints)
    assert not list(tmp_path.glob("step_*"))
    assert not (tmp_path / "latest").exists()
    checkpoints.settle()
    assert (tmp_path / "latest").read_text() == "step_00000001\n"
    assert not checkpoints.pending
    assert sorted(os.listdir(tmp_path)) == ["latest", "run_id", "step_00000001"]
    checkpoints.settle()  # there is nothing to do


@pytest.mark.parametrize("way", ["save", "save_again", "names", "wants", "add", "roll_back"])
def test_all_that_asks_for_checkpoints_settles_first(engine, tmp_path, way):
    retention = Retention(keep=2, keep_best=1)
    checkpoints = Checkpoints(tmp_path, engine, keep=retention)
    begin(checkpoints, 1)
    engine.disk.set()
    state = RunState(step=1, metrics={"val/top1": 1.0}, evaluated=["val"])
    {
        "save": lambda: checkpoints.save(RunState(step=2)),
        "save_again": lambda: checkpoints.save(RunState(step=1), in_background=True),
        "names": lambda: checkpoints.names(),
        "wants": lambda: checkpoints.wants(state),
        "add": lambda: checkpoints.add_evaluation(state),
        "roll_back": lambda: checkpoints.roll_back(before=2, resume_at=40),
    }[way]()
    assert checkpoints.path_of(1).is_dir()
    assert not checkpoints.pending
    assert (checkpoints.path_of(1) / "evaluation.json").exists() == (way == "add")


def test_retention_counts_it_once_it_is_seen(checkpoints, engine, tmp_path):
    for step in (1, 2, 3):
        begin(checkpoints, step)
        engine.disk.set()
    assert [path.name for path in sorted(tmp_path.glob("step_*"))] == [
        "step_00000001", "step_00000002",
    ]  # fmt: skip
    checkpoints.settle()
    assert [path.name for path in sorted(tmp_path.glob("step_*"))] == [
        "step_00000002", "step_00000003",
    ]  # fmt: skip


def test_a_full_disk_is_told_and_the_next_save_tries_again(checkpoints, engine, tmp_path, told):
    engine.full_disks = 1
    begin(checkpoints, 1)
    engine.disk.set()
    checkpoints.settle()
    (line,) = told
    assert "step_00000001 was not saved (rank 0: [Errno 28] No space left on device)" in line
    assert line.endswith("the run goes on and tries again at the next one")
    assert os.listdir(tmp_path) == ["run_id"]
    checkpoints.save(RunState(step=2), in_background=True)
    checkpoints.settle()
    assert load(tmp_path)[0].step == 2


def test_one_that_cannot_fit_is_refused_at_once(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(FakeEngine, "share_bytes", lambda self: 1 << 60)
    with pytest.raises(SaveError, match="GiB"):
        checkpoints.save(RunState(step=1), in_background=True)
    assert not checkpoints.pending
    assert not list(tmp_path.rglob("*step*"))


def test_an_error_that_is_not_the_disks_is_raised_where_it_settles(checkpoints, engine):
    begin(checkpoints, 1)
    del checkpoints.pending._commit._run_state  # which the thread has not come to
    engine.disk.set()
    with pytest.raises(AttributeError, match="_run_state"):
        checkpoints.settle()


def test_training_that_waits_for_a_slow_disk_is_told_so_once(
    checkpoints, engine, told, monkeypatch
):
    monkeypatch.setattr(pending, "WORTH_A_LINE", -1.0)
    for step in (1, 2, 3):
        begin(checkpoints, step)
        engine.disk.set()
    (line,) = told
    assert "waited 0 s for step_00000001" in line
    assert "checkpoint.every_steps" in line


def test_who_does_not_wait_hears_nothing_nor_who_had_to(checkpoints, engine, told, monkeypatch):
    for step in (1, 2):
        begin(checkpoints, step)
    monkeypatch.setattr(pending, "WORTH_A_LINE", -1.0)
    engine.disk.set()
    checkpoints.save(RunState(step=3))  # at a wish to stop: not for want of a faster disk
    assert told == []


def test_where_a_host_has_no_room_for_a_copy_all_wait_and_are_told_once(
    checkpoints, engine, tmp_path, told, monkeypatch
):
    asked = []
    monkeypatch.setattr(commit, "has_room_for", lambda size: asked.append(size))
    for step in (1, 2):
        engine.value = step
        checkpoints.save(RunState(step=step), in_background=True)
        assert not checkpoints.pending
        assert load(tmp_path)[0].step == step
    assert asked == [1000, 1000]
    (line,) = told
    assert "no room for a copy" in line
    assert "checkpoint.in_background" in line


@pytest.mark.parametrize("fails", [False, True])
def test_a_copy_goes_when_it_is_written_or_could_not_be(checkpoints, engine, fails):
    gc.disable()  # as while a run trains
    try:
        engine.full_disks = int(fails)
        begin(checkpoints, 1)
        held = weakref.ref(engine.taken)
        del engine.taken
        finish(checkpoints)
        assert held() is None
        there = weakref.ref(checkpoints.pending._commit)
        checkpoints.settle()
        assert there() is None
    finally:
        gc.enable()


def test_what_a_newer_start_has_overtaken_is_not_published(engine, tmp_path):
    older = Checkpoints(tmp_path / "checkpoints", engine, keep=2, owner=take(tmp_path))
    begin(older, 1)
    take(tmp_path)
    engine.disk.set()
    with pytest.raises(OwnershipLost):
        older.settle()
    assert not list((tmp_path / "checkpoints").glob("step_*"))


def test_what_a_start_that_died_was_writing_is_cleared_away(checkpoints, engine, tmp_path):
    begin(checkpoints, 1)
    dead = next(tmp_path.glob(".step_*.tmp"))
    next_start = FakeEngine()
    Checkpoints(tmp_path, next_start, keep=2, owner=take(tmp_path.parent)).save(RunState(step=1))
    assert not dead.exists()
    engine.disk.set()
    assert load(tmp_path)[0].step == 1
