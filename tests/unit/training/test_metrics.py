"""Logs: readable by TensorBoard, continued by a resume, and never a reason to stop training."""

from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from routedvit.training.metrics import FanOutWriter, build_writer


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_tensorboard_reads_scalars_pictures_and_text(tmp_path: Path) -> None:
    writer = build_writer(tmp_path, rank=0)
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


def test_a_resume_replaces_what_was_written_beyond_its_step(tmp_path: Path) -> None:
    first = build_writer(tmp_path, rank=0)
    for step in range(1, 8):
        first.scalar("train/loss", 1.0, step)
    first.close()
    second = build_writer(tmp_path, rank=0, resume_step=5)
    second.scalar("train/loss", 2.0, 6)
    second.close()
    points = read(tmp_path).Scalars("train/loss")
    assert [(p.step, p.value) for p in points] == [(s, 1.0) for s in range(1, 6)] + [(6, 2.0)]


@pytest.mark.parametrize(("rank", "tensorboard"), [(1, True), (0, False)])
def test_nothing_is_written_by_other_ranks_or_when_switched_off(
    tmp_path: Path, rank: int, tensorboard: bool
) -> None:
    writer = build_writer(tmp_path / "logs", rank=rank, tensorboard=tensorboard)
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
    writer = build_writer(tmp_path / "file" / "logs", rank=0, report=reports.append)
    writer.scalar("train/loss", 0.5, 1)
    writer.close()
    assert len(reports) == 1
    assert reports[0].startswith("TensorBoard failed")
