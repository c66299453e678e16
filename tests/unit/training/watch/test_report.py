"""The closing words say what this start did, and of a run that had ended that it had."""

from __future__ import annotations

from pathlib import Path

import pytest

from routedvit.training.checkpoints.run_state import RunState
from routedvit.training.run_folder import RunFolder
from routedvit.training.watch.report import closing
from tests.unit.training.fake_engine import FakeEngine
from tests.unit.training.trainers import Sink, trainer

pytestmark = pytest.mark.usefixtures("one_writer")


@pytest.mark.parametrize(
    ("left", "title", "timed", "measured"),
    [
        (0, "already finished (--fresh starts over): 6 steps", False, False),
        (1, "finished: 6 steps", True, False),  # the first step of a start measures no speed
        (2, "finished: 6 steps", True, True),
    ],
)
def test_a_start_that_trained_is_not_told_to_have_found_the_run_finished(
    left: int, title: str, timed: bool, measured: bool, tmp_path: Path
) -> None:
    state = RunState(step=6 - left, samples_seen=4 * (6 - left))
    text = closing(trainer(tmp_path, FakeEngine(), Sink(), state).fit(), RunFolder(tmp_path), 4)
    assert text.splitlines()[1] == title
    assert (" time " in text) == timed
    assert ("images/s" in text) == measured
