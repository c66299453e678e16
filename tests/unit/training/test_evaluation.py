"""Evaluators that are due, and what of them is remembered."""

from types import SimpleNamespace
from typing import Any, cast

from routedvit.training.checkpoints.run_state import RunState
from routedvit.training.evaluation import Evaluation, kind_of
from routedvit.training.trainer_settings import TrainerSettings

OTHERS = ("retention", "writer", "progress", "folder")


class Accuracy:
    name, every_steps = "val", 2


class Neighbours(Accuracy):
    every_steps = 3


def test_evaluators_that_share_a_name_are_made_up_for_one_by_one() -> None:
    both: list[Any] = [Accuracy(), Neighbours()]
    settings = cast(TrainerSettings, SimpleNamespace(total_steps=12))
    evaluation = Evaluation(cast(Any, None), both, settings, **dict.fromkeys(OTHERS))

    assert [e for step in range(5) for e in evaluation.due(RunState(step=step))] == [
        both[0], both[1], both[0],
    ]  # fmt: skip
    assert evaluation.due(RunState(step=12)) == both
    assert evaluation.due(RunState(step=12, evaluated=[kind_of(both[0])])) == both[1:]
