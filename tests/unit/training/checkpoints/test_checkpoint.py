"""A checkpoint is complete or invisible, and nothing damaged is ever loaded."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
from pathlib import Path

import pytest

from routedvit.training.checkpoints import shelf, verification
from routedvit.training.checkpoints.checkpoint import Checkpoints
from routedvit.training.checkpoints.commit import SaveError
from routedvit.training.checkpoints.manifest import read_manifest
from routedvit.training.checkpoints.retention import Retention
from routedvit.training.checkpoints.run_state import RunState, read_run_state
from routedvit.training.config.run import ConfigError
from tests.unit.training.checkpoints.saving import STATE, Killed, die, flip_a_bit, load, save
from tests.unit.training.fake_engine import FakeEngine

pytestmark = pytest.mark.usefixtures("one_writer")


def test_what_is_saved_comes_back(engine, tmp_path):
    state = RunState(
        step=3, samples_seen=24, best={"val/top1": 7.5}, config={"a": [1]}, data="9 shards"
    )
    engine.value = 3
    Checkpoints(tmp_path / "new" / "folder", engine, keep=1).save(state)
    loaded, engine = load(tmp_path / "new" / "folder")
    assert loaded.best == {"val/top1": 7.5}
    assert (loaded.step, loaded.samples_seen, loaded.config) == (3, 24, {"a": [1]})
    assert loaded.data == "9 shards"
    assert (loaded.world_size, loaded.zero_stage) == (1, 2)
    assert engine.value == 3


def test_a_run_state_from_before_a_field_was_added_still_loads(tmp_path):
    state = dataclasses.asdict(RunState(step=3))
    del state["data"]
    (tmp_path / "run_state.json").write_text(json.dumps(state))
    assert read_run_state(tmp_path) == RunState(step=3)


def test_an_empty_folder_has_none(tmp_path):
    assert load(tmp_path / "missing")[0] is None


def test_the_manifest_covers_every_file(engine, tmp_path):
    folder = save(engine, tmp_path, 1)
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert set(read_manifest(folder)) == files - {"manifest.json"}
    assert (tmp_path / "latest").read_text() == "step_00000001\n"


def test_the_oldest_go(engine, tmp_path):
    for step in (1, 2, 3, 4):
        save(engine, tmp_path, step, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["latest", "run_id", "step_00000003", "step_00000004"]


def test_a_step_saved_twice_is_written_once(engine, tmp_path):
    folder = save(engine, tmp_path, 1)
    before = folder.stat().st_mtime_ns
    save(engine, tmp_path, 1)
    assert folder.stat().st_mtime_ns == before


def cut_the_end(folder: Path) -> None:
    (folder / STATE).write_bytes((folder / STATE).read_bytes()[:-1])


def lose_a_file(folder: Path) -> None:
    (folder / STATE).unlink()


def add_a_file(folder: Path) -> None:
    (folder / "shards" / "rank_00002.json").write_text("{}")


def lose_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def garble_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"format"')


def empty_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("[]")


def swap_in_another_step(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("step_00000001"), folder)


def swap_in_another_run(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(save(FakeEngine(), folder.parent / "other", 2), folder)


def alter_the_run_state(folder: Path) -> None:
    state = json.loads((folder / "run_state.json").read_text())
    (folder / "run_state.json").write_text(json.dumps(state | {"step": 7}))


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (flip_a_bit, "SHA-256"),
        (cut_the_end, "bytes instead of"),
        (lose_a_file, "is missing"),
        (add_a_file, "is not listed"),
        (lose_the_manifest, "manifest.json"),
        (garble_the_manifest, "manifest.json"),
        (empty_the_manifest, "manifest.json"),
        (swap_in_another_step, "of step 1"),
        (swap_in_another_run, "of another run"),
        (alter_the_run_state, "run_state.json"),
    ],
)
def test_a_damaged_newest_is_named_and_the_one_before_is_used(engine, tmp_path, damage, word):
    save(engine, tmp_path, 1)
    damage(save(engine, tmp_path, 2))
    told: list[str] = []
    state, engine = load(tmp_path, told)
    assert state.step == 1
    assert engine.value == 1
    assert len(told) == 1
    assert "step_00000002" in told[0]
    assert word in told[0]
    assert (tmp_path / "latest").read_text() == "step_00000001\n"
    # The damaged one is out of the way, so the run can reach and save that step again.
    save(engine, tmp_path, 2)
    assert load(tmp_path)[0].step == 2


def test_all_damaged_is_an_error_and_not_a_silent_fresh_start(engine, tmp_path):
    flip_a_bit(save(engine, tmp_path, 1))
    for _ in range(2):  # a second start must not find an empty folder
        with pytest.raises(ConfigError, match="--fresh"):
            load(tmp_path)


@pytest.mark.parametrize("name", ["read_manifest", "first_fault"])
def test_a_disk_that_cannot_be_read_is_no_damage(engine, tmp_path, monkeypatch, name):
    for step in (1, 2):
        save(engine, tmp_path, step)

    def fail(*args: object) -> None:
        raise OSError("Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(verification, name, fail)
        with pytest.raises(ConfigError, match=r"Stale file handle.*see to the disk"):
            load(tmp_path)
    assert load(tmp_path)[0].step == 2


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(engine, tmp_path, monkeypatch):
    save(engine, tmp_path, 1)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)  # as root, the test may list anything
        with pytest.raises(ConfigError, match=r"Permission denied.*rights"):
            load(tmp_path)
        with pytest.raises(SaveError, match="Permission denied"):
            save(engine, tmp_path, 2)
    assert load(tmp_path)[0].step == 1


def test_a_full_disk_is_named_with_the_need_and_the_mend_and_nothing_is_left(engine, tmp_path):
    save(engine, tmp_path, 1)
    engine.full_disks = 1
    with pytest.raises(SaveError) as caught:
        save(engine, tmp_path, 2)
    text = str(caught.value)
    assert "step_00000002" in text
    assert "No space left on device" in text
    assert "MiB are free" in text or "GiB are free" in text
    assert str(tmp_path) in text
    assert "checkpoint.keep" in text
    assert sorted(os.listdir(tmp_path)) == ["latest", "run_id", "step_00000001"]
    save(engine, tmp_path, 2)
    assert load(tmp_path)[0].step == 2


def test_a_save_that_cannot_fit_is_not_begun(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(FakeEngine, "share_bytes", lambda self: 1 << 60)
    with pytest.raises(SaveError, match="GiB"):
        save(engine, tmp_path, 1)
    assert not list(tmp_path.rglob("*step*"))


def test_a_copy_beside_the_checkpoints_is_none_of_them(engine, tmp_path):
    for step in (1, 2):
        save(engine, tmp_path, step)
    for copy in ("step_00000001.bak", "step_00000002_1"):
        shutil.copytree(tmp_path / "step_00000001", tmp_path / copy)
    save(engine, tmp_path, 3, keep=2)
    assert sorted(path.name for path in tmp_path.glob("step_*")) == [
        "step_00000001.bak", "step_00000002", "step_00000002_1", "step_00000003",
    ]  # fmt: skip
    assert load(tmp_path)[0].step == 3


def test_the_best_by_a_metric_stay(engine, tmp_path):
    retention = Retention(keep=1, keep_best=2, metric="val/loss", mode="min")
    checkpoints = Checkpoints(tmp_path, engine, keep=retention)
    wanted = []
    for step, loss in enumerate([3.0, 1.0, 2.0, 5.0, 4.0], start=1):
        state = RunState(step=step, metrics={"val/loss": loss})
        wanted.append(checkpoints.wants(state))
        checkpoints.save(state)
    assert wanted == [True, True, True, False, False]
    assert [path.name[-1] for path in sorted(tmp_path.glob("step_*"))] == ["2", "3", "5"]


def test_a_checkpoint_that_cannot_be_deleted_is_told_and_fails_no_save(
    engine, tmp_path, monkeypatch
):
    save(engine, tmp_path, 1)
    remove, told = shutil.rmtree, []

    def busy(path: Path, ignore_errors: bool = False) -> None:
        if path.name != ".step_00000001.tmp":
            remove(path, ignore_errors)
        elif not ignore_errors:
            raise OSError("Directory not empty: .nfs0001")

    monkeypatch.setattr(shutil, "rmtree", busy)
    checkpoints = Checkpoints(tmp_path, engine, keep=1, tell=told.append)
    for step in (2, 3):
        assert checkpoints.save(RunState(step=step)).is_dir()
    checkpoints.shelf.finish_deletion()
    assert (tmp_path / "latest").read_text() == "step_00000003\n"
    assert not (tmp_path / "step_00000002").exists()
    assert len(told) == 1
    assert "step_00000001" in told[0]
    assert ".nfs0001" in told[0]


def test_nobody_waits_for_files_to_be_deleted_but_the_next_save(engine, tmp_path, monkeypatch):
    """Whose free disk they are to be."""
    save(engine, tmp_path, 1)
    remove, free = shutil.rmtree, threading.Event()

    def slow(path: Path, ignore_errors: bool = False) -> None:
        assert ignore_errors or free.wait(20)
        remove(path, ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", slow)
    checkpoints = Checkpoints(tmp_path, engine, keep=1)
    checkpoints.save(RunState(step=2))
    assert checkpoints.names() == ["step_00000002"]
    assert (tmp_path / ".step_00000001.tmp").exists()
    threading.Timer(0.2, free.set).start()
    checkpoints.save(RunState(step=3))
    assert not (tmp_path / ".step_00000001.tmp").exists()


def test_a_disk_that_is_full_after_the_rename_fails_no_save(engine, tmp_path, monkeypatch):
    save(engine, tmp_path, 1)
    told: list[str] = []

    def full(path: Path, text: str) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(shelf, "replace_text", full)
    checkpoints = Checkpoints(tmp_path, engine, keep=1, tell=told.append)
    assert checkpoints.save(RunState(step=2)).is_dir()
    assert "step_00000002 was saved" in told[0]
    assert (tmp_path / "step_00000001").is_dir()  # which `latest` still names


@pytest.mark.parametrize("text", ['{"metrics"', "[]", '{"unknown": 1}'])
def test_a_damaged_run_state_has_no_metric(engine, tmp_path, text):
    retention = Retention(keep=1, keep_best=1, metric="val/loss", mode="min")
    checkpoints = Checkpoints(tmp_path, engine, keep=retention)
    folder = checkpoints.save(RunState(step=1, metrics={"val/loss": 1.0}))
    (folder / "run_state.json").write_text(text)
    state = RunState(step=2, metrics={"val/loss": 2.0})
    assert checkpoints.wants(state)
    checkpoints.save(state)
    assert not folder.exists()


def test_what_is_evaluated_after_a_save_belongs_to_the_checkpoint(engine, tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, engine, keep=3)
    checkpoints.save(RunState(step=1))
    state = RunState(step=1, metrics={"val/top1": 5.0}, best={"val/top1": 7.0}, evaluated=["val"])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", die)  # which leaves a part of the new file
        with pytest.raises(Killed):
            checkpoints.add_evaluation(state)
    assert load(tmp_path)[0].evaluated == []
    checkpoints.add_evaluation(state)
    loaded = load(tmp_path)[0]
    assert (loaded.metrics, loaded.best, loaded.evaluated) == (
        {"val/top1": 5.0}, {"val/top1": 7.0}, ["val"],
    )  # fmt: skip
    (tmp_path / "step_00000001" / "evaluation.json").write_text('{"best"')
    assert load(tmp_path)[0].evaluated == []  # and will be evaluated again
    checkpoints.add_evaluation(RunState(step=2))
    assert not (tmp_path / "step_00000002").exists()  # that step was not saved


def test_a_disk_that_takes_no_evaluation_fails_nothing(engine, tmp_path, monkeypatch):
    told: list[str] = []
    checkpoints = Checkpoints(tmp_path, engine, keep=3, tell=told.append)
    checkpoints.save(RunState(step=1))

    def full(descriptor: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    checkpoints.add_evaluation(RunState(step=1, evaluated=["val"]))
    assert "No space left" in told[0]


def test_a_kill_at_any_moment_of_a_save_leaves_a_loadable_checkpoint(tmp_path, monkeypatch):
    """Counts the system calls that change the disk and dies at each in turn."""
    calls = 0
    die_at: int | None = None

    def counted(function):
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == die_at:
                raise Killed
            return function(*args, **kwargs)

        return wrapper

    monkeypatch.setattr(os, "fsync", counted(os.fsync))
    for name in ("rename", "replace", "mkdir", "write_text"):
        monkeypatch.setattr(Path, name, counted(getattr(Path, name)))
    monkeypatch.setattr(shutil, "rmtree", counted(shutil.rmtree))

    engine = FakeEngine()
    save(engine, tmp_path / "count", 1)
    calls = 0
    save(engine, tmp_path / "count", 2, keep=1)
    total = calls
    assert total > 10

    for moment in range(1, total + 1):
        folder = tmp_path / str(moment)
        die_at = None
        save(engine, folder, 1)
        calls, die_at = 0, moment
        with pytest.raises(Killed):
            save(engine, folder, 2, keep=1)
        die_at = None
        state, loaded = load(folder)
        assert state.step in (1, 2)
        assert loaded.value == state.step
        latest = (folder / "latest").read_text().strip()
        assert latest == f"step_{state.step:08d}"  # after the load
        save(engine, folder, 3)  # and the next save cleans up
        assert not list(folder.glob(".*"))


def test_latest_never_names_what_is_not_there(engine, tmp_path, monkeypatch):
    save(engine, tmp_path, 1)

    monkeypatch.setattr(Path, "rename", die)
    with pytest.raises(Killed):
        save(engine, tmp_path, 2)
    assert (tmp_path / "latest").read_text() == "step_00000001\n"


def test_everything_is_on_the_disk_before_it_becomes_visible(engine, tmp_path, monkeypatch):
    """Every file and every folder is synced before the rename, and the folder above after it."""
    synced: set[str] = set()
    lost: list[set[str]] = []
    fsync, rename = os.fsync, Path.rename

    def noting(descriptor: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def checking(path: Path, target: Path) -> Path:
        if target.name == "step_00000001":
            lost.append({str(each) for each in (path, *path.rglob("*"))} - synced)
            synced.clear()
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noting)
    monkeypatch.setattr(Path, "rename", checking)
    save(engine, tmp_path / "checkpoints", 1)
    assert lost == [set()]
    assert str(tmp_path / "checkpoints") in synced
