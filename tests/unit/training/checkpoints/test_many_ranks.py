"""What a checkpoint asks of a file system that many ranks use at once, or that cannot do all."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest

from routedvit.training.checkpoints import verification
from routedvit.training.checkpoints.checkpoint import Checkpoints
from routedvit.training.checkpoints.commit import files_of
from routedvit.training.checkpoints.manifest import Fingerprint, fingerprint, sync
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


class OtherRank(FakeEngine):
    """Rank 1 of two; rank 0 has found these files and no fault."""

    rank, world_size = 1, 2

    def __init__(self, files: dict[str, Fingerprint]) -> None:
        super().__init__()
        self.files = files

    def broadcast(self, value: Any) -> Any:
        return (None, None, self.files)


@pytest.mark.parametrize(("lookups", "fault"), [(3, None), (10**9, "weights is missing")])
def test_a_file_that_nfs_still_denies_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lookups: int, fault: str | None
) -> None:
    """A client caches that there was no such file, though rank 0, elsewhere, has seen it."""
    folder = tmp_path / "step_00000001"
    folder.mkdir()
    (folder / "weights").write_bytes(b"1")
    files = {name: fingerprint(folder / "weights") for name in ("of rank 0", "weights")}
    asked = 0

    def is_file(path: Path) -> bool:
        nonlocal asked
        asked += 1
        return asked > lookups

    monkeypatch.setattr(Path, "is_file", is_file)
    monkeypatch.setattr(verification, "SECONDS_TO_APPEAR", 0.1 if fault else 60)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert find_fault(OtherRank(files), folder) == fault


def test_only_rank_0_looks_whether_a_step_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else NFS would go on telling the others for a minute that it is not there."""

    class Done(Exception):
        pass

    class Rank1(FakeEngine):
        rank = 1

        def broadcast(self, value: Any) -> Any:
            raise Done

    monkeypatch.setattr(Path, "exists", lambda path: pytest.fail(f"looked for {path}"))
    with pytest.raises(Done):
        Checkpoints(tmp_path, Rank1(), keep=1).save(RunState(step=1, samples_seen=8))
