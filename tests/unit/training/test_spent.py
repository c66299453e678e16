"""Time and device-hours of a run are those of all its starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from routedvit.training.checkpoints.run_state import RunState, read_run_state
from routedvit.training.run_folder import RunFolder
from routedvit.training.spent import Spent
from routedvit.training.watch.report import closing, over_all_starts
from tests.unit.training.fake_engine import FakeEngine
from tests.unit.training.trainers import Sink, trainer

pytestmark = pytest.mark.usefixtures("one_writer")


def test_a_start_adds_to_what_earlier_ones_on_other_ranks_spent() -> None:
    earlier = {"starts": 2, "steps": 10, "seconds": 100.0, "device_seconds": 800.0}
    spent = Spent(earlier, ranks=4)
    first, second = spent.total(steps=1), spent.total(steps=3)
    assert (second["starts"], first["steps"], second["steps"]) == (3, 11, 13)
    assert 100 < first["seconds"] < second["seconds"]
    assert second["device_seconds"] - 800 == pytest.approx(4 * (second["seconds"] - 100))
    assert earlier["starts"] == 2


def test_a_checkpoint_keeps_what_was_spent_and_the_closing_words_tell_it(tmp_path: Path) -> None:
    run = trainer(tmp_path, FakeEngine(), Sink(), RunState(), total_steps=4)
    text = closing(run.fit(), RunFolder(tmp_path), batch_size=4)
    assert "over all starts" not in text
    state = read_run_state(run.checkpoints.path_of(4))
    assert (state.spent["starts"], state.spent["steps"]) == (1, 4)

    summary = trainer(tmp_path, FakeEngine(), Sink(), state, total_steps=6).fit()
    assert (summary.spent["starts"], summary.spent["steps"]) == (2, 6)
    assert summary.spent["seconds"] > state.spent["seconds"]
    assert "over all starts  2 starts, 0:00:0" in closing(summary, RunFolder(tmp_path), 4)


def test_a_return_to_a_checkpoint_gives_no_time_back(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.losses = dict.fromkeys((20, 24, 28), float("nan"))  # steps 6, 7 and 8; back to 4
    summary = trainer(tmp_path, engine, Sink(), RunState(), total_steps=9).fit()
    state = read_run_state(summary.checkpoint)
    assert state.spent["steps"] == 8 + 5
    assert state.spent["starts"] == 1


def test_device_hours_and_throughput_count_everything() -> None:
    spent = {"starts": 3, "steps": 900, "seconds": 3600.0, "device_seconds": 28800.0}
    assert over_all_starts(spent, batch_size=4096) == (
        "3 starts, 1:00:00, 8.0 device-hours, 1,024 images/s with all that is no step"
    )
