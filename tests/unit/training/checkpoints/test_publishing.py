"""What all ranks of a start had written counts at the next start, and nothing else does."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from routedvit.training.checkpoints import publishing
from routedvit.training.checkpoints.checkpoint import Checkpoints
from routedvit.training.checkpoints.ownership import take
from routedvit.training.checkpoints.publishing import publish_written, written_whole
from routedvit.training.checkpoints.run_state import RunState
from routedvit.training.config.base import ConfigError
from routedvit.training.run_folder import RunFolder, open_folder
from tests.unit.training.checkpoints.saving import Killed, die, load, save
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
        with pytest.raises(Killed):
            checkpoints.shelf.delete(folder.name)
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
    die_with(folder, 7, config=CONFIG)
    assert RunFolder(folder).has_checkpoint()  # what is asked before the folder is opened
    with pytest.raises(ConfigError, match=r"holds another run: optim\.lr was 0.1, is 0.2"):
        opened(folder, {"seed": 1, "optim": {"lr": 0.2}})
    (folder / "checkpoints" / "step_00000007").rename(
        folder / "checkpoints" / ".step_00000007.a.tmp"
    )
    assert "step_00000007 was written when an earlier start died; it counts" in opened(folder)
    assert load(folder / "checkpoints")[0].step == 7


def test_a_start_that_goes_back_or_begins_anew_does_not_want_it(tmp_path):
    folder = tmp_path / "run"
    opened(folder)
    save(FakeEngine(), folder / "checkpoints", 5)
    die_with(folder, 7)
    opened(folder, resume=Path("step_00000005"))
    assert sorted(os.listdir(folder / "checkpoints")) == ["latest", "run_id", "step_00000005"]
    die_with(folder, 8)
    opened(folder, fresh=True)
    assert not (folder / "checkpoints").exists()
    assert written_whole(tmp_path / "run.1" / "checkpoints")
