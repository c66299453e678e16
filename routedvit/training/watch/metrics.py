"""Where numbers, pictures and text go: TensorBoard, CSV, W&B on rank 0, nowhere on the others.

`build_writer` returns one `MetricWriter` for the trainer. It fans out to any number of sinks, and a
sink that fails (full disk, lost mount) is reported once and dropped: a run of a week must not end
for a log. With no sink at all it is the null writer that every rank but 0 holds, so the trainer
writes without asking which rank it is.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from routedvit.drawing import to_png
from routedvit.training.config.watch import LogConfig
from routedvit.training.interfaces import MetricWriter
from routedvit.training.watch.csv_writer import CsvWriter
from routedvit.training.watch.wandb_writer import WandbWriter


class TensorBoardWriter:
    """Event files in `folder`, shown by `tensorboard --logdir`.

    Args:
        folder: created if it does not exist.
        resume_step: finished steps when the run starts; on a resume, TensorBoard hides the points
            that the interrupted run wrote beyond it, so every curve goes on as one line.
    """

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        self._folder = folder
        self._events = self._open(resume_step)

    def _open(self, step: int) -> Any:
        # Imported here: it takes a second, and only rank 0 needs it.
        from torch.utils.tensorboard import SummaryWriter

        # also at step 0: a start that died before its first checkpoint may have written there
        purge_step = step + 1 if step else 0
        return SummaryWriter(str(self._folder), purge_step=purge_step, flush_secs=10)

    def scalar(self, name: str, value: float, step: int) -> None:
        self._events.add_scalar(name, value, step)

    def image(self, name: str, image: Tensor, step: int) -> None:
        # As add_image, which resamples the picture first and takes three times as long.
        from tensorboard.compat.proto.summary_pb2 import Summary

        _, height, width = image.shape
        picture = Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=to_png(image)
        )
        summary = Summary(value=[Summary.Value(tag=name, image=picture)])
        self._events._get_file_writer().add_summary(summary, step)

    def text(self, name: str, text: str, step: int) -> None:
        self._events.add_text(name, text, step)

    def histogram(self, name: str, values: Sequence[float], step: int) -> None:
        self._events.add_histogram(name, torch.tensor(values), step)

    def hparams(self, values: dict[str, Any], metrics: Sequence[str]) -> None:
        # Not add_hparams, which opens a run of its own beside this one.
        from torch.utils.tensorboard.summary import hparams

        for summary in hparams(values, dict.fromkeys(metrics, 0.0))[:2]:
            self._events._get_file_writer().add_summary(summary)

    def rewind(self, step: int) -> None:
        self._events.close()
        self._events = self._open(step)

    def flush(self) -> None:
        self._events.flush()

    def close(self) -> None:
        self._events.close()


class FanOutWriter:
    """Writes to every sink that still works; the null writer when there is none.

    Args:
        sinks: writers that may raise.
        report: told once, in one line, about each sink that failed.
    """

    def __init__(
        self, sinks: Sequence[MetricWriter] = (), report: Callable[[str], None] = warnings.warn
    ) -> None:
        self._sinks = list(sinks)
        self._report = report

    def open(self, name: str, sink: Callable[[], MetricWriter]) -> None:
        """Adds the sink that `sink()` makes, unless making it fails; `name` is for the report."""
        try:
            self._sinks.append(sink())
        except Exception as error:
            self._fail(name, error)

    def scalar(self, name: str, value: float, step: int) -> None:
        self._each(lambda sink: sink.scalar(name, value, step))

    def image(self, name: str, image: Tensor, step: int) -> None:
        self._each(lambda sink: sink.image(name, image, step))

    def text(self, name: str, text: str, step: int) -> None:
        self._each(lambda sink: sink.text(name, text, step))

    def histogram(self, name: str, values: Sequence[float], step: int) -> None:
        self._each(lambda sink: sink.histogram(name, values, step))

    def hparams(self, values: dict[str, Any], metrics: Sequence[str]) -> None:
        self._each(lambda sink: sink.hparams(values, metrics))

    def rewind(self, step: int) -> None:
        self._each(lambda sink: sink.rewind(step))

    def flush(self) -> None:
        self._each(lambda sink: sink.flush())

    def close(self) -> None:
        self._each(lambda sink: sink.close())

    def _each(self, write: Callable[[MetricWriter], None]) -> None:
        for sink in tuple(self._sinks):
            try:
                write(sink)
            except Exception as error:  # whatever a sink raises, the run outlives it
                self._sinks.remove(sink)
                self._fail(type(sink).__name__, error)

    def _fail(self, name: str, error: Exception) -> None:
        self._report(
            f"{name} failed ({type(error).__name__}: {error}); the run goes on without it. "
            "Mend the cause and resume to get the logs back."
        )


def build_writer(
    folder: Path,
    config: LogConfig,
    *,
    rank: int,
    resume_step: int = 0,
    report: Callable[[str], None] = warnings.warn,
) -> FanOutWriter:
    """The writer of this rank: what `config` switches on, into `folder` on rank 0, else nothing."""
    writer = FanOutWriter(report=report)
    if rank != 0:
        return writer
    if config.tensorboard:
        writer.open("TensorBoard", lambda: TensorBoardWriter(folder, resume_step))
    if config.csv:
        writer.open("CSV", lambda: CsvWriter(folder / "metrics.csv", resume_step))
    if (wandb := config.wandb) is not None:
        writer.open("W&B", lambda: WandbWriter(folder, wandb.project, wandb.entity))
    return writer


def flat_hparams(config: dict[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """A nested config as TensorBoard's HPARAMS tab takes it: dotted names, plain values, no null.

    Lists of values become strings; `about` and paths say nothing about how good a run is.
    """
    flat: dict[str, bool | int | float | str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat |= flat_hparams(value, f"{name}.")
        elif isinstance(value, bool | int | float | str):
            flat[name] = value
        elif value is not None:
            flat[name] = json.dumps(value)
    return flat
