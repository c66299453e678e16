"""`--export`: a checkpoint becomes the model that a finished run writes; mistakes in words."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from routedvit.training import export_checkpoint as exporting
from routedvit.training.assembly import build_engine
from routedvit.training.checkpoints.checkpoint import Checkpoints
from routedvit.training.checkpoints.export import export_model
from routedvit.training.checkpoints.run_state import RunState
from routedvit.training.config.run import ConfigError, RunConfig
from routedvit.training.distributed.world import World
from routedvit.training.export_checkpoint import export_checkpoint, find_best
from routedvit.training.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("world")
MAE = {"name": "mae", "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
IMAGES = {"input_size": (3, 64, 64), "mean": (0.1, 0.2, 0.3), "std": (1.0,) * 3, "crop_pct": 0.9}
STEP = "step_00000001"


class TrainLoader:
    """What an engine asks of the loader that it is built for."""

    mean = std = (0.5,) * 3
    samples_per_epoch = 4


def config(**sections: Any) -> RunConfig:
    classes = 5 * (sections.get("objective") is not MAE)
    kwargs = {"img_size": 64, "depth": 1, "q_capacity": 0.25, "num_classes": classes}
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


def train_and_save(run: Path, world: World, what: RunConfig, **state: Any) -> None:
    """Two steps; the checkpoint, and the weights that a run that ends there exports."""
    made = what.model.created_from()
    torch.manual_seed(0)
    network = timm.create_model(made["name"], **made["kwargs"])
    engine, schedules = build_engine(what, network, world, TrainLoader)  # type: ignore[arg-type]
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for step in range(2):
        batch = {"image": images, "target": torch.arange(4), "position": torch.arange(4)}
        with schedules.at(step):
            engine.train_step([batch])
    state = {"image_format": IMAGES, "config": what.model_dump(mode="json")} | state
    Checkpoints(run / "checkpoints", engine, keep=1).save(RunState(step=1, **state))
    export_model(engine, run / "weights", **made, data_config=IMAGES)
    if what.ema.decay is not None:
        with engine.ema_weights():
            export_model(engine, run / "weights_ema", **made, data_config=IMAGES)


def export(checkpoint: str, run: Path) -> list[str]:
    """What is told."""
    lines: list[str] = []
    export_checkpoint(checkpoint, RunFolder(run), lines.append)
    return lines


@pytest.fixture(scope="module")
def trained(tmp_path_factory: Any, world: World) -> Path:
    run = tmp_path_factory.mktemp("trained")
    train_and_save(run, world, config(ema={"decay": 0.5}))
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


@pytest.mark.parametrize("objective", [{"name": "supervised"}, MAE], ids=lambda o: o["name"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_it_is_bit_for_bit_what_a_finished_run_writes(
    dtype: str, objective: dict[str, Any], tmp_path: Path, world: World
) -> None:
    what = config(
        precision={"dtype": dtype}, objective=objective, ema={"decay": 0.5},
        deepspeed={"zero_optimization": {"stage": 1}},
    )  # fmt: skip
    train_and_save(tmp_path, world, what)
    export(STEP, tmp_path)
    for suffix in ("", "_ema"):
        for name in ("model.safetensors", "config.json"):
            expected = (tmp_path / f"weights{suffix}" / name).read_bytes()
            assert (tmp_path / "exported" / f"{STEP}{suffix}" / name).read_bytes() == expected


def test_a_run_without_averages_has_one_model(tmp_path: Path, world: World) -> None:
    train_and_save(tmp_path, world, config())
    export("latest", tmp_path)
    assert [path.name for path in (tmp_path / "exported").iterdir()] == [STEP]


def test_the_line_that_is_printed_loads_it(run: Path) -> None:
    lines = export("latest", run)
    for line, folder in zip(lines[1::2], ("weights", "weights_ema"), strict=True):
        loaded = eval(line.strip(), {"timm": timm})
        expected = timm.create_model(f"local-dir:{run / folder}", pretrained=True)
        assert loaded.pretrained_cfg["mean"] == list(IMAGES["mean"])
        pairs = zip(loaded.parameters(), expected.parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_a_checkpoint_has_several_names(run: Path) -> None:
    for name in ("latest", STEP, str(run / "checkpoints" / STEP)):
        shutil.rmtree(run / "exported", ignore_errors=True)
        export(name, run)
        assert {path.name for path in (run / "exported").iterdir()} == {STEP, f"{STEP}_ema"}


def test_another_runs_checkpoint_is_named_after_that_run(run: Path, tmp_path: Path) -> None:
    export(str(run / "checkpoints" / STEP), tmp_path / "mine")
    assert (tmp_path / "mine" / "exported" / f"run.{STEP}" / "model.safetensors").exists()


def test_a_second_export_takes_the_place_of_the_first(run: Path) -> None:
    export(STEP, run)
    (run / "exported" / STEP / "model.safetensors").write_bytes(b"")
    export(STEP, run)
    written = (run / "exported" / STEP / "model.safetensors").read_bytes()
    assert written == (run / "weights" / "model.safetensors").read_bytes()
    assert {path.name for path in (run / "exported").iterdir()} == {STEP, f"{STEP}_ema"}


def test_a_full_disk_leaves_the_earlier_export_and_nothing_else(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(STEP, run)

    def fail(path: Path) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(exporting, "sync", fail)
    with pytest.raises(ConfigError, match=r"No space left .* see to the room"):
        export(STEP, run)
    assert {path.name for path in (run / "exported").iterdir()} == {STEP, f"{STEP}_ema"}
    assert (run / "exported" / STEP / "model.safetensors").stat().st_size > 0


@pytest.mark.parametrize("name", ["step_00000500", "nowhere/step_00000001"])
def test_a_checkpoint_that_is_not_there_is_told_with_those_that_are(name: str, run: Path) -> None:
    with pytest.raises(ConfigError, match=rf"--export {name}: no such .* holds {STEP}"):
        export(name, run)
    assert not (run / "exported").exists()


def test_a_whole_run_is_told_which_checkpoint_to_name(run: Path) -> None:
    for given in (run, run / "checkpoints"):
        with pytest.raises(ConfigError) as caught:
            export(str(given), run)
        assert str(caught.value) == (
            f"--export {given}: that is the folder of a run; name 'latest', or one of its "
            f"checkpoints, such as {run / 'checkpoints' / STEP}"
        )


def test_a_run_without_checkpoints_is_told(tmp_path: Path) -> None:
    for name, complaint in {"latest": "there is no checkpoint", "best": "nothing was eval"}.items():
        with pytest.raises(ConfigError, match=f"--export {name}: {complaint}"):
            export(name, tmp_path)


def test_what_is_exported_already_is_told(run: Path) -> None:
    with pytest.raises(ConfigError, match="is exported already"):
        export(str(run / "weights"), run)


def test_a_damaged_checkpoint_is_refused(run: Path) -> None:
    path = next((run / "checkpoints" / STEP).rglob("rank_*.safetensors"))
    *content, last = path.read_bytes()
    path.write_bytes(bytes([*content, last ^ 1]))
    with pytest.raises(ConfigError, match="--export latest: not a whole checkpoint"):
        export("latest", run)
    assert not (run / "exported").exists()


def test_a_checkpoint_that_does_not_say_how_images_look_is_refused(
    tmp_path: Path, world: World
) -> None:
    train_and_save(tmp_path, world, config(), image_format={})
    with pytest.raises(ConfigError, match=r"earlier version.* start its run again"):
        export(STEP, tmp_path)


def test_a_checkpoint_of_another_model_than_it_records_is_refused(
    tmp_path: Path, world: World
) -> None:
    other = config().model_dump(mode="json")
    other["model"]["kwargs"]["depth"] = 2
    train_and_save(tmp_path, world, config(), config=other)
    with pytest.raises(ConfigError, match=r"does not fit the model that it records.*blocks\.1"):
        export(STEP, tmp_path)
    assert not (tmp_path / "exported").exists()


def shelf(run: Path, *values: float, best: float, metric: str = "val/top1", **more: Any) -> None:
    """Checkpoints of steps 1, 2, ... with what was evaluated at each."""
    for step, value in enumerate(values, 1):
        folder = run / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        state = RunState(step=step, metrics={metric: value}, best={metric: best}, **more)
        (folder / "run_state.json").write_text(json.dumps(dataclasses.asdict(state)))


def test_the_best_is_the_oldest_with_the_best_value(tmp_path: Path) -> None:
    shelf(tmp_path, 10.0, 30.0, 30.0, 20.0, best=30.0)
    (tmp_path / "checkpoints" / "step_00000001" / "run_state.json").write_text("{")
    assert find_best(RunFolder(tmp_path)) == "step_00000002"


def test_the_best_goes_by_the_metric_of_the_config(tmp_path: Path) -> None:
    named = {"checkpoint": {"best_metric": "val/loss"}}
    shelf(tmp_path, 3.0, 1.0, 2.0, best=1.0, metric="val/loss", config=named)
    assert find_best(RunFolder(tmp_path)) == "step_00000002"


@pytest.mark.parametrize(("weights", "step"), [("both", 1), ("raw", 1), ("ema", 2)])
def test_the_best_goes_by_the_weights_that_are_evaluated_now(
    weights: str, step: int, tmp_path: Path
) -> None:
    shelf(tmp_path, 20.0, 10.0, best=20.0, config={"eval": {"weights": weights}})
    for folder, value in zip(sorted((tmp_path / "checkpoints").iterdir()), (1.0, 2.0), strict=True):
        state = json.loads((folder / "run_state.json").read_text())
        state["metrics"]["val_ema/top1"] = value
        # as after starts that evaluated the others only
        raw, averages = state["best"], {"val_ema/top1": 2.0}
        state["best"] = raw | averages if weights == "ema" else averages | raw
        (folder / "run_state.json").write_text(json.dumps(state))
    assert find_best(RunFolder(tmp_path)) == f"step_{step:08d}"


def test_a_best_that_was_not_kept_is_told(tmp_path: Path) -> None:
    shelf(tmp_path, 10.0, 20.0, best=30.0)
    with pytest.raises(ConfigError, match=r"best val/top1 \(30.0\) has no checkpoint.*step_0"):
        find_best(RunFolder(tmp_path))
