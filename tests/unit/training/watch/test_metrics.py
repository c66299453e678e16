"""Logs: readable by TensorBoard, continued by a resume, and never a reason to stop training."""

import csv
import sys
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from routedvit.training.config.watch import LogConfig, WandbConfig
from routedvit.training.watch.csv_writer import CsvWriter
from routedvit.training.watch.metrics import FanOutWriter, build_writer, flat_hparams


@pytest.fixture(autouse=True)
def _named_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of one second are read in the order of a count over the whole process, as text: the
    tenth comes before the ninth. In a run there are seconds between two of them.
    """
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_tensorboard_reads_scalars_pictures_and_text(tmp_path: Path) -> None:
    writer = build_writer(tmp_path, LogConfig(), rank=0)
    writer.scalar("train/loss", 0.5, 3)
    writer.image("routed_patches/ffn", torch.zeros(3, 20, 30, dtype=torch.uint8), 3)
    writer.text("config", "hello", 0)
    writer.close()
    events = read(tmp_path)
    (point,) = events.Scalars("train/loss")
    assert (point.step, point.value) == (3, 0.5)
    (picture,) = events.Images("routed_patches/ffn")
    assert (picture.height, picture.width) == (20, 30)
    assert "config/text_summary" in events.Tags()["tensors"]


def test_tensorboard_reads_histograms(tmp_path: Path) -> None:
    writer = build_writer(tmp_path, LogConfig(), rank=0)
    writer.histogram("speed/step_seconds", [0.1, 0.2, 0.2], 3)
    writer.close()
    (point,) = read(tmp_path).Histograms("speed/step_seconds")
    assert point.step == 3
    assert point.histogram_value.num == 3


def test_hparams_belong_to_the_run_itself(tmp_path: Path) -> None:
    writer = build_writer(tmp_path, LogConfig(), rank=0)
    writer.hparams({"optim.lr": 0.1, "optim.name": "adamw"}, ["val/top1"])
    writer.close()
    assert len(list(tmp_path.iterdir())) == 1
    plugin = read(tmp_path).PluginTagToContent("hparams")
    assert "_hparams_/experiment" in plugin
    assert b"optim.name" in plugin["_hparams_/session_start_info"]


def test_a_config_becomes_flat_hparams() -> None:
    config = {
        "optim": {"lr": 0.1, "name": "adamw", "eps": None, "betas": [0.9, 0.99]},
        "seed": 0,
        "tensorboard": True,
    }
    assert flat_hparams(config) == {
        "optim.lr": 0.1, "optim.name": "adamw", "optim.betas": "[0.9, 0.99]",
        "seed": 0, "tensorboard": True,
    }  # fmt: skip


def test_csv_holds_every_scalar_and_a_resume_cuts_it(tmp_path: Path) -> None:
    config = LogConfig(tensorboard=False, csv=True)
    first = build_writer(tmp_path, config, rank=0)
    for step in range(1, 4):
        first.scalar("train/loss", step / 2, step)
        first.scalar("val/top1", 10.0, step)
    first.close()
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("3,train/lo")  # killed here
    second = build_writer(tmp_path, config, rank=0, resume_step=2)
    second.scalar("train/loss", 9.0, 3)
    second.close()
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["step", "name", "value"],
        ["1", "train/loss", "0.5"], ["1", "val/top1", "10.0"],
        ["2", "train/loss", "1.0"], ["2", "val/top1", "10.0"],
        ["3", "train/loss", "9.0"],
    ]  # fmt: skip


def test_a_resume_does_not_hold_the_csv_of_a_long_run_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    lines = "".join(f"{step},train/loss,0.5\n" for step in range(20_000))
    path.write_text("step,name,value\n" + lines)
    tracemalloc.start()
    try:
        CsvWriter(path, resume_step=20_000).close()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert path.read_text().splitlines()[-1] == "19999,train/loss,0.5"
    assert peak < 1 << 20  # 0.2 MiB, however long the file is; held as lists it takes 5


class FakeWandb:
    """Remembers what it is told, as the package `wandb` would send it."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.axes: dict[str, str | None] = {}
        self.finished = False
        self.config: dict[str, Any] = {}
        self.id = "abc"

    def init(self, **settings: Any) -> Any:
        self.begun.append(settings)
        update = lambda values, allow_val_change: self.config.update(values)  # noqa: E731
        return SimpleNamespace(
            id=self.id, log=self.log, finish=self.finish, define_metric=self.define_metric,
            config=SimpleNamespace(update=update),
        )  # fmt: skip

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes[name] = step_metric

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True

    def Image(self, pixels: Any) -> Any:
        return pixels.shape

    def Html(self, text: str) -> str:
        return text

    def Histogram(self, values: list[float]) -> list[float]:
        return values


