"""What a scheduler's repetition of a command does not do again."""

from __future__ import annotations

from pathlib import Path

import pytest

from routedvit.training.repeated import Wish, note, still_wanted
from routedvit.training.run_folder import RunFolder
from routedvit.training.trainer_settings import write_status

NOTHING = Wish(None, False)
STEP = Path("step_00000500")
BACK = Wish(STEP, False)
FRESH = Wish(None, True)
RESTART = {"SLURM_RESTART_COUNT": "1"}
ELASTIC = {"TORCHELASTIC_RESTART_COUNT": "1"}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """Of a run that was stopped after its first checkpoint."""
    (tmp_path / "checkpoints" / "step_00000600").mkdir(parents=True)
    write_status(tmp_path, "stopped", 600)
    return RunFolder(tmp_path)


@pytest.mark.parametrize("environment", [{}, RESTART, ELASTIC])
def test_going_back_is_done_once(folder: RunFolder, environment: dict[str, str]) -> None:
    assert still_wanted(BACK, folder, environment) == BACK
    note(BACK, folder, {})
    assert still_wanted(BACK, folder, environment) == NOTHING
    other = Wish(Path("step_00000400"), False)
    assert still_wanted(other, folder, environment) == other


def test_going_back_again_is_meant_after_another_start_or_the_end(folder: RunFolder) -> None:
    note(BACK, folder, {})
    note(NOTHING, folder, {})
    assert still_wanted(BACK, folder, {}) == BACK
    (folder.checkpoints / STEP).mkdir()
    for wish in (BACK, Wish(folder.checkpoints / STEP, False)):  # however it is spelt
        note(wish, folder, {})
        write_status(folder.path, "finished", 900)
        assert still_wanted(wish, folder, {}) == wish


def test_a_restart_after_the_last_step_does_not_go_back(folder: RunFolder) -> None:
    """As where the export failed."""
    (folder.checkpoints / STEP).mkdir()
    note(BACK, folder, {})
    write_status(folder.path, "finished", 900)
    assert still_wanted(BACK, folder, RESTART) == NOTHING
    assert still_wanted(BACK, folder, {}) == BACK
    other = Wish(Path("runs/old/checkpoints/step_00000500"), False)
    note(other, folder, {})
    assert still_wanted(other, folder, {}) == NOTHING  # it has checkpoints of its own


def test_another_runs_checkpoint_is_begun_from_until_there_is_an_own_one(tmp_path: Path) -> None:
    wish = Wish(Path("runs/old/checkpoints/step_00000500"), False)
    note(wish, RunFolder(tmp_path), {})
    assert still_wanted(wish, RunFolder(tmp_path), RESTART) == wish


def test_starting_over_is_done_once_for_a_scheduler_and_each_time_for_people(
    folder: RunFolder,
) -> None:
    job = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "0"}
    again = {**job, **RESTART}
    assert still_wanted(FRESH, folder, again) == FRESH
    note(FRESH, folder, job)
    assert still_wanted(FRESH, folder, job) == FRESH
    assert still_wanted(FRESH, folder, again) == NOTHING
    # another job, whose first start died before it could obey
    assert still_wanted(FRESH, folder, {**again, "SLURM_JOB_ID": "8"}) == FRESH


def test_a_note_that_cannot_be_read_counts_for_nothing(folder: RunFolder) -> None:
    (folder.path / "begun.json").write_text("{")
    assert still_wanted(BACK, folder, RESTART) == BACK


def test_a_wish_is_said_as_it_was_typed() -> None:
    assert BACK.words == "--resume step_00000500"
    assert Wish(Path("x"), True).words == "--fresh --resume x"
