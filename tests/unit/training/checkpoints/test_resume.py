"""A start goes on where its checkpoint says, be it the newest, a named one or another run's."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from routedvit.training.checkpoints import commit, publishing, shelf
from routedvit.training.checkpoints.checkpoint import Checkpoints
from routedvit.training.checkpoints.rollbacks import last_jump, note_jump, read_jumps
from routedvit.training.checkpoints.run_state import RunState
from routedvit.training.config.run import ConfigError
from tests.unit.training.checkpoints.saving import Killed, die, flip_a_bit, load, save
from tests.unit.training.fake_engine import FakeEngine

pytestmark = pytest.mark.usefixtures("one_writer")


def test_a_checkpoint_from_before_the_guard_was_saved_still_loads(engine, tmp_path, monkeypatch):
    write = commit.write_json

    def without_guard(path: Path, value: dict) -> None:
        write(path, {key: entry for key, entry in value.items() if key != "guard"})

    monkeypatch.setattr(commit, "write_json", without_guard)
    save(engine, tmp_path, 2)
    (tmp_path / "rollbacks.json").write_text('[{"step": 2, "from": 16, "to": 40}]')
    state = load(tmp_path)[0]
    assert (state.samples_seen, state.guard["returns"]) == (40, 0)


def test_a_lost_run_id_is_read_from_the_newest_checkpoint(engine, tmp_path):
    save(engine, tmp_path, 1)
    (tmp_path / "run_id").unlink()
    shutil.rmtree(save(engine, tmp_path, 2))
    assert load(tmp_path)[0].step == 1


def test_a_checkpoint_from_before_runs_had_an_id_still_loads(engine, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(publishing, "run_id", lambda folder: "")
        save(engine, tmp_path, 1)
    shutil.rmtree(save(engine, tmp_path, 2))
    assert load(tmp_path)[0].step == 1


@pytest.mark.parametrize("text", [b"", b"step_0000", b"../nothing", b"\xff"])
def test_latest_is_for_people_and_a_load_does_not_need_it(engine, tmp_path, text):
    for step in (1, 2):
        save(engine, tmp_path, step)
    (tmp_path / "latest").write_bytes(text)
    assert load(tmp_path)[0].step == 2
    assert (tmp_path / "latest").read_text() == "step_00000002\n"


def test_a_load_needs_no_room_on_the_disk(engine, tmp_path, monkeypatch):
    save(engine, tmp_path, 1)

    def full(path: Path, text: str) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(shelf, "replace_text", full)
    assert load(tmp_path)[0].step == 1


def test_a_named_checkpoint_sets_later_ones_aside(engine, tmp_path):
    for step in (1, 2, 3):
        save(engine, tmp_path, step)
    engine, told = FakeEngine(), []
    state = Checkpoints(tmp_path, engine, keep=3, tell=told.append).load_named(
        Path("step_00000001")
    )
    assert (state.step, engine.value) == (1, 1)
    assert (tmp_path / "latest").read_text() == "step_00000001\n"
    assert sorted(path.name for path in tmp_path.glob("*step*")) == [
        "abandoned_step_00000002", "abandoned_step_00000003", "step_00000001",
    ]  # fmt: skip
    assert len(told) == 2


def test_a_checkpoint_of_another_run_begins_a_new_one_only(engine, tmp_path):
    other = save(engine, tmp_path / "other", 5)
    state = Checkpoints(tmp_path / "own", engine, keep=3).load_named(other)
    assert state.step == 5
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["origin.json"]
    save(engine, tmp_path / "own", 6)
    with pytest.raises(ConfigError, match="--fresh"):
        Checkpoints(tmp_path / "own", engine, keep=3).load_named(other)


def test_what_another_run_measured_is_not_the_new_ones(engine, tmp_path):
    """It may have been measured on other images, and its best is no checkpoint of this run."""
    state = RunState(5, 40, best={"val/top1": 90.0}, metrics={"val/top1": 90.0}, evaluated=["x"])
    state.spent = {"starts": 1}
    Checkpoints(tmp_path / "old", engine, keep=3).save(state)
    own = Checkpoints(tmp_path / "old", engine, keep=3).load_named(Path("step_00000005"))
    assert (own.best, own.spent) == ({"val/top1": 90.0}, {"starts": 1})
    source = tmp_path / "old" / "step_00000005"
    fork = Checkpoints(tmp_path / "new", engine, keep=3).load_named(source)
    assert (fork.best, fork.metrics, fork.evaluated, fork.spent) == ({}, {}, [], {})
    origin = json.loads((tmp_path / "new" / "origin.json").read_text())
    assert origin == {"checkpoint": str(source), "step": 5, "position": 40}
    Checkpoints(tmp_path / "new", engine, keep=3).load_newest()  # a start that begins at 0
    assert not (tmp_path / "new" / "origin.json").exists()


def test_a_named_checkpoint_that_is_damaged_is_refused(engine, tmp_path):
    flip_a_bit(save(engine, tmp_path, 1))
    with pytest.raises(ConfigError, match="SHA-256"):
        Checkpoints(tmp_path, engine, keep=3).load_named(Path("step_00000001"))


def test_going_back_moves_the_data_for_good_and_deletes_what_came_later(engine, tmp_path):
    for step in (1, 2, 3):
        save(engine, tmp_path, step)
    checkpoints = Checkpoints(tmp_path, engine, keep=3)
    state = checkpoints.roll_back(before=3, resume_at=40)
    assert (state.step, state.samples_seen, engine.value) == (2, 40, 2)
    assert load(tmp_path)[0].samples_seen == 40
    assert checkpoints.rollbacks() == [{"step": 2, "from": 16, "to": 40, "returns": 1}]
    assert (tmp_path / "latest").read_text() == "step_00000002\n"
    assert not (tmp_path / "step_00000003").exists()
    checkpoints.roll_back(before=3, resume_at=80, returns=2)
    state = load(tmp_path)[0]
    assert (state.samples_seen, state.guard["returns"]) == (80, 2)
    save(engine, tmp_path, 4)
    assert load(tmp_path)[0].samples_seen == 32  # what its own run state says


def spell_with_dots(folder: Path) -> Path:
    return folder / ".." / folder.name / "step_00000002"


def spell_from_here(folder: Path) -> Path:
    return Path(os.path.relpath(folder)) / "step_00000002"


def spell_through_a_link(folder: Path) -> Path:
    link = folder.with_name("link")
    link.symlink_to(folder)
    return link / "step_00000002"


@pytest.mark.parametrize("spell", [spell_with_dots, spell_from_here, spell_through_a_link])
def test_however_its_path_is_spelt_a_named_checkpoint_is_the_runs_own(engine, tmp_path, spell):
    folder = tmp_path / "checkpoints"
    for step in (1, 2):
        save(engine, folder, step)
    checkpoints = Checkpoints(folder, engine, keep=3)
    checkpoints.roll_back(before=3, resume_at=40)
    save(engine, folder, 3)
    assert checkpoints.load_named(spell(folder)).samples_seen == 40
    assert (folder / "latest").read_text() == "step_00000002\n"


def test_another_run_from_a_checkpoint_that_was_gone_back_to_passes_the_bad_data_too(
    engine, tmp_path
):
    source = save(engine, tmp_path / "old", 2)
    Checkpoints(tmp_path / "old", engine, keep=3).roll_back(before=3, resume_at=40)
    fork = Checkpoints(tmp_path / "new", engine, keep=3)
    state = fork.load_named(source)
    assert (state.samples_seen, state.guard["returns"]) == (40, 0)
    assert fork.rollbacks() == []  # it has not gone back itself


def test_a_run_that_returned_by_name_meets_a_later_step_as_new(engine, tmp_path):
    """What it passed over on the old way does not move the data of the new one."""
    for step in (1, 2):
        save(engine, tmp_path, step)
    checkpoints = Checkpoints(tmp_path, engine, keep=3, tell=lambda line: None)
    checkpoints.roll_back(before=3, resume_at=40)
    checkpoints.load_named(Path("step_00000001"))
    save(engine, tmp_path, 2)
    assert load(tmp_path)[0].samples_seen == 16


def test_a_death_amid_going_back_does_not_meet_the_bad_data_again(engine, tmp_path, monkeypatch):
    for step in (1, 2, 3):
        save(engine, tmp_path, step)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", die)
        with pytest.raises(Killed):
            Checkpoints(tmp_path, engine, keep=3).roll_back(before=3, resume_at=40)
    jumps = json.loads((tmp_path / "rollbacks.json").read_text())
    assert [(jump["step"], jump["to"]) for jump in jumps] == [(2, 40)]


def load_newest(checkpoints: Checkpoints) -> None:
    checkpoints.load_newest()


def load_the_first(checkpoints: Checkpoints) -> None:
    checkpoints.load_named(Path("step_00000001"))


@pytest.mark.parametrize("load", [load_newest, load_the_first])
def test_latest_is_right_while_a_load_moves_things_aside(engine, tmp_path, monkeypatch, load):
    save(engine, tmp_path, 1)
    flip_a_bit(save(engine, tmp_path, 2))
    rename, named = Path.rename, []

    def watched(self: Path, target: Path) -> Path:
        named.append((tmp_path / "latest").read_text())
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", watched)
    load(Checkpoints(tmp_path, engine, keep=3, tell=lambda line: None))
    assert named == ["step_00000001\n"]


def test_there_may_be_nothing_to_go_back_to(engine, tmp_path):
    save(engine, tmp_path, 5)
    assert Checkpoints(tmp_path, engine, keep=3).roll_back(before=5, resume_at=40) is None
    assert load(tmp_path)[0].samples_seen == 40


def test_each_return_is_noted_beside_the_earlier_ones(tmp_path):
    jumps = [{"step": step, "from": 8 * step, "to": 8 * step + 80} for step in (1, 2)]
    for jump in jumps:
        note_jump(tmp_path, jump)
    assert read_jumps(tmp_path) == jumps
    assert last_jump(jumps, 1, 8) == jumps[0]
    assert last_jump(jumps, 1, 88) is None  # the data were elsewhere when that one was saved
