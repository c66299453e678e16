"""What an engine is not built of, and that the loop is told what the config says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
from torch import nn

import routedvit  # noqa: F401  (registers the models)
from routedvit.training.assembly import build_trainer, check_statistics
from routedvit.training.checkpoints.checkpoint import Checkpoints
from routedvit.training.checkpoints.run_state import RunState
from routedvit.training.config.run import ConfigError, RunConfig
from routedvit.training.distributed.signals import StopSignals
from routedvit.training.trainer import Trainer
from routedvit.training.watch.console import Console
from tests.unit.training.fake_engine import FakeEngine
from tests.unit.training.trainers import Loader


def test_running_statistics_are_refused_by_name_and_their_absence_is_not() -> None:
    """Each rank would gather its own."""
    objective = nn.ModuleDict({"model": nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))})
    with pytest.raises(ConfigError, match=r"model.name: 1 is a BatchNorm2d"):
        check_statistics(objective)
    check_statistics(nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False), nn.LayerNorm(4)))


def built(folder: Path, **sections: dict[str, Any]) -> Trainer:
    """The loop of a config, around the fake engine."""
    config = RunConfig.model_validate(
        {
            "name": "x", "model": {"name": "colt5_vit_test"}, "optim": {"lr": 0.001},
            "train": {"batch_size": 4, "steps": 30}, **sections,
        }
    )  # fmt: skip
    engine: Any = FakeEngine(timm.create_model("colt5_vit_test"))
    return build_trainer(
        config, engine, None, Loader(), None, evaluators=[],
        checkpoints=Checkpoints(folder / "checkpoints", engine, keep=1),
        state=RunState(), folder=folder, console=Console(0), signals=StopSignals(),
    )  # type: ignore[arg-type]  # fmt: skip


def test_the_loop_is_told_what_the_config_says(tmp_path: Path) -> None:
    settings = built(tmp_path / "a").settings
    assert (settings.total_steps, settings.batch_size) == (30, 4)
    assert settings.save_in_background
    changed = built(
        tmp_path / "b",
        checkpoint={"in_background": False, "every_steps": 7},
        log={"every_steps": 3, "gradients_every_steps": 5, "routing_every_steps": 6},
        ema={"decay": 0.9},
        eval={"weights": "ema"},
    ).settings
    assert not changed.save_in_background
    assert changed.checkpoint_every == 7
    assert (changed.log_every, changed.gradients_every, changed.routing_every) == (3, 5, 6)
    assert (changed.evaluate_raw, changed.evaluate_ema) == (False, True)
