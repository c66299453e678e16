"""Every config that ships trains: the recipe itself, on a small model and two small batches."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import routedvit  # noqa: F401  (registers the models)
from routedvit.training.checkpoints.run_state import read_run_state
from tests.integration.launching import HERE, ROOT
from tests.unit.data.making import pair, vouch, write_tar

RECIPES = sorted(p.stem for p in (ROOT / "configs").glob("*.json") if p.name != "schema.json")
SIZE: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2}
TEACHER = {**SIZE, "num_heads": 2}

# What makes a run small. All else is the recipe's: loss, augmentation, optimiser, precision, ZeRO.
SMALL: dict[str, Any] = {
    **{f"model.kwargs.{key}": value for key, value in {**SIZE, "num_heads": 2}.items()},
    "model.kwargs.light_window": 2,
    "model.kwargs.in_chans": 3,
    "data.num_workers": 0,
    "train.batch_size": 8,
    "train.micro_batch_size": 4,
    "train.epochs": None,
    "train.steps": 2,
    "schedule.warmup_epochs": 0,
    "log.probe_images": 2,
    "data.streams": None,  # as many as the few samples allow
    "log.every_steps": 1,
    "log.tensorboard": False,  # its import is what a small run would spend most on
}
# What a recipe names that is not here.
INSTEAD: dict[str, dict[str, Any]] = {
    "mae_b": {
        "log.tensorboard": True,
        "objective.decoder_dim": 32,
        "objective.decoder_depth": 1,
        "objective.decoder_heads": 2,
    },
    "distill_s": {
        "objective.teacher": {
            "name": "vit_tiny_patch16_224",
            "kwargs": TEACHER,
            "checkpoint": "FOLDER/dense.safetensors",
        }
    },
    "warm_start_b": {"model.warm_start": "FOLDER/dense.safetensors"},
    "vit_b_512": {"model.warm_start": "FOLDER/runs/vit_b/weights"},
}


def command(folder: Path, name: str, **more: Any) -> list[str]:
    """Arguments of `train.py` for the small run of a recipe."""
    keys = {
        **SMALL,
        "data.train.shards": f"{folder}/train",
        "data.val.shards": f"{folder}/val",
        "output_dir": f"{folder}/runs/{name}",
        **INSTEAD.get(name, {}),
        **more,
    }
    arguments = ["--config", f"configs/{name.split('.')[0]}.json"]
    for key, value in keys.items():
        text = json.dumps(value).replace("FOLDER", str(folder))
        arguments += ["--set", f"{key}={text}"]
    return arguments


def train(*commands: list[str]) -> list[tuple[int, str]]:
    """Exit code and output of each, in turn, in children of one process."""
    result = subprocess.run(
        [sys.executable, HERE / "fork_train.py"],
        input=json.dumps(commands),
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        timeout=500,
    )
    return [tuple(run) for run in json.loads(result.stdout)]


def write_shards(folder: Path, number: int) -> None:
    folder.mkdir()
    sizes = {}
    for shard in range(number):
        members = [pair(f"{shard}_{i}", 8 * shard + i, i % 3) for i in range(8)]
        write_tar(folder / f"{shard}.tar", [member for sample in members for member in sample])
        sizes[f"{shard}.tar"] = 8
    vouch(folder, sizes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, and the weights of a dense ViT of the small size."""
    folder = tmp_path_factory.mktemp("recipes")
    write_shards(folder / "train", 3)
    write_shards(folder / "val", 1)
    torch.manual_seed(0)
    dense = timm.create_model("vit_tiny_patch16_224", num_classes=3, **TEACHER)
    save_file(dense.state_dict(), folder / "dense.safetensors")
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, tuple[int, str]]:
    """Each recipe once; then what follows from an MAE run, and some that cannot be."""
    weights = {"model.warm_start": f"{folder}/runs/mae_b/weights"}
    lost = {"model.warm_start": f"{folder}/gone.pth"}
    commands = {name: command(folder, name) for name in RECIPES}
    commands |= {
        "vit_s.tuned": command(folder, "vit_s.tuned", **weights),
        "vit_s.lost": command(folder, "vit_s.lost", **lost),
        "mae_b.classes": command(folder, "mae_b.classes", **{"model.kwargs.num_classes": 3}),
        "mae_b.evaluated": [*command(folder, "mae_b"), "--evaluate", "latest"],
    }
    # the weights that vit_b_512 begins from are those of vit_b
    assert RECIPES.index("vit_b") < RECIPES.index("vit_b_512")
    return dict(zip(commands, train(*commands.values()), strict=True))


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains_in_miniature(name: str, runs: Any, folder: Path) -> None:
    code, text = runs[name]
    assert code == 0, text
    assert "finished: 2 steps" in text
    assert "skipped" not in text
    model = timm.create_model(f"local-dir:{folder}/runs/{name}/weights", pretrained=True)
    assert torch.isfinite(model.eval()(torch.randn(1, 3, 32, 32))).all()


def run_state(folder: Path, name: str) -> dict[str, Any]:
    """With what was evaluated after the step was saved."""
    path = folder / "runs" / name / "checkpoints" / "step_00000002"
    return dataclasses.asdict(read_run_state(path))


def test_a_warm_start_is_told_and_recorded(runs: Any, folder: Path) -> None:
    assert "warm start from the dense weights of" in runs["warm_start_b"][1]
    assert "warm start from the routed weights of" in runs["vit_b_512"][1]
    state = run_state(folder, "warm_start_b")["warm_start"]
    assert state["kind"] == "dense"
    assert "split" in state["report"]
    assert run_state(folder, "vit_b")["warm_start"] is None


def test_an_mae_run_is_judged_by_its_held_out_loss(runs: Any, folder: Path) -> None:
    assert list(run_state(folder, "mae_b")["best"]) == ["val/loss"]
    assert "best val/loss" in runs["mae_b"][1]
    assert not re.search(r"best.*%", runs["mae_b"][1])


def test_an_mae_run_evaluated_offline_has_the_loss_that_it_logged(runs: Any, folder: Path) -> None:
    code, text = runs["mae_b.evaluated"]
    assert code == 0, text
    report = folder / "runs" / "mae_b" / "evaluated" / "step_00000002" / "report.json"
    found = json.loads(report.read_text())["metrics"]
    assert found == run_state(folder, "mae_b")["metrics"]
    assert list(found) == ["val/loss"]


def test_an_mae_encoder_starts_a_classifier(runs: Any, folder: Path) -> None:
    code, text = runs["vit_s.tuned"]
    assert code == 0, text
    state = run_state(folder, "vit_s.tuned")["warm_start"]
    assert state["fresh"] == ["head.weight", "head.bias"]
    weights = load_file(folder / "runs/vit_s.tuned/weights/model.safetensors")
    assert weights["head.weight"].shape == (3, 32)


@pytest.mark.slow
def test_a_resume_needs_no_warm_start(runs: Any, folder: Path) -> None:
    source = folder / "dense.safetensors"
    source.rename(folder / "moved.safetensors")
    try:
        ((code, text),) = train(command(folder, "warm_start_b"))
    finally:
        (folder / "moved.safetensors").rename(source)
    assert code == 0, text
    assert "already finished" in text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vit_s.lost", "model.warm_start: .*gone.pth does not exist"),
        ("mae_b.classes", "model.kwargs.num_classes = 3: objective.name = 'mae' trains no"),
    ],
)
def test_mistakes_are_one_line(name: str, words: str, runs: Any) -> None:
    code, text = runs[name]
    assert code == 2
    assert len(text.strip().splitlines()) == 1
    assert re.search(words, text), text
