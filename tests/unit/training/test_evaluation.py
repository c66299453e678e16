"""Evaluators that are due, and what of them is remembered."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from routedvit.training.checkpoints.retention import Retention
from routedvit.training.checkpoints.run_state import RunState
from routedvit.training.evaluation import Evaluation, kind_of
from routedvit.training.interfaces import Table
from routedvit.training.trainer_settings import TrainerSettings
from tests.unit.training.trainers import Sink

OTHERS = ("retention", "writer", "progress", "folder")


class Accuracy:
    name, every_steps = "val", 2


class Neighbours(Accuracy):
    every_steps = 3


class Engine:
    rank = 1

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        yield


class Found:
    every_steps = 1

    def __init__(self, **values: Any) -> None:
        self.name, self.values = "val", values

    def run(self, model: Any) -> Iterator[tuple[str, Any]]:
        yield from self.values.items()


class FoundToo(Found): ...


class Logs(Sink):
    def __init__(self) -> None:
        super().__init__()
        self.written: list[str] = []

    def scalar(self, name: str, value: float, step: int) -> None:
        self.written.append(name)

    def text(self, name: str, text: str, step: int) -> None:
        self.written.append(name)

    def flush(self) -> None:
        self.written.append("flushed")


def evaluating(
    *found: Found, logs: Logs, retention: Retention | None = None, folder: Path
) -> Evaluation:
    return Evaluation(
        cast(Any, Engine()),
        cast(Any, found),
        cast(Any, SimpleNamespace(total_steps=9, evaluate_raw=True, evaluate_ema=False)),
        retention=retention or Retention(),
        writer=cast(Any, logs),
        progress=cast(Any, logs),
        folder=folder,
    )


@pytest.mark.parametrize(
    ("metric", "keep_best", "said"),
    [("val/topp1", 1, 1), ("val/topp1", 0, 0), ("val/knn", 1, 0), ("val/top1", 1, 0)],
)
def test_a_best_metric_that_nobody_finds_is_told_once_all_have_run(
    metric, keep_best, said, tmp_path: Path
) -> None:
    both, logs = [Found(top1=1.0), FoundToo(knn=2.0)], Logs()
    retention = Retention(keep_best=keep_best, metric=metric)
    evaluation = evaluating(*both, logs=logs, retention=retention, folder=tmp_path)
    for step in (1, 2):
        state = RunState(step=step)
        for evaluator in evaluation.due(state):
            evaluation.run(evaluator, state)
        assert state.metrics == {"val/top1": 1.0, "val/knn": 2.0}
    found = [line for line in logs.messages if "checkpoint.best_metric" in line]
    assert len(found) == said
    assert all("there are: val/knn, val/top1" in line for line in found)


def test_what_counts_as_evaluated_is_in_the_logs_and_rank_0_alone_writes_tables(
    tmp_path: Path,
) -> None:
    found, logs = Found(top1=1.0, classes=Table(["class"], [[0]])), Logs()
    evaluating(found, logs=logs, folder=tmp_path / "tables").run(found, RunState(step=1))
    assert logs.written == ["val/classes", "val/top1", "flushed"]
    assert not (tmp_path / "tables").exists()  # of rank 1


def test_evaluators_that_share_a_name_are_made_up_for_one_by_one() -> None:
    both: list[Any] = [Accuracy(), Neighbours()]
    settings = cast(TrainerSettings, SimpleNamespace(total_steps=12))
    evaluation = Evaluation(cast(Any, None), both, settings, **dict.fromkeys(OTHERS))

    assert [e for step in range(5) for e in evaluation.due(RunState(step=step))] == [
        both[0], both[1], both[0],
    ]  # fmt: skip
    assert evaluation.due(RunState(step=12)) == both
    assert evaluation.due(RunState(step=12, evaluated=[kind_of(both[0])])) == both[1:]
