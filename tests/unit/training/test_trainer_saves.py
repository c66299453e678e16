"""When the loop saves in the background, when it waits, and what it loses by neither."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from routedvit.training.checkpoints.bucket import Bucket
from routedvit.training.checkpoints.mirror import Mirror, complete
from routedvit.training.checkpoints.publishing import publish_written
from routedvit.training.checkpoints.run_state import RunState
from routedvit.training.config.run import ConfigError
from routedvit.training.distributed.patience import Patience
from tests.unit.training.fake_engine import FakeEngine
from tests.unit.training.trainers import Evaluator, Sink, trainer

pytestmark = pytest.mark.usefixtures("one_writer")


def checkpoints(folder: Path) -> list[int]:
    names = (folder / "checkpoints").glob("step_*")
    return sorted(int(path.name.removeprefix("step_")) for path in names)


class Watched(FakeEngine):
    """Notes what there is to see before each step; the disk stands still over some of them."""

    def __init__(self, folder: Path, *, stands: int = 2, frees: int) -> None:
        super().__init__()
        self.folder, self.stands, self.frees = folder, stands, frees
        self.there: dict[int, list[int]] = {}
        self.pending: Any = None

    def train_step(self, *args: Any, **kwargs: Any) -> Any:
        step = self.value + 1
        self.there[step] = checkpoints(self.folder)
        result = super().train_step(*args, **kwargs)
        if step == self.stands:
            self.disk.clear()
        if step == self.frees:
            self.disk.set()
        if step == self.frees + 1 and self.pending is not None:
            self.pending.let_it_end(20)
        return result


def background(folder: Path, engine: FakeEngine, sink: Sink, **changes: Any) -> Any:
    changes = {"checkpoint_every": 2, "save_in_background": True, "keep": 9} | changes
    return trainer(folder, engine, sink, RunState(), **changes)


def test_steps_go_on_while_it_is_written_and_it_is_seen_when_it_is(tmp_path):
    engine = Watched(tmp_path, stands=4, frees=5)
    run = background(tmp_path, engine, Sink(), checkpoint_every=4, total_steps=9)
    engine.pending = run.checkpoints.pending
    assert run.fit().finished
    assert engine.there[6] == []  # taken after step 4, and the disk stands still in step 5
    assert engine.there[8] == [4]  # step 7 began after it was written
    assert checkpoints(tmp_path) == [4, 8, 9]


def test_what_may_wait_is_marked_as_such(tmp_path):
    watch, busy = Patience(), []
    run = background(tmp_path, Watched(tmp_path, frees=3), Sink(), patience=watch)
    settle = run.checkpoints.pending.settle
    run.checkpoints.pending.settle = lambda: (busy.append(watch._busy > 0), settle())
    run.fit()
    assert len(busy) > 1
    assert all(busy)


def test_a_run_that_crashes_lets_it_end_and_the_next_start_counts_it(tmp_path):
    class Crashes(FakeEngine):
        def train_step(self, *args: Any, **kwargs: Any) -> Any:
            if self.value == 2:
                threading.Timer(0.2, self.disk.set).start()
                raise RuntimeError("out of memory")
            result = super().train_step(*args, **kwargs)
            if self.value == 2:
                self.disk.clear()
            return result

    with pytest.raises(RuntimeError, match="out of memory"):
        background(tmp_path, Crashes(), Sink()).fit()
    assert checkpoints(tmp_path) == []
    assert publish_written(tmp_path / "checkpoints") == ["step_00000002"]
    assert checkpoints(tmp_path) == [2]


def test_a_disk_that_stands_still_does_not_keep_a_run_that_crashes(tmp_path, monkeypatch):
    class Crashes(FakeEngine):
        def train_step(self, *args: Any, **kwargs: Any) -> Any:
            if self.value == 2:
                raise RuntimeError("out of memory")
            result = super().train_step(*args, **kwargs)
            self.disk.clear()
            return result

    monkeypatch.setattr("routedvit.training.trainer.SECONDS_TO_END", 0.1)
    engine, began = Crashes(), time.monotonic()
    with pytest.raises(RuntimeError, match="out of memory"):
        background(tmp_path, engine, Sink()).fit()
    assert time.monotonic() - began < 10
    engine.disk.set()


def test_what_may_crash_finds_its_step_saved(tmp_path):
    """An evaluation that crashes costs nothing, as without the background."""
    engine = FakeEngine()
    run = background(tmp_path, engine, Sink(), evaluators=[Evaluator([], every_steps=2)])
    with pytest.raises(RuntimeError, match="out of memory"):
        run.fit()
    assert checkpoints(tmp_path) == [2]


def test_an_evaluation_settles_what_an_earlier_step_left(tmp_path):
    run = background(tmp_path, FakeEngine(), Sink(), evaluators=[Evaluator([], every_steps=3)])
    with pytest.raises(RuntimeError, match="out of memory"):
        run.fit()
    assert checkpoints(tmp_path) == [2]


def test_a_wish_to_stop_waits_for_both(tmp_path):
    class Stopped(Watched):
        def train_step(self, *args: Any, **kwargs: Any) -> Any:
            result = super().train_step(*args, **kwargs)
            return result._replace(stop=self.value == 3)

    engine = Stopped(tmp_path, frees=3)
    summary = background(tmp_path, engine, Sink()).fit()
    assert not summary.finished
    assert checkpoints(tmp_path) == [2, 3]


def test_a_stop_at_a_step_that_is_due_saves_it_once_and_waits(tmp_path):
    class Stopped(FakeEngine):
        def train_step(self, *args: Any, **kwargs: Any) -> Any:
            result = super().train_step(*args, **kwargs)
            return result._replace(stop=self.value == 2)

    background(tmp_path, Stopped(), Sink()).fit()
    assert checkpoints(tmp_path) == [2]


def test_a_run_goes_back_to_one_that_was_still_being_written(tmp_path):
    engine = Watched(tmp_path, frees=5)
    engine.losses = {8: float("nan"), 12: float("nan"), 16: float("nan")}  # steps 3 to 5
    sink = Sink()
    assert background(tmp_path, engine, sink, total_steps=7).fit().finished
    assert any(message.startswith("back to step 2") for message in sink.messages)


def test_a_run_that_gives_up_leaves_it(tmp_path):
    engine = Watched(tmp_path, frees=5)
    engine.losses = {8: float("nan"), 12: float("nan"), 16: float("nan")}
    guard = {"max_bad_steps": 3, "max_rollbacks": 0}
    with pytest.raises(ConfigError, match="gone back 0 times"):
        background(tmp_path, engine, Sink(), guard=guard).fit()
    assert checkpoints(tmp_path) == [2]


def test_a_full_disk_costs_a_warning_and_the_run_goes_on(tmp_path):
    engine, sink = FakeEngine(), Sink()
    engine.full_disks = 1
    assert background(tmp_path, engine, sink).fit().finished
    assert checkpoints(tmp_path) == [4, 6]
    assert any("the run goes on and tries again" in message for message in sink.messages)


def test_a_run_that_ends_leaves_nothing_half_deleted(tmp_path, monkeypatch):
    remove = shutil.rmtree

    def slow(path: Path, ignore_errors: bool = False) -> None:
        time.sleep(0.2)
        remove(path, ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", slow)
    background(tmp_path, FakeEngine(), Sink(), keep=1).fit()
    assert checkpoints(tmp_path) == [6]
    assert not [*(tmp_path / "checkpoints").glob(".*")]


def test_without_the_background_each_step_finds_the_one_before_saved(tmp_path):
    engine = Watched(tmp_path, frees=1)
    engine.disk.clear = lambda: None
    background(tmp_path, engine, Sink(), save_in_background=False).fit()
    assert engine.there[3] == [2]
    assert engine.there[5] == [2, 4]


def test_the_run_has_ended_when_its_copy_is_like_its_folder(tmp_path):
    run = background(tmp_path / "run", FakeEngine(), Sink(), total_steps=5)
    bucket = Bucket(str(tmp_path / "copy"))
    run.checkpoints.mirror = Mirror(
        tmp_path / "run", bucket, retention=run.checkpoints.retention, owner="a"
    )
    assert run.fit().finished
    assert complete(bucket.names()) == ["step_00000002", "step_00000004", "step_00000005"]
    assert (tmp_path / "copy" / "status.json").read_text() == '{"status": "finished", "step": 5}\n'