def test_wandb_gets_everything_and_a_resume_is_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = LogConfig(tensorboard=False, wandb=WandbConfig(project="digits"))
    for _ in range(2):
        writer = build_writer(tmp_path / "run", config, rank=0)
    writer.scalar("train/loss", 0.5, 3)
    writer.image("routed_patches/q", torch.zeros(3, 4, 5, dtype=torch.uint8), 3)
    writer.text("config", "a < b", 0)
    writer.histogram("speed/step_seconds", [0.1, 0.2], 3)
    writer.hparams({"optim.lr": 0.1}, ["val/top1"])
    writer.close()
    assert [(begun["project"], begun["name"], begun["id"]) for begun in wandb.begun] == [
        ("digits", "run", None),
        ("digits", "run", "abc"),
    ]
    assert wandb.logged == [
        {"step": 3, "train/loss": 0.5, "routed_patches/q": (4, 5, 3)},
        {"step": 0, "config": "<pre>a &lt; b</pre>"},
        {"step": 3, "speed/step_seconds": [0.1, 0.2]},
    ]
    assert wandb.axes == {"step": None, "*": "step"}  # a step that comes again is not dropped
    assert wandb.config == {"optim.lr": 0.1}
    assert wandb.finished


def test_a_missing_wandb_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    reports: list[str] = []
    config = LogConfig(tensorboard=False, wandb=WandbConfig(project="digits"))
    build_writer(tmp_path, config, rank=0, report=reports.append).scalar("train/loss", 0.5, 1)
    (report,) = reports
    assert "pip install wandb" in report


@pytest.mark.parametrize("step", [5, 0])
def test_a_start_replaces_what_was_written_beyond_its_step(step: int, tmp_path: Path) -> None:
    """Also at step 0: a start with another recipe, after one that died before it saved."""
    first = build_writer(tmp_path, LogConfig(), rank=0)
    for earlier in range(1, 8):
        first.scalar("train/loss", 1.0, earlier)
    first.close()
    second = build_writer(tmp_path, LogConfig(), rank=0, resume_step=step)
    second.scalar("train/loss", 2.0, step + 1)
    second.close()
    points = read(tmp_path).Scalars("train/loss")
    kept = [(s, 1.0) for s in range(1, step + 1)]
    assert [(p.step, p.value) for p in points] == [*kept, (step + 1, 2.0)]


def test_a_run_that_goes_back_has_each_step_once(tmp_path: Path) -> None:
    writer = build_writer(tmp_path, LogConfig(csv=True), rank=0)
    for step, value in ((1, 1.0), (2, 2.0), (3, 3.0)):
        writer.scalar("train/loss", value, step)
    writer.rewind(1)
    writer.scalar("train/loss", 20.0, 2)
    writer.close()
    points = read(tmp_path).Scalars("train/loss")
    assert [(point.step, point.value) for point in points] == [(1, 1.0), (2, 20.0)]
    lines = (tmp_path / "metrics.csv").read_text().split()
    assert lines[1:] == ["1,train/loss,1.0", "2,train/loss,20.0"]


@pytest.mark.parametrize(("rank", "tensorboard"), [(1, True), (0, False)])
def test_nothing_is_written_by_other_ranks_or_when_switched_off(
    tmp_path: Path, rank: int, tensorboard: bool
) -> None:
    writer = build_writer(
        tmp_path / "logs", LogConfig(tensorboard=tensorboard, csv=rank > 0), rank=rank
    )
    writer.scalar("train/loss", 0.5, 1)
    writer.flush()
    writer.close()
    assert list(tmp_path.iterdir()) == []


class Recorder:
    """A sink that fails from the `fails_at`-th scalar on."""

    def __init__(self, fails_at: int = 1_000_000) -> None:
        self.fails_at = fails_at
        self.steps: list[int] = []

    def scalar(self, name: str, value: float, step: int) -> None:
        if len(self.steps) + 1 >= self.fails_at:
            raise OSError(28, "No space left on device")
        self.steps.append(step)

    def image(self, name: str, image: torch.Tensor, step: int) -> None: ...

    def text(self, name: str, text: str, step: int) -> None: ...

    def histogram(self, name: str, values: Sequence[float], step: int) -> None: ...

    def hparams(self, values: dict[str, Any], metrics: Sequence[str]) -> None: ...
    def rewind(self, step: int) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


def test_a_failing_sink_is_reported_once_and_the_others_go_on() -> None:
    reports: list[str] = []
    broken, sound = Recorder(fails_at=3), Recorder()
    writer = FanOutWriter([broken, sound], report=reports.append)
    for step in range(5):
        writer.scalar("train/loss", 0.0, step)
    assert broken.steps == [0, 1]
    assert sound.steps == [0, 1, 2, 3, 4]
    assert len(reports) == 1
    assert "Recorder" in reports[0]
    assert "No space left on device" in reports[0]


def test_a_folder_that_cannot_be_made_does_not_stop_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    reports: list[str] = []
    writer = build_writer(tmp_path / "file" / "logs", LogConfig(), rank=0, report=reports.append)
    writer.scalar("train/loss", 0.5, 1)
    writer.close()
    assert len(reports) == 1
    assert reports[0].startswith("TensorBoard failed")
