"""However a run ends, its folder says so and holds what the next start needs."""

from __future__ import annotations

import errno
import json
import os
import signal
from typing import Any

import pytest

from routedvit.training.checkpoints.commit import SaveError
from routedvit.training.checkpoints.run_state import RunState
from routedvit.training.distributed.signals import StopSignals
from tests.unit.training.fake_engine import FakeEngine
from tests.unit.training.trainers import Sink, trainer

pytestmark = pytest.mark.usefixtures("one_writer")


def test_curves_are_on_disk_up_to_every_checkpoint(tmp_path):
    """A run that is killed and resumed must not have a hole in them."""
    sink, checkpoints = Sink(), tmp_path / "checkpoints"
    written: list[set[int]] = []

    def flush() -> None:
        if not (checkpoints / "step_00000004").exists():
            written.append({step for name, step in sink.scalars if name == "train/loss"})

    sink.flush = flush
    trainer(tmp_path, FakeEngine(), sink, RunState(), log_every=1).fit()
    assert written[-1] == {1, 2, 3, 4}


def test_a_run_that_was_killed_does_not_look_stopped(tmp_path):
    class Killed(BaseException):
        pass

    engine, status = FakeEngine(), tmp_path / "status.json"
    trainer(tmp_path, engine, Sink(), RunState(), total_steps=4).fit()
    assert json.loads(status.read_text()) == {"status": "finished", "step": 4}
    run = trainer(tmp_path, engine, Sink(), RunState(step=4, samples_seen=16))

    def die(*args: Any, **kwargs: Any) -> Any:
        raise Killed

    engine.train_step = die
    with pytest.raises(Killed):
        run.fit()
    assert json.loads(status.read_text()) == {"status": "running", "step": 4}


def test_a_wish_to_stop_before_the_first_step_takes_none(tmp_path):
    engine = FakeEngine()
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)  # while a checkpoint is loaded, say
        state = RunState(step=2, samples_seen=8)
        summary = trainer(tmp_path, engine, Sink(), state, signals=signals).fit()
    assert not summary.finished
    assert engine.seen == []
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "stopped"


def test_a_full_disk_does_not_stop_the_run_but_the_last_save_must_succeed(tmp_path):
    engine, sink = FakeEngine(), Sink()
    engine.full_disks = 1
    summary = trainer(tmp_path, engine, sink, RunState(), total_steps=9).fit()
    assert summary.finished
    assert any("No space left" in text and "goes on" in text for text in sink.messages)
    assert sorted(path.name[-1] for path in tmp_path.glob("checkpoints/step_*")) == ["8", "9"]
    engine.full_disks = 9
    with pytest.raises(SaveError, match=r"No space left.*goes on from the beginning"):
        trainer(tmp_path / "other", engine, sink, RunState(), total_steps=2).fit()
    state = RunState(step=9, samples_seen=36)
    with pytest.raises(SaveError, match=r"No space left.*goes on from step_00000009"):
        trainer(tmp_path, engine, sink, state, total_steps=10).fit()


def test_a_disk_too_full_for_a_word_does_not_end_a_run_that_saved(tmp_path, monkeypatch):
    sink = Sink()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("routedvit.training.trainer.write_status", full)
    assert trainer(tmp_path, FakeEngine(), sink, RunState()).fit().finished
    assert any("status.json does not say 'finished'" in message for message in sink.messages)


def test_a_run_whose_weights_could_not_be_written_is_not_finished(tmp_path):
    status = tmp_path / "status.json"
    exported = []

    def fail() -> None:
        exported.append(json.loads(status.read_text())["status"])
        raise SaveError("no space left on device")

    with pytest.raises(SaveError):
        trainer(tmp_path, FakeEngine(), Sink(), RunState(), total_steps=4, export=fail).fit()
    assert exported == ["running"]
    assert json.loads(status.read_text())["status"] == "running"


def test_a_run_that_is_stopped_exports_nothing(tmp_path):
    exported: list[bool] = []
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        run = trainer(
            tmp_path, FakeEngine(), Sink(), RunState(step=2, samples_seen=8),
            signals=signals, export=lambda: exported.append(True),
        )  # fmt: skip
        assert not run.fit().finished
    assert not exported
