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
from routedvit.training.trainer_settings import TrainerSettings

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

    def __init__(self, **values: float) -> None:
        self.name, self.values = "val", values

    def run(self, model: Any) -> Iterator[tuple[str, float]]:
        yield from self.values.items()


class FoundToo(Found): ...


@pytest.mark.parametrize(("metric", "said"), [("val/topp1", 1), ("val/knn", 0), ("val/top1", 0)])
def test_a_best_metric_that_nobody_finds_is_told_once_all_have_run(metric, said) -> None:
    messages: list[str] = []
    evaluation = Evaluation(
        cast(Any, Engine()),
        cast(Any, [Found(top1=1.0), FoundToo(knn=2.0)]),
        cast(Any, SimpleNamespace(total_steps=9, evaluate_raw=True, evaluate_ema=False)),
        retention=Retention(keep_best=1, metric=metric),
        writer=cast(Any, SimpleNamespace(scalar=lambda *_: None, flush=lambda: None)),
        progress=cast(Any, SimpleNamespace(message=messages.append)),
        folder=Path(),
    )
    for step in (1, 2):
        state = RunState(step=step)
        for evaluator in evaluation.due(state):
            evaluation.run(evaluator, state)
    found = [line for line in messages if "checkpoint.best_metric" in line]
    assert len(found) == said
    assert all("there are: val/knn, val/top1" in line for line in found)


def test_evaluators_that_share_a_name_are_made_up_for_one_by_one() -> None:
    both: list[Any] = [Accuracy(), Neighbours()]
    settings = cast(TrainerSettings, SimpleNamespace(total_steps=12))
    evaluation = Evaluation(cast(Any, None), both, settings, **dict.fromkeys(OTHERS))

    assert [e for step in range(5) for e in evaluation.due(RunState(step=step))] == [
        both[0], both[1], both[0],
    ]  # fmt: skip
    assert evaluation.due(RunState(step=12)) == both
    assert evaluation.due(RunState(step=12, evaluated=[kind_of(both[0])])) == both[1:]
