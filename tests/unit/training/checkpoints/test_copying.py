"""What a start does about the copy of its run when the store fails it."""

from __future__ import annotations

from pathlib import Path

import pytest

from routedvit.training.checkpoints.checkpoint import Checkpoints
from routedvit.training.checkpoints.copying import RunCopy
from routedvit.training.checkpoints.fetching import CopyUnreachable
from routedvit.training.checkpoints.ownership import Owner
from routedvit.training.checkpoints.retention import Retention
from routedvit.training.checkpoints.run_state import RunState
from routedvit.training.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("world", "one_writer")


@pytest.fixture
def dead(tmp_path: Path) -> str:
    """A place that lists as empty and takes nothing: a file stands in its way."""
    (tmp_path / "full").write_text("")
    return str(tmp_path / "full" / "runs")


def test_a_new_run_does_not_begin_without_the_copy_that_it_wants(tmp_path: Path, dead: str) -> None:
    copy = RunCopy(dead, RunFolder(tmp_path / "run"), print)
    with pytest.raises(CopyUnreachable, match=r"checkpoint\.mirror: .*owner\.json cannot be wri"):
        copy.begin(Owner.this_process(), Retention())


def test_a_run_with_checkpoints_goes_on_without_it(engine, tmp_path: Path, dead: str) -> None:
    folder, told = RunFolder(tmp_path / "run"), []
    Checkpoints(folder.checkpoints, engine, keep=1).save(RunState(step=3))
    copy = RunCopy(dead, folder, told.append)
    copy.fetch()
    copy.check(fresh=False, resumes=False)
    assert copy.begin(Owner.this_process(), Retention()) is not None
    assert "owner.json cannot be written" in told[0]
    assert told[0].endswith("the run goes on, and the next save tries again")


def test_nothing_is_asked_of_a_run_without_a_copy(tmp_path: Path) -> None:
    copy = RunCopy(None, RunFolder(tmp_path / "run"), print)
    copy.fetch()
    copy.check(fresh=True, resumes=False)
    assert copy.begin(Owner.this_process(), Retention()) is None
