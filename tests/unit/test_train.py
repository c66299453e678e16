"""A run goes on in the order of samples that it began in, also from before it could be chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import train
from routedvit.training import opening
from routedvit.training.config.file import load_config
from routedvit.training.repeated import Wish
from routedvit.training.run_folder import RunFolder

QUICKSTART = str(Path(__file__).parents[2] / "configs" / "quickstart.json")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """Of a run from before there was data.shard_start."""
    monkeypatch.setattr(opening, "on_rank_zero", lambda action: action())
    folder = RunFolder(tmp_path / "run")
    saved = folder.checkpoints / "step_00000001"
    saved.mkdir(parents=True)
    before = {"data": {"train": {"shards": "x"}}}
    folder.config.write_text(json.dumps({"config": before}))
    (saved / "run_state.json").write_text(json.dumps({"config": before}))
    return folder


def kept(folder: RunFolder, *given: str, fresh: bool = False, resume: Path | None = None) -> Any:
    """data.shard_start of such a start, and what it says."""
    config = load_config(train.RunConfig, QUICKSTART, [f"data.shard_start={g}" for g in given])
    said: list[str] = []
    opening.keep_order(config.data, folder, Wish(resume, fresh), said.append)
    return config.model_dump(mode="json")["data"]["shard_start"], "".join(said)


def test_a_run_from_before_goes_on_as_it_began_and_a_new_one_begins_anew(folder: RunFolder) -> None:
    old = None, "data.shard_start is null, as the run began"
    elsewhere = RunFolder(folder.path.parent / "new")
    assert kept(folder) == old
    assert kept(folder, resume=Path("step_00000001")) == old
    assert kept(elsewhere, resume=folder.checkpoints / "step_00000001") == old
    assert kept(folder, fresh=True) == kept(elsewhere) == ("random", "")


def test_what_is_asked_for_stays(folder: RunFolder) -> None:
    """The run folder of another order refuses it, as it does any other recipe."""
    assert kept(folder, "random") == ("random", "")
    assert kept(RunFolder(folder.path / "new"), "null") == (None, "")


def test_a_run_whose_order_was_chosen_goes_on_in_it_when_it_is_not_said_again(
    folder: RunFolder,
) -> None:
    for chosen, said in ((None, "data.shard_start is null, as the run began"), ("random", "")):
        record = {"config": {"data": {"shard_start": chosen}}}
        folder.config.write_text(json.dumps(record))
        assert kept(folder) == (chosen, said)
