"""What `train.py` joins: a run goes on in the order of samples that it began in, also from before
that could be chosen; and the data hear who reads labels.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from data.errors import DataError
from data.mixture import resolve_train
from data.preview import Preview
from routedvit.training import opening
from routedvit.training.config.file import load_config
from routedvit.training.distributed.world import World
from routedvit.training.interfaces import EvalLoaders
from routedvit.training.model import create_model
from routedvit.training.repeated import Wish
from routedvit.training.run_folder import RunFolder
from tests.unit.data.making import amend, pair, vouch, write_tar

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


MAE = ["objective.name=mae"]
DISTILL = [
    "objective.name=distill", "objective.teacher.name=test_vit", "objective.teacher.pretrained=true"
]  # fmt: skip


@pytest.fixture
def mixed(tmp_path: Path) -> list[str]:
    """Settings of a run on two sets of other classes, evaluated on a third."""
    classes = {"a": ["ant", "bee"], "b": ["boat", "car"], "val": ["x", "y", "z"]}
    for name, names in classes.items():
        (tmp_path / name).mkdir()
        members = [part for n in range(4) for part in pair(f"{name}/{n}", n, n % 2)]
        write_tar(tmp_path / name / "0.tar", members)
        vouch(tmp_path / name, {"0.tar": 4}, classes=len(names))
        amend(tmp_path / name, label_names=names)
    sources = [{"shards": str(tmp_path / name)} for name in "ab"]
    return [f"data.train={json.dumps(sources)}", f"data.val.shards={tmp_path / 'val'}"]


def evaluated(*settings: str) -> EvalLoaders | None:
    """What a start with these settings would evaluate on."""
    config = load_config(train.RunConfig, QUICKSTART, list(settings))
    found = resolve_train(config.data, labelled=config.objective.reads_labels)
    num_classes = found.shards.num_classes * config.objective.classifies
    num_classes = config.model.kwargs.setdefault("num_classes", num_classes)
    model = create_model(config.model, num_classes=num_classes, seed=0)
    world = World(0, 0, 1, torch.device("cpu"))
    return train.build_eval_loaders(config, model, world, Path("unused"), found)


def test_an_objective_that_reads_no_labels_mixes_sets_of_other_classes(mixed: list[str]) -> None:
    loaders = evaluated(*mixed, *MAE)
    assert loaders is not None
    assert (loaders.val.num_samples, loaders.train) == (4, None)
    # A student's held-out top-1 is of its teacher's classes.
    student = [*DISTILL, "objective.alpha=1", "model.kwargs.num_classes=3"]
    assert evaluated(*mixed, *student) is not None
    with pytest.raises(DataError, match=r"val\.shards has 3 classes and the model 2; set"):
        evaluated(*mixed, *student[:-1], "model.kwargs.num_classes=2")


@pytest.mark.parametrize("reads", [[], [*DISTILL, "objective.alpha=0.9"]])
def test_an_objective_that_reads_labels_does_not(mixed: list[str], reads: list[str]) -> None:
    with pytest.raises(DataError, match=r"^data\.train: data\.train\.1\.shards and data\.train\.0"):
        evaluated(*mixed, *reads)


@pytest.mark.parametrize("key", ["eval.knn", "eval.linear_probe"])
def test_an_evaluator_that_learns_from_their_labels_is_refused(mixed: list[str], key: str) -> None:
    settings = [*mixed, *MAE, f"{key}={{}}"]
    with pytest.raises(DataError, match=rf"^{key} cannot learn .* delete {key}, or name"):
        evaluated(*settings)
    config = load_config(train.RunConfig, QUICKSTART, settings)
    preview = Preview(config.data, labelled=False, learners=train.learners_of(config))
    with pytest.raises(DataError, match=rf"^{key} cannot learn"):
        preview.describe(
            world_size=1, seed=0, global_batch_size=4, pairs=False, num_classes=0,
            input_size=(1, 28, 28), mean=(0.5,), std=(0.5,), interpolation="bilinear",
        )  # fmt: skip
