"""When the loop saves in the background, when it waits, and what it loses by neither."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from routedvit.training.checkpoints.run_state import RunState
from routedvit.training.config.run import ConfigError
from tests.unit.training.fake_engine import FakeEngine
from tests.unit.training.trainers import Evaluator, Sink, trainer

pytestmark = pytest.mark.usefixtures("one_writer")


def checkpoints(folder: Path) -> list[int]:
    names = (folder / "checkpoints").glob("step_*")
    return sorted(int(path.name.removeprefix("step_")) for path in names)


class Watched(FakeEngine):
    """Notes what there is to see before each step; the disk is free from step `frees` on."""

    def __init__(self, folder: Path, frees: int) -> None:
        super().__init__()
        self.folder, self.frees = folder, frees
        self.there: dict[int, list[int]] = {}

    def train_step(self, *args: Any, **kwargs: Any) -> Any:
        step = self.value + 1
        self.there[step] = checkpoints(self.folder)
        result = super().train_step(*args, **kwargs)
        if step == 2:
            self.disk.clear()
        if step == self.frees:
            self.disk.set()
        return result


def background(folder: Path, engine: FakeEngine, sink: Sink, **changes: Any) -> Any:
    changes = {"checkpoint_every": 2, "save_in_background": True, "keep": 9} | changes
    return trainer(folder, engine, sink, RunState(), **changes)


def test_steps_go_on_while_it_is_written(tmp_path):
    engine = Watched(tmp_path, frees=5)
    run = background(tmp_path, engine, Sink(), total_steps=9, checkpoint_every=3)
    engine.disk.clear = lambda: None
    run.fit()
    assert checkpoints(tmp_path) == [3, 6, 9]


def test_it_is_seen_at_the_first_step_that_began_after_it_was_written(tmp_path):
    engine = Watched(tmp_path, frees=3)
    run = background(tmp_path, engine, Sink(), checkpoint_every=2, total_steps=4)
    thread_of, settled = run.checkpoints.pending, []
    settle = run.checkpoints.settle
    run.checkpoints.settle = lambda: (settled.append((engine.value, thread_of.writing)), settle())
    assert run.fit().finished
    assert engine.there[3] == []  # step 2 was taken and is being written
    # Not by a step that began while it was written; at the next, or by the last save.
    assert (3, True) not in settled
    assert checkpoints(tmp_path) == [2, 4]


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


def test_without_the_background_each_step_finds_the_one_before_saved(tmp_path):
    engine = Watched(tmp_path, frees=1)
    engine.disk.clear = lambda: None
    background(tmp_path, engine, Sink(), save_in_background=False).fit()
    assert engine.there[3] == [2]
    assert engine.there[5] == [2, 4]
