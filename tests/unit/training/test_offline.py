"""`--evaluate`: what the run logged, bit for bit; weights from anywhere; mistakes in words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import routedvit  # noqa: F401  (registers the models)
from routedvit.training import offline
from routedvit.training.assembly import build_engine
from routedvit.training.assembly_watch import build_run_evaluators
from routedvit.training.checkpoints.checkpoint import Checkpoints
from routedvit.training.checkpoints.run_state import RunState
from routedvit.training.config.run import ConfigError, RunConfig
from routedvit.training.distributed.world import World
from routedvit.training.engine import Engine
from routedvit.training.evaluators import Classification, record
from routedvit.training.interfaces import EvalLoaders
from routedvit.training.offline import evaluate_offline
from routedvit.training.run_folder import RunFolder
from routedvit.training.watch.console import Console
from routedvit.training.watch.metrics import FanOutWriter

MAE = {"name": "mae", "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
DISTILL = {"name": "distill", "teacher": {"name": "test_vit", "checkpoint": "gone.safetensors"}}


class Loader:
    """Seven images in batches of four."""

    num_samples = 7

    def __iter__(self) -> Iterator[dict[str, Any]]:
        generator = torch.Generator().manual_seed(0)
        for first in (0, 4):
            number = torch.arange(first, first + 4)
            yield {
                "image": torch.randn(4, 3, 64, 64, generator=generator),
                "target": torch.randint(0, 5, (4,), generator=generator),
                "key": [f"image/{i}" for i in number.tolist()],
                "position": number,
                "valid": number < 7,
            }


class TrainLoader:
    """What an engine asks of the loader that it is built for."""

    mean = std = (0.5,) * 3
    samples_per_epoch = 4


pytestmark = pytest.mark.usefixtures("world")
LOADERS = EvalLoaders(Loader(), Loader())


def model(seed: int, **kwargs: Any) -> nn.Module:
    torch.manual_seed(seed)
    kwargs = {"img_size": 64, "depth": 1, "num_classes": 5} | kwargs
    return timm.create_model("colt5_vit_test", **kwargs)


def config(**sections: Any) -> RunConfig:
    kwargs = {"num_classes": 5 * (sections.get("objective") is not MAE)}
    return RunConfig.model_validate(
        {
            "name": "x",
            "model": {"name": "colt5_vit_test", "kwargs": kwargs},
            "train": {"batch_size": 4, "steps": 2},
            "optim": {"lr": 0.01},
            "schedule": {"name": "constant", "warmup_epochs": 0},
            **sections,
        }
    )


def evaluate(path: Path, run: Path, world: World, what: RunConfig) -> None:
    fresh = model(1, **what.model.kwargs)
    code = evaluate_offline(
        what, fresh, world, LOADERS,
        checkpoint=str(path), folder=RunFolder(run), console=Console(1),
    )  # fmt: skip
    assert code == 0


def metrics(found: Path) -> dict[str, float]:
    return json.loads((found / "report.json").read_text())["metrics"]


def trained(what: RunConfig, world: World) -> Engine:
    """An engine that has made two steps, whose weights and averages differ."""
    engine, schedules = build_engine(what, model(0, **what.model.kwargs), world, TrainLoader)
    for step, batch in enumerate(Loader()):
        with schedules.at(step):
            engine.train_step([batch])
    return engine


def logged(engine: Engine, what: RunConfig) -> dict[str, float]:
    """What the run's own evaluation says, as training.evaluation does it."""
    evaluators = build_run_evaluators(what, engine.objective, LOADERS, 4)
    numbers: dict[str, float] = {}
    for evaluator in evaluators:
        with engine.evaluating() as network:
            findings = evaluator.run(network)
            numbers |= record(findings, evaluator.name, 1, writer=FanOutWriter(), folder=None)
        with engine.ema_weights(), engine.evaluating() as network:
            prefix = f"{evaluator.name}_ema"
            findings = evaluator.run(network)
            numbers |= record(findings, prefix, 1, writer=FanOutWriter(), folder=None)
    return numbers


@pytest.mark.parametrize("objective", [{"name": "supervised"}, MAE], ids=lambda o: o["name"])
@pytest.mark.parametrize(
    "precision",
    [{"dtype": "fp32"}, {"dtype": "bf16"}, {"dtype": "bf16", "autocast": True}],
    ids=["fp32", "bf16", "autocast"],
)
def test_a_checkpoint_gives_what_the_run_logged_bit_for_bit(
    precision: dict[str, Any], objective: dict[str, Any], tmp_path: Path, world: World
) -> None:
    what = config(
        precision=precision, objective=objective, ema={"decay": 0.5},
        eval={"knn": {}, "linear_probe": {}}, deepspeed={"zero_optimization": {"stage": 1}},
    )  # fmt: skip
    engine = trained(what, world)
    expected = logged(engine, what)
    assert expected["val/loss"] != expected["val_ema/loss"]
    checkpoints = Checkpoints(tmp_path / "checkpoints", engine, keep=1)
    checkpoints.save(RunState(step=1))
    evaluate(checkpoints.path_of(1), tmp_path, world, what)
    assert metrics(tmp_path / "evaluated" / "step_00000001") == expected


