"""What all ranks of a start had written counts at the next start, and nothing else does."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from routedvit.training import run_folder
from routedvit.training.checkpoints import publishing
from routedvit.training.checkpoints.checkpoint import Checkpoints
from routedvit.training.checkpoints.fence import OwnershipLost
from routedvit.training.checkpoints.manifest import Manifest
from routedvit.training.checkpoints.ownership import take
from routedvit.training.checkpoints.publishing import (
    clear_hidden,
    publish_written,
    written_whole,
)
from routedvit.training.checkpoints.run_state import RunState
from routedvit.training.config.base import ConfigError
from routedvit.training.run_folder import RunFolder, earlier_config, open_folder
from tests.unit.training.checkpoints.saving import STATE, Killed, die, flip_a_bit, load, save
from tests.unit.training.fake_engine import FakeEngine

pytestmark = pytest.mark.usefixtures("one_writer")

CONFIG = {"seed": 1, "optim": {"lr": 0.1}}


def die_with(folder: Path, step: int, **state: Any) -> Path:
    """A start of a run that has written a checkpoint and ends; where it lies."""
    engine = FakeEngine()
    engine.value = step
    owner = take(folder) if folder.name == "run" else None
    checkpoints = Checkpoints(folder / "checkpoints", engine, keep=3, owner=owner)
    checkpoints.save(RunState(step=step, **state), in_background=True)
    checkpoints.pending.let_it_end(20)
    (left,) = (folder / "checkpoints").glob(".step_*.tmp")
    return left


def test_what_was_written_is_loaded_as_if_it_had_been_published(tmp_path):
    die_with(tmp_path, 7)
    folder = tmp_path / "checkpoints"
    assert publish_written(folder) == ["step_00000007"]
    state, engine = load(folder)
    assert (state.step, engine.value) == (7, 7)
    assert sorted(os.listdir(folder)) == ["latest", "run_id", "step_00000007"]
    assert not list(folder.rglob(".*"))  # no rank's note stays
    assert publish_written(folder) == []


def test_without_a_note_of_every_rank_it_is_not_whole(tmp_path):
    left = die_with(tmp_path, 7)
    state = json.loads((left / "run_state.json").read_text())
    (left / "run_state.json").write_text(json.dumps(state | {"world_size": 2}))
    assert publish_written(tmp_path / "checkpoints") == []
    assert left.exists()


@pytest.mark.parametrize("name", [".rank_00000.written", "run_state.json"])
@pytest.mark.parametrize("text", [None, "", '{"a"', "[]", '{"a": 1}'])
def test_what_was_cut_is_not_whole(tmp_path, name, text):
    left = die_with(tmp_path, 7)
    (left / name).unlink() if text is None else (left / name).write_text(text)
    assert publish_written(tmp_path / "checkpoints") == []


@pytest.mark.parametrize("where", ["write_json", "sync"])
def test_a_start_that_dies_while_it_publishes_has_lost_nothing(tmp_path, monkeypatch, where):
    die_with(tmp_path, 7)
    with monkeypatch.context() as patch:
        patch.setattr(publishing, where, die)
        with pytest.raises(Killed):
            publish_written(tmp_path / "checkpoints")
    assert publish_written(tmp_path / "checkpoints") == ["step_00000007"]
    assert load(tmp_path / "checkpoints")[0].step == 7


def test_a_manifest_that_was_cut_is_written_again(tmp_path):
    left = die_with(tmp_path, 7)
    (left / "manifest.json").write_text('{"format": 2, "st')
    publish_written(tmp_path / "checkpoints")
    assert load(tmp_path / "checkpoints")[0].step == 7


def test_what_was_to_be_deleted_does_not_come_back(tmp_path, monkeypatch):
    folder = save(FakeEngine(), tmp_path, 1)
    checkpoints = Checkpoints(tmp_path, FakeEngine(), keep=3)
    with monkeypatch.context() as patch:
        patch.setattr("routedvit.training.checkpoints.shelf.shutil.rmtree", die)
        checkpoints.shelf.delete([folder.name])
        with pytest.raises(Killed):
            checkpoints.shelf.finish_deletion()
    assert publish_written(tmp_path) == []


def test_a_step_that_is_there_already_is_not_published_again(tmp_path):
    left = die_with(tmp_path, 7)
    save(FakeEngine(), tmp_path / "checkpoints", 6)
    assert not left.exists()  # the next save has cleared it away
    left = die_with(tmp_path, 8)
    (tmp_path / "checkpoints" / "step_00000008").mkdir()
    assert publish_written(tmp_path / "checkpoints") == []


def opened(folder: Path, config: dict[str, Any] = CONFIG, **options: Any) -> str:
    text, _ = open_folder(RunFolder(folder), config, **{"fresh": False, "free": (), **options})
    return text


def test_the_next_start_says_so_and_asks_for_the_same_recipe(tmp_path):
    folder = tmp_path / "run"
    opened(folder)
    assert not RunFolder(folder).has_checkpoint()
    left = die_with(folder, 7, config=CONFIG)
    assert RunFolder(folder).has_checkpoint()  # what is asked before the folder is opened
    other = {"seed": 1, "optim": {"lr": 0.2}}
    with pytest.raises(ConfigError, match=r"another run: optim.lr was 0.1, is 0.2.*--fresh"):
        opened(folder, other)
    assert left.exists()  # a start that is refused changes nothing
    assert "step_00000007 was written when an earlier start died; it counts" in opened(folder)
    assert load(folder / "checkpoints")[0].step == 7
    with pytest.raises(ConfigError, match=r"add --resume .*step_00000007; or start over"):
        opened(folder, other)


def test_a_start_that_goes_back_sets_it_aside_once_it_can(tmp_path):
    folder = tmp_path / "run"
    opened(folder)
    flip_a_bit(save(FakeEngine(), folder / "checkpoints", 4))
    save(FakeEngine(), folder / "checkpoints", 5)
    die_with(folder, 7)
    for asked, there in ((4, "step_00000007"), (5, "abandoned_step_00000007")):
        name = Path(f"step_{asked:08d}")
        opened(folder, resume=name)
        checkpoints = Checkpoints(folder / "checkpoints", FakeEngine(), keep=3)
        with contextlib.suppress(ConfigError):  # step 4 is damaged
            assert checkpoints.load_named(name).step == asked
        assert (folder / "checkpoints" / there).is_dir()


def test_a_start_from_another_runs_checkpoint_is_refused_as_where_it_is_seen(tmp_path):
    other = save(FakeEngine(), tmp_path / "other" / "checkpoints", 3)
    folder = tmp_path / "run"
    opened(folder)
    die_with(folder, 7, config=CONFIG)
    opened(folder, resume=other)
    checkpoints = Checkpoints(folder / "checkpoints", FakeEngine(), keep=3)
    with pytest.raises(ConfigError, match="has checkpoints of its own"):
        checkpoints.load_named(other)
    assert load(folder / "checkpoints")[0].step == 7


def test_a_start_that_begins_anew_moves_it_with_the_rest(tmp_path):
    folder = tmp_path / "run"
    opened(folder)
    die_with(folder, 8)
    opened(folder, fresh=True)
    assert not (folder / "checkpoints").exists()
    assert written_whole(tmp_path / "run.1" / "checkpoints")


def test_it_knows_the_config_where_the_file_was_cut(tmp_path):
    folder = tmp_path / "run"
    opened(folder)
    die_with(folder, 7, config=CONFIG)
    (folder / "config.json").write_text("")
    assert earlier_config(RunFolder(folder), fresh=False, resume=None) == CONFIG
    opened(folder)


@pytest.mark.parametrize("moment", ["before", "while", "after"])
def test_a_start_that_lives_elsewhere_loses_neither_it_nor_the_newer_one(
    tmp_path, monkeypatch, moment
):
    """Both are about to publish it; the newer one owns the run."""
    folder, told = tmp_path / "run", []
    opened(folder)
    engine = FakeEngine()
    older = Checkpoints(
        folder / "checkpoints", engine, keep=3, owner=take(folder), tell=told.append
    )
    engine.value = 7
    older.save(RunState(step=7, config=CONFIG), in_background=True)
    older.pending.let_it_end(20)
    write = publishing.write_json

    def overtaken(path: Path, value: Any) -> None:
        monkeypatch.setattr(publishing, "write_json", write)
        monkeypatch.setattr(run_folder, "refuse_beside_the_living", lambda folder: None)
        if moment == "while":  # the older one has passed its fence
            opened(folder)
        write(path, value)

    if moment == "before":
        monkeypatch.setattr(run_folder, "refuse_beside_the_living", lambda folder: None)
        opened(folder)
    monkeypatch.setattr(publishing, "write_json", overtaken)
    with contextlib.nullcontext() if moment == "after" else pytest.raises(OwnershipLost):
        older.settle()
    if moment == "after":
        opened(folder)
    assert load(folder / "checkpoints")[0].step == 7
    assert told == []


def test_an_older_start_writes_nothing_where_a_newer_one_has_cleared(tmp_path):
    folder, engine = tmp_path / "run", FakeEngine()
    opened(folder)
    older = Checkpoints(folder / "checkpoints", engine, keep=3, owner=take(folder))
    engine.disk.clear()
    older.save(RunState(step=7), in_background=True)
    take(folder)
    clear_hidden(folder / "checkpoints")
    engine.disk.set()
    with pytest.raises(OwnershipLost):
        older.settle()
    assert os.listdir(folder / "checkpoints") == ["run_id"]


def test_half_a_deletion_does_not_count(tmp_path, monkeypatch):
    die_with(tmp_path, 7)
    with monkeypatch.context() as patch:
        patch.setattr(publishing.shutil, "rmtree", lambda path, ignore_errors: die())
        with pytest.raises(Killed):
            clear_hidden(tmp_path / "checkpoints")
    assert publish_written(tmp_path / "checkpoints") == []
    die_with(tmp_path, 7)  # a step that is written again, and deleted again
    clear_hidden(tmp_path / "checkpoints")
    assert os.listdir(tmp_path / "checkpoints") == ["run_id"]


@pytest.mark.parametrize("published_in_part", [False, True])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("short")])
def test_a_copy_that_was_cut_does_not_count(tmp_path, published_in_part, damage):
    left = die_with(tmp_path, 7)
    if published_in_part:
        files = written_whole(tmp_path / "checkpoints")[left]
        text = Manifest(step=7, files=files).model_dump_json()
        (left / "manifest.json").write_text(text)
    damage(left / STATE)
    assert publish_written(tmp_path / "checkpoints") == []


def test_two_of_one_step_are_one(tmp_path):
    left = die_with(tmp_path, 7)
    shutil.copytree(left, left.with_name(".step_00000007.copy.tmp"))
    assert publish_written(tmp_path / "checkpoints") == ["step_00000007"]
    assert load(tmp_path / "checkpoints")[0].step == 7
