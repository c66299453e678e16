"""The newest start owns the run folder; one beside a living process of this machine is refused."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from routedvit.training.checkpoints.checkpoint import Checkpoints
from routedvit.training.checkpoints.fence import OwnershipLost
from routedvit.training.checkpoints.ownership import (
    OWNER,
    Owner,
    lost_to,
    read_owner,
    refuse_beside_the_living,
    take,
)
from routedvit.training.checkpoints.retention import Retention
from routedvit.training.checkpoints.run_state import RunState
from routedvit.training.config.run import ConfigError
from routedvit.training.distributed.proc import birth_of, boot_id
from routedvit.training.run_folder import RunFolder, open_folder
from tests.unit.training.fake_engine import FakeEngine


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def neighbour() -> Iterator[Owner]:
    """Another process of this machine that lives until the test kills it."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = Owner.this_process().model_copy(
        update={"pid": process.pid, "birth": birth_of(process.pid)}
    )
    yield owner
    process.kill()
    process.wait()


def write(folder: Path, owner: Owner) -> None:
    (folder / OWNER).write_text(owner.model_dump_json())


def test_the_newest_start_owns_the_folder(tmp_path):
    older = take(tmp_path)
    assert lost_to(tmp_path, older) is None
    newer = take(tmp_path)
    assert lost_to(tmp_path, newer) is None
    text = lost_to(tmp_path, older)
    assert f"process {os.getpid()} on {newer.host}, since {newer.since}" in text
    assert "start again" in text


def test_a_folder_that_was_moved_away_is_nobodys(tmp_path):
    owner = take(tmp_path)
    (tmp_path / OWNER).unlink()
    assert "moved" in lost_to(tmp_path, owner)
    (tmp_path / OWNER).write_text("{")
    assert "damaged" in lost_to(tmp_path, owner)


def test_a_disk_that_fails_for_a_moment_takes_nothing_away(tmp_path, monkeypatch):
    owner = take(tmp_path)

    def fail(path: Path) -> bytes:
        raise OSError("Stale file handle")

    monkeypatch.setattr(Path, "read_bytes", fail)
    assert lost_to(tmp_path, owner) is None


def test_a_start_beside_a_living_one_is_refused_and_changes_nothing(tmp_path, neighbour):
    folder = RunFolder(tmp_path / "run")
    open_folder(folder, {"seed": 0}, fresh=False, free=())
    write(folder.path, neighbour)
    before = contents(tmp_path)
    for fresh in (False, True):
        with pytest.raises(ConfigError, match=rf"in use .*kill {neighbour.pid}"):
            open_folder(folder, {"seed": 1}, fresh=fresh, free=())
    assert contents(tmp_path) == before


def test_a_start_beside_a_dead_one_is_not(tmp_path, neighbour):
    write(tmp_path, neighbour)
    os.kill(neighbour.pid, signal.SIGKILL)
    os.waitid(os.P_PID, neighbour.pid, os.WEXITED | os.WNOWAIT)  # still listed, as a zombie
    refuse_beside_the_living(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"birth": "1"},  # its pid is another process's now
        {"boot": "another", "host": "elsewhere"},  # nothing is known about other machines
        {"boot": "", "birth": None},  # written where there is no /proc
    ],
)
def test_only_a_process_that_surely_lives_is_in_the_way(tmp_path, neighbour, change):
    write(tmp_path, neighbour.model_copy(update=change))
    refuse_beside_the_living(tmp_path)
    assert neighbour.boot == boot_id() != ""


def test_a_process_may_start_again_in_its_own_folder(tmp_path):
    take(tmp_path)
    refuse_beside_the_living(tmp_path)


def test_opening_a_folder_takes_it(tmp_path):
    folder = RunFolder(tmp_path / "run")
    _, first = open_folder(folder, {}, fresh=False, free=())
    assert read_owner(folder.path) == first
    _, second = open_folder(folder, {}, fresh=True, free=())
    assert read_owner(folder.path) == second
    assert second.id != first.id


class Steps:
    """A start of a run: its checkpoints, with the newest one."""

    def __init__(self, folder: Path, keep: Retention | int = 3) -> None:
        self.engine = FakeEngine()
        self.checkpoints = Checkpoints(
            folder / "checkpoints", self.engine, keep=keep, owner=take(folder), tell=lambda _: None
        )

    def save(self, step: int) -> None:
        self.engine.value = step
        self.checkpoints.save(RunState(step=step, samples_seen=4 * step))