def test_exported_weights_give_their_own_numbers(tmp_path: Path, world: World) -> None:
    original = model(0)
    save_file(original.state_dict(), tmp_path / "own.safetensors")
    what = config(eval={"capacities": {}})
    evaluate(tmp_path / "own.safetensors", tmp_path, world, what)
    expected = dict(Classification(Loader(), every_steps=0).run(original))
    found = tmp_path / "evaluated" / "own"
    assert metrics(found)["val/loss"] == expected["loss"]
    assert "val/capacity_0.5/top1" in metrics(found)
    assert (found / "val_capacities.csv").exists()


def test_a_student_is_evaluated_without_its_teacher(tmp_path: Path, world: World) -> None:
    save_file(model(0).state_dict(), tmp_path / "own.safetensors")
    evaluate(tmp_path / "own.safetensors", tmp_path, world, config(objective=DISTILL))
    assert "val/top1" in metrics(tmp_path / "evaluated" / "own")


def test_no_result_is_ever_overwritten(tmp_path: Path, world: World) -> None:
    table = tmp_path / "evaluation" / "val_per_class.csv"  # the run's own
    table.parent.mkdir()
    table.write_text("as it was")
    save_file(model(0).state_dict(), tmp_path / "own.safetensors")
    for _ in range(2):
        evaluate(tmp_path / "own.safetensors", tmp_path, world, config())
    assert table.read_text() == "as it was"
    found = {path.parent.name for path in tmp_path.glob("evaluated/*/report.json")}
    assert found == {"own", "own.1"}


def test_an_encoder_alone_has_no_held_out_loss_but_the_rest(
    tmp_path: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    what = config(objective=MAE, eval={"knn": {}})
    save_file(model(0, num_classes=0).state_dict(), tmp_path / "own.safetensors")
    fresh = model(1, num_classes=0)
    evaluate_offline(
        what, fresh, world, LOADERS, checkpoint=str(tmp_path / "own.safetensors"),
        folder=RunFolder(tmp_path), console=Console(0),
    )  # fmt: skip
    assert set(metrics(tmp_path / "evaluated" / "own")) == {"val/knn_top1", "val/knn_top5"}
    assert "its held-out loss cannot be evaluated; give a checkpoint" in capsys.readouterr().out


def test_an_encoder_alone_with_nothing_else_to_evaluate_is_refused(
    tmp_path: Path, world: World
) -> None:
    save_file(model(0, num_classes=0).state_dict(), tmp_path / "own.safetensors")
    with pytest.raises(ConfigError, match=r"or switch on eval\.knn or eval\.linear_probe"):
        evaluate(tmp_path / "own.safetensors", tmp_path, world, config(objective=MAE))
    assert not (tmp_path / "evaluated").exists()


def test_a_whole_run_is_told_which_checkpoint_to_name(tmp_path: Path, world: World) -> None:
    for run in ("own", "other"):
        (tmp_path / run / "checkpoints" / "step_00000500").mkdir(parents=True)
    for run, newest in (("own", "'latest', or one"), ("other", "one")):
        step = tmp_path / run / "checkpoints" / "step_00000500"
        said = f"folder of a run; name {newest} of its checkpoints, such as {step}$"
        with pytest.raises(ConfigError, match=said):
            evaluate(tmp_path / run, tmp_path / "own", world, config())
    assert not (tmp_path / "own" / "evaluated").exists()


def test_weights_of_another_model_are_refused(tmp_path: Path, world: World) -> None:
    save_file(model(0, depth=2).state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match=r"other\.safetensors does not fit .*blocks\.1"):
        evaluate(tmp_path / "other.safetensors", tmp_path, world, config())
    assert not (tmp_path / "evaluated").exists()


def test_a_checkpoint_that_its_run_deletes_meanwhile_leaves_what_was_found(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    what = config(ema={"decay": 0.5}, deepspeed={"zero_optimization": {"stage": 1}})
    engine = trained(what, world)
    checkpoints = Checkpoints(tmp_path / "checkpoints", engine, keep=1)
    checkpoints.save(RunState(step=1))
    measure = offline.measure

    def and_delete(*args: Any) -> dict[str, float]:
        found = measure(*args)
        shutil.rmtree(checkpoints.path_of(1))
        return found

    monkeypatch.setattr(offline, "measure", and_delete)
    with pytest.raises(
        ConfigError, match=r"step_00000001 can no longer be read .*checkpoint\.keep"
    ):
        evaluate(checkpoints.path_of(1), tmp_path, world, what)
    assert "val/loss" in metrics(tmp_path / "evaluated" / "step_00000001")
