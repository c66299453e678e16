"""One folder holds one run: another recipe is refused, and starting over deletes nothing."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from data.config import FREE_ON_RESUME
from routedvit.training.config.run import ConfigError
from routedvit.training.run_folder import (
    RunFolder,
    check_same_data,
    claim,
    earlier_config,
    move_aside,
    open_folder,
)

CONFIG = {"optim": {"lr": 0.1, "betas": (0.9, 0.95)}, "log": {"every_steps": 10}, "seed": 0}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "runs" / "x")


def test_claim_records_config_and_versions(folder: RunFolder) -> None:
    claim(folder, CONFIG)
    record = json.loads(folder.config.read_text())
    assert record["config"]["optim"]["lr"] == 0.1
    assert {"python", "torch", "timm"} <= record["versions"].keys()


def test_same_run_may_claim_again_and_change_what_is_logged(folder: RunFolder) -> None:
    claim(folder, CONFIG)
    claim(folder, CONFIG | {"log": {"every_steps": 99}})
    assert json.loads(folder.config.read_text())["config"]["log"]["every_steps"] == 99


def saved_run(folder: RunFolder) -> None:
    claim(folder, CONFIG)
    (folder.checkpoints / "step_00000001").mkdir(parents=True)


def test_a_folder_that_was_moved_goes_on_under_its_new_name(folder: RunFolder) -> None:
    claim(folder, CONFIG | {"name": "before"})
    (folder.checkpoints / "step_00000001").mkdir(parents=True)
    claim(folder, CONFIG | {"name": "after"})
    assert json.loads(folder.config.read_text())["config"]["name"] == "after"


def test_a_run_that_saved_nothing_may_be_mended(folder: RunFolder) -> None:
    claim(folder, CONFIG)
    claim(folder, CONFIG | {"seed": 1})
    assert json.loads(folder.config.read_text())["config"]["seed"] == 1


def test_another_recipe_is_refused_and_named(folder: RunFolder) -> None:
    saved_run(folder)
    with pytest.raises(ConfigError, match=r"seed was 0, is 1.*--fresh"):
        claim(folder, CONFIG | {"seed": 1})
    assert json.loads(folder.config.read_text())["config"]["seed"] == 0


def test_every_differing_key_is_counted(folder: RunFolder) -> None:
    saved_run(folder)
    with pytest.raises(ConfigError, match=r"optim.betas was \[0.9, 0.95\].*and 2 more"):
        claim(folder, {"optim": {"lr": 0.2}, "seed": 1})


def test_other_shards_are_refused_where_a_run_goes_on(folder: RunFolder) -> None:
    claim(folder, CONFIG)
    nine, eight = ("9 samples", "3 samples"), ("8 samples", "3 samples")
    check_same_data(folder, nine, eight)  # begins from the checkpoint of another run
    saved_run(folder)
    for before in (("", ""), eight):  # checkpoints of earlier versions do not say
        check_same_data(folder, before, eight)
    with pytest.raises(ConfigError, match=r"data\.train: .* on 9 samples, and now .* 8 .*--fresh"):
        check_same_data(folder, nine, eight)
    with pytest.raises(ConfigError, match=r"data\.val: .* on 3 samples, and now .* 2 .*--resume"):
        check_same_data(folder, nine, ("9 samples", "2 samples"))


def with_data(**data: object) -> dict[str, Any]:
    return CONFIG | {"data": data}


FREE = tuple(f"data.{key}" for key in FREE_ON_RESUME)


def test_the_same_shards_may_lie_elsewhere_when_a_run_goes_on(folder: RunFolder) -> None:
    """A renewed token, a copy, another mount: `check_same_data` knows whether they are the same."""
    claim(folder, with_data(train={"shards": "https://h/x?sig=old"}, val={"shards": "s3://b/v"}))
    (folder.checkpoints / "step_00000001").mkdir(parents=True)
    claim(folder, with_data(train={"shards": ["/disk/x"]}, val={"shards": "/disk/v"}), free=FREE)
    with pytest.raises(ConfigError, match=r"data\.val was .*, is null"):
        claim(folder, with_data(train={"shards": ["/disk/x"]}), free=FREE)
    oftener = with_data(train={"shards": "/disk", "repeat": 2}, val={"shards": "/disk/v"})
    with pytest.raises(ConfigError, match=r"data\.train\.repeat was null, is 2"):
        claim(folder, oftener, free=FREE)


def test_the_same_shards_of_a_mixture_may_lie_elsewhere_too(folder: RunFolder) -> None:
    claim(folder, with_data(train=[{"shards": "a", "weight": 1}, {"shards": "b", "weight": 2}]))
    (folder.checkpoints / "step_00000001").mkdir(parents=True)
    moved = [{"shards": "c", "weight": 1}, {"shards": ["d"], "weight": 2}]
    claim(folder, with_data(train=moved), free=FREE)
    with pytest.raises(ConfigError, match=r"data\.train\.1\.weight was 2, is 3"):
        claim(folder, with_data(train=[moved[0], moved[1] | {"weight": 3}]), free=FREE)
    with pytest.raises(ConfigError, match=r"data\.train was .*, is .*"):
        claim(folder, with_data(train=moved[:1]), free=FREE)


@pytest.mark.parametrize("left", [b"", b'{"config": {"seed"', b"[]", b"\xff\x00"])
def test_a_cut_config_is_taken_from_the_newest_checkpoint_that_says(left, folder) -> None:
    saved_run(folder)
    (folder.checkpoints / "step_00000002").mkdir()  # damaged itself
    folder.config.write_bytes(left)
    with pytest.raises(ConfigError, match=r"config\.json is damaged .* put a copy back, or delete"):
        claim(folder, CONFIG)
    assert folder.config.read_bytes() == left
    saved = folder.checkpoints / "step_00000001" / "run_state.json"
    saved.write_text(json.dumps({"config": CONFIG}))
    assert earlier_config(folder, fresh=False, resume=None) == json.loads(json.dumps(CONFIG))
    with pytest.raises(ConfigError, match=r"seed was 0, is 1"):
        claim(folder, CONFIG | {"seed": 1})
    claim(folder, CONFIG)
    assert json.loads(folder.config.read_text())["config"]["seed"] == 0


def test_a_config_that_is_gone_is_taken_from_the_newest_checkpoint_that_says(folder) -> None:
    saved_run(folder)
    folder.config.unlink()
    saved = folder.checkpoints / "step_00000001" / "run_state.json"
    saved.write_text(json.dumps({"config": CONFIG}))
    with pytest.raises(ConfigError, match=r"seed was 0, is 1"):
        claim(folder, CONFIG | {"seed": 1})
    saved.unlink()  # nobody says
    claim(folder, CONFIG | {"seed": 1})
    assert json.loads(folder.config.read_text())["config"]["seed"] == 1


def test_the_config_is_on_disk_before_it_takes_the_place_of_an_earlier_one(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim(folder, CONFIG)
    before = folder.config.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        claim(folder, CONFIG | {"seed": 1})
    assert folder.config.read_bytes() == before


def test_starting_over_moves_the_old_run_aside(folder: RunFolder) -> None:
    claim(folder, CONFIG)
    moved = move_aside(folder)
    assert moved is not None
    assert moved.name == "x.1"
    assert (moved / "config.json").exists()
    claim(folder, CONFIG | {"seed": 1})
    second = move_aside(folder)
    assert second is not None
    assert second.name == "x.2"
    assert move_aside(folder) is None


def test_what_a_start_goes_on_from_says_with_which_config(folder: RunFolder) -> None:
    other = folder.path.parent / "y" / "checkpoints" / "step_00000002"
    other.mkdir(parents=True)

    def found(fresh: bool = False, resume: Path | None = None) -> Any:
        return earlier_config(folder, fresh=fresh, resume=resume)

    claim(folder, CONFIG)
    assert found() is None  # no checkpoint
    assert found(resume=other) is None  # which does not say
    (other / "run_state.json").write_text(json.dumps({"config": {"seed": 5}}))
    assert found(resume=other) == {"seed": 5}
    saved_run(folder)
    assert found()["seed"] == found(resume=other)["seed"] == 0
    assert found(resume=Path("step_00000001"))["seed"] == 0
    assert found(fresh=True) is None
    assert found(fresh=True, resume=other) == {"seed": 5}


def test_checkpoints_that_cannot_be_listed_are_not_taken_for_none(folder, monkeypatch) -> None:
    saved_run(folder)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(ConfigError, match=r"checkpoints cannot be read .*Permission denied"):
        claim(folder, CONFIG | {"seed": 1})
    assert json.loads(folder.config.read_text())["config"]["seed"] == 0


def test_a_folder_that_cannot_be_written_is_told_with_the_mend(folder: RunFolder) -> None:
    folder.path.parent.mkdir()
    folder.path.write_text("a file in its place")
    with pytest.raises(ConfigError, match=r"runs/x cannot be used .*output_dir to another"):
        open_folder(folder, CONFIG, fresh=False, free=())


def test_a_checkpoint_that_is_not_there_or_would_go_leaves_the_folder_alone(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    own, other = folder.checkpoints / "step_5", tmp_path / "other" / "checkpoints" / "step_5"
    own.mkdir(parents=True)
    other.mkdir(parents=True)
    (tmp_path / "whole" / "checkpoints" / "step_00000500").mkdir(parents=True)
    for fresh, resume, words in (
        (
            False,
            Path("step_6"),
            "there is no such folder, and .*checkpoints holds no checkpoint",
        ),
        (False, tmp_path / "whole", "folder of a run; name one .*, such as .*/step_00000500$"),
        (True, Path("step_5"), "--resume step_5 goes on with the run in"),
        (True, own, "leave --fresh out"),
    ):
        with pytest.raises(ConfigError, match=words):
            open_folder(folder, {}, fresh=fresh, free=(), resume=resume)
        assert own.is_dir()
        assert not folder.config.exists()
    open_folder(folder, {}, fresh=False, free=(), resume=Path("step_5"))
    told, _ = open_folder(folder, {}, fresh=True, free=(), resume=other)
    assert "the earlier run is kept in" in told


def test_a_checkpoint_that_is_not_there_is_told_beside_those_that_are(folder: RunFolder) -> None:
    saved_run(folder)
    with pytest.raises(ConfigError, match=r"--resume latest: .*/checkpoints holds step_00000001$"):
        open_folder(folder, CONFIG, fresh=False, free=(), resume=Path("latest"))


def test_checkpoints_on_a_linked_disk_would_go_with_their_run_too(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    (tmp_path / "scratch" / "step_5").mkdir(parents=True)
    folder.path.mkdir()
    folder.checkpoints.symlink_to(tmp_path / "scratch")
    with pytest.raises(ConfigError, match="leave --fresh out"):
        open_folder(folder, {}, fresh=True, free=(), resume=Path("step_5"))
    assert (folder.checkpoints / "step_5").is_dir()


@pytest.mark.parametrize(
    ("optim", "words"),
    [
        ({"name": "lion", "options": {}}, 'optim.name was "adamw", is "lion"'),
        ({"name": "adamw", "options": {"amsgrad": True}}, 'optim.options was {}, is {"amsgrad"'),
    ],
)
def test_the_state_of_another_optimiser_is_not_begun_from(optim, words, tmp_path: Path) -> None:
    folder, other = RunFolder(tmp_path / "run"), tmp_path / "other" / "checkpoints" / "step_5"
    other.mkdir(parents=True)
    saved = {"optim": {"name": "adamw", "options": {}, "lr": 0.1}}
    (other / "run_state.json").write_text(json.dumps({"config": saved}))
    with pytest.raises(ConfigError, match=re.escape(words)):
        open_folder(folder, {"optim": optim}, fresh=False, free=(), resume=other)
    assert not folder.path.exists()
    same = {"optim": {"name": "adamw", "options": {}, "lr": 0.2}}
    open_folder(folder, same, fresh=False, free=(), resume=other)
