"""What started a run learns that it saved, from a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from routedvit.training.checkpoints import commit
from routedvit.training.checkpoints.checkpoint import Checkpoints
from routedvit.training.checkpoints.commit import SaveError
from routedvit.training.checkpoints.run_state import RunState
from tests.unit.training.fake_engine import FakeEngine


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    path = tmp_path / "progress"
    monkeypatch.setenv("ROUTEDVIT_PROGRESS", str(path))
    monkeypatch.setattr(commit, "writer_of", lambda path: 0)
    return path


def save(folder: Path) -> None:
    Checkpoints(folder, FakeEngine(), keep=1).save(RunState(step=1, samples_seen=8))


def test_the_file_is_there_after_a_checkpoint_only(
    mark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as full:
        full.setattr(commit, "_free_bytes", lambda folder: 0)
        with pytest.raises(SaveError):
            save(tmp_path / "checkpoints")
    assert not mark.exists()
    save(tmp_path / "checkpoints")
    assert mark.exists()


def test_a_checkpoint_stands_where_the_file_cannot_be_written(
    mark: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ROUTEDVIT_PROGRESS", str(mark / "under" / "nothing"))
    save(tmp_path / "checkpoints")
    assert "ROUTEDVIT_PROGRESS=" in capsys.readouterr().out
    assert (tmp_path / "checkpoints" / "step_00000001").is_dir()
