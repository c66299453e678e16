"""What a checkpoint asks of a file system that many ranks use at once, or that cannot do all."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from routedvit.training.checkpoints.checkpoint import Checkpoints
from routedvit.training.checkpoints.commit import files_of
from routedvit.training.checkpoints.manifest import sync
from routedvit.training.checkpoints.run_state import RunState
from routedvit.training.checkpoints.verification import find_fault
from tests.unit.training.fake_engine import FakeEngine


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that the file system was asked about, one by one."""
    names: list[str] = []
    is_file = Path.is_file

    def noting(path: Path) -> bool:
        names.append(path.name)
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", noting)
    return names


def test_a_rank_looks_at_its_own_files_only(tmp_path: Path, looked_at: list[str]) -> None:
    (tmp_path / "shards").mkdir()
    for rank in (0, 1, 10):
        (tmp_path / "shards" / f"rank_{rank:05d}.json").touch()
        (tmp_path / "shards" / f"rank_{rank:05d}_00.safetensors").touch()
    (tmp_path / "shards" / ".rank_00001.part").touch()
    (tmp_path / "shards" / "replicated.safetensors").touch()
    (tmp_path / "run_state.json").touch()
    for rank in (1, 10):
        names = [f"rank_{rank:05d}.json", f"rank_{rank:05d}_00.safetensors"]
        assert [path.name for path in files_of(rank, tmp_path)] == names
        assert sorted(looked_at) == names
        looked_at.clear()
    own = ["rank_00000.json", "rank_00000_00.safetensors", "replicated.safetensors"]
    assert [path.name for path in files_of(0, tmp_path)] == ["run_state.json", *own]
    assert not any(name.startswith("rank_00001") for name in looked_at)


class Second(FakeEngine):
    """Rank 1 of two, which hears what rank 0 would say."""

    rank, world_size = 1, 2

    def __init__(self, said: Any) -> None:
        super().__init__()
        self.said = said

    def broadcast(self, value: Any) -> Any:
        return self.said


def test_one_rank_lists_a_checkpoint_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looked_at: list[str]
) -> None:
    monkeypatch.setattr("routedvit.training.checkpoints.commit.writer_of", lambda path: 0)
    engine, said = FakeEngine(), []
    folder = Checkpoints(tmp_path, engine, keep=1).save(RunState(step=1))  # type: ignore[arg-type]
    monkeypatch.setattr(engine, "broadcast", lambda value: said.append(value) or value)
    assert find_fault(engine, folder) is None  # type: ignore[arg-type]
    looked_at.clear()
    second = Second(said[0])
    assert find_fault(second, folder) is None  # type: ignore[arg-type]
    files = said[0][2]
    assert sorted(looked_at) == sorted(Path(name).name for name in list(files)[1::2])  # its share
    (folder / list(files)[1]).write_text("damaged")
    assert "instead of" in str(find_fault(second, folder))  # type: ignore[arg-type]
    second.said = ("manifest.json: it is of step 7", None, {})
    assert find_fault(second, folder) == "manifest.json: it is of step 7"  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_folder_is_synced_where_the_file_system_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    (tmp_path / "file").touch()

    def refuse(descriptor: int) -> None:
        raise OSError(number, "refused")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="refused"):
        sync(tmp_path / "file")
    if number == errno.EIO:
        with pytest.raises(OSError, match="refused"):
            sync(tmp_path)
    else:
        sync(tmp_path)