@pytest.fixture(autouse=True)
def _one_writer(monkeypatch):
    monkeypatch.setattr("routedvit.training.checkpoints.commit.writer_of", lambda path: 0)


def test_an_older_start_changes_nothing_of_a_newer_one(tmp_path):
    older = Steps(tmp_path, keep=1)
    older.save(1)
    newer = Steps(tmp_path, keep=Retention(keep=3))
    newer.save(2)
    newer.save(3)
    before = contents(tmp_path)
    checkpoints = older.checkpoints
    for write in (
        lambda: older.save(4),
        lambda: older.save(3),  # also where nothing is left to write
        lambda: checkpoints.add_evaluation(RunState(step=3, evaluated=["val"])),
        lambda: checkpoints.roll_back(before=3, resume_at=40),
        lambda: checkpoints.load_named(Path("step_00000001")),
    ):
        with pytest.raises(OwnershipLost, match="another start of this run"):
            write()
    (tmp_path / "checkpoints" / "step_00000003" / "run_state.json").write_text("damaged")
    before |= {"checkpoints/step_00000003/run_state.json": b"damaged"}
    with pytest.raises(OwnershipLost):
        checkpoints.load_newest()
    assert contents(tmp_path) == before
    newer.save(4)


def test_a_start_that_is_overtaken_while_it_writes_publishes_nothing(tmp_path, monkeypatch):
    older = Steps(tmp_path)
    older.save(1)
    write = FakeEngine.save_state

    def overtaken(engine: FakeEngine, folder: Path) -> None:
        write(engine, folder)
        if engine is older.engine:
            newer = Steps(tmp_path)
            assert newer.checkpoints.load_newest().step == 1
            newer.save(2)

    monkeypatch.setattr(FakeEngine, "save_state", overtaken)
    older.engine.value = 99
    # The newer one has cleared the half-written folder away, which is not the disk's fault.
    with pytest.raises(OwnershipLost):
        older.checkpoints.save(RunState(step=2))
    engine = FakeEngine()
    folder = tmp_path / "checkpoints"
    assert Checkpoints(folder, engine, keep=3).load_newest().step == 2
    assert engine.value == 2
    assert (folder / "latest").read_text() == "step_00000002\n"
    assert not list(folder.glob(".*"))


def test_a_start_that_is_overtaken_before_the_rename_publishes_nothing(tmp_path, monkeypatch):
    older = Steps(tmp_path)
    write = FakeEngine.save_state

    def overtaken(engine: FakeEngine, folder: Path) -> None:
        write(engine, folder)
        take(tmp_path)

    monkeypatch.setattr(FakeEngine, "save_state", overtaken)
    with pytest.raises(OwnershipLost):
        older.save(1)
    assert not list((tmp_path / "checkpoints").glob("step_*"))
    assert not (tmp_path / "checkpoints" / "latest").exists()


def test_a_start_that_is_overtaken_while_it_goes_back_deletes_nothing(tmp_path, monkeypatch):
    older = Steps(tmp_path)
    for step in (1, 2):
        older.save(step)
    load = FakeEngine.load_state

    def overtaken(engine: FakeEngine, folder: Path) -> None:
        load(engine, folder)
        take(tmp_path)

    monkeypatch.setattr(FakeEngine, "load_state", overtaken)
    with pytest.raises(OwnershipLost):
        older.checkpoints.roll_back(before=2, resume_at=40)
    assert (tmp_path / "checkpoints" / "step_00000002").exists()
    assert older.checkpoints.rollbacks() == []


def test_two_starts_never_write_into_one_temporary_folder(tmp_path, monkeypatch):
    write, seen = FakeEngine.save_state, []

    def watched(engine: FakeEngine, folder: Path) -> None:
        seen.append(folder.name)
        write(engine, folder)

    monkeypatch.setattr(FakeEngine, "save_state", watched)
    for _ in range(2):
        Steps(tmp_path).save(1)
        shutil.rmtree(tmp_path / "checkpoints" / "step_00000001")
    assert len(set(seen)) == 2
