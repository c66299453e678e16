"""Every evaluation is made, be it after a failure or a stop, and the best checkpoint is kept."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator

import pytest
import torch

from routedvit.training.checkpoints.checkpoint import Checkpoints
from routedvit.training.checkpoints.retention import Retention
from routedvit.training.checkpoints.run_state import RunState
from routedvit.training.distributed.signals import StopSignals
from tests.unit.training.fake_engine import FakeEngine
from tests.unit.training.trainers import Evaluator, Sink, trainer

pytestmark = pytest.mark.usefixtures("one_writer")


def test_the_best_metric_is_the_highest_one(tmp_path):
    evaluators = [Evaluator([10.0, 30.0, 20.0], every_steps=2)]
    summary = trainer(tmp_path, FakeEngine(), Sink(), RunState(), evaluators=evaluators).fit()
    assert summary.best == {"val/top1": 30.0}


def test_averaged_weights_are_evaluated_under_names_of_their_own(tmp_path):
    engine, sink, averaged = FakeEngine(), Sink(), []

    class Watching(Evaluator):
        def run(self, model: torch.nn.Module) -> Iterator[tuple[str, float]]:
            averaged.append(engine.averaged)
            yield from super().run(model)

    evaluators = [Watching([10.0, 11.0, 30.0, 31.0, 20.0, 21.0], every_steps=2)]
    run = trainer(tmp_path, engine, sink, RunState(), evaluators=evaluators, evaluate_ema=True)
    assert run.fit().best == {"val/top1": 30.0, "val_ema/top1": 31.0}
    assert averaged == [False, True] * 3
    assert sink.scalars["val/top1", 6] == 20.0
    assert sink.scalars["val_ema/top1", 6] == 21.0

    only = [Watching([5.0], every_steps=0)]
    settings = {"evaluators": only, "evaluate_ema": True, "evaluate_raw": False}
    run = trainer(tmp_path / "b", engine, sink, RunState(), **settings)
    assert run.fit().best == {"val_ema/top1": 5.0}


def test_an_evaluator_without_a_cadence_runs_at_the_end(tmp_path):
    sink = Sink()
    trainer(tmp_path, FakeEngine(), sink, RunState(), evaluators=[Evaluator([1.0], 0)]).fit()
    assert ("val/top1", 6) in sink.scalars


def test_a_wish_to_stop_amid_evaluations_waits_for_the_present_one_alone(tmp_path):
    ran: list[str] = []

    class Long(Evaluator):
        def run(self, model: torch.nn.Module) -> Iterator[tuple[str, float]]:
            ran.append("long")
            os.kill(os.getpid(), signal.SIGUSR1)
            yield from super().run(model)

    class Next(Evaluator):
        name = "next"

        def run(self, model: torch.nn.Module) -> Iterator[tuple[str, float]]:
            ran.append("next")
            yield from super().run(model)

    engine = FakeEngine()
    with StopSignals() as signals:
        evaluators = [Long([1.0], 2), Next([1.0], 2)]
        run = trainer(tmp_path, engine, Sink(), RunState(), evaluators=evaluators, signals=signals)
        summary = run.fit()
    assert (summary.step, summary.finished, ran) == (2, False, ["long"])
    assert summary.checkpoint.is_dir()


def test_a_new_best_is_saved_at_once_and_kept(tmp_path):
    evaluators = [Evaluator([10.0, 30.0, 20.0, 15.0], every_steps=2)]
    keep = Retention(keep=1, keep_best=1)
    summary = trainer(
        tmp_path, FakeEngine(), Sink(), RunState(), evaluators=evaluators, keep=keep, total_steps=8
    ).fit()
    assert summary.best == {"val/top1": 30.0}
    assert sorted(path.name[-1] for path in tmp_path.glob("checkpoints/step_*")) == ["4", "8"]


def test_an_evaluation_that_fails_at_the_end_costs_no_step_and_is_made_up_for(tmp_path):
    """Step 4 is saved and evaluated; step 6, the last, is saved and its evaluation crashes."""
    evaluators = [Evaluator([10.0], every_steps=4)]
    run = trainer(tmp_path, FakeEngine(), Sink(), RunState(), evaluators=evaluators)
    with pytest.raises(RuntimeError, match="out of memory"):
        run.fit()
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "running"

    engine, sink = FakeEngine(), Sink()
    state = Checkpoints(tmp_path / "checkpoints", engine, keep=2).load_newest()
    assert (state.step, state.best) == (6, {"val/top1": 10.0})
    summary = trainer(tmp_path, engine, sink, state, evaluators=[Evaluator([30.0], 4)]).fit()
    assert summary.finished
    assert summary.best == {"val/top1": 30.0}
    assert engine.seen == []
    assert sink.scalars == {("val/top1", 6): 30.0}

    state = Checkpoints(tmp_path / "checkpoints", engine, keep=2).load_newest()
    evaluated = (state.metrics, state.best, state.evaluated)
    assert evaluated == ({"val/top1": 30.0}, {"val/top1": 30.0}, ["Evaluator:val"])
    assert trainer(tmp_path, engine, Sink(), state, evaluators=[Evaluator([], 4)]).fit().finished


def test_an_evaluation_that_fails_on_the_way_is_made_up_for_and_may_be_among_the_best(tmp_path):
    keep = Retention(keep=1, keep_best=1)
    evaluators = [Evaluator([10.0], every_steps=2)]
    run = trainer(
        tmp_path, FakeEngine(), Sink(), RunState(), evaluators=evaluators, checkpoint_every=2
    )
    with pytest.raises(RuntimeError, match="out of memory"):
        run.fit()
    state = Checkpoints(tmp_path / "checkpoints", FakeEngine(), keep=2).load_newest()
    assert state.step == 4
    run = trainer(
        tmp_path, FakeEngine(), Sink(), state, evaluators=[Evaluator([30.0, 20.0], 4)], keep=keep
    )
    assert run.fit().best == {"val/top1": 30.0}
    assert sorted(path.name[-1] for path in tmp_path.glob("checkpoints/step_*")) == ["4", "6"]


def test_a_last_step_that_is_the_best_leaves_no_other_behind(tmp_path):
    evaluators = [Evaluator([10.0, 30.0, 50.0], every_steps=2)]
    keep = Retention(keep=1, keep_best=1)
    trainer(tmp_path, FakeEngine(), Sink(), RunState(), evaluators=evaluators, keep=keep).fit()
    assert [path.name[-1] for path in tmp_path.glob("checkpoints/step_*")] == ["6"]


def test_a_wish_to_stop_in_the_last_evaluation_leaves_the_others_to_the_next_start(tmp_path):
    class Long(Evaluator):
        name = "long"

        def run(self, model: torch.nn.Module) -> Iterator[tuple[str, float]]:
            os.kill(os.getpid(), signal.SIGTERM)
            yield from super().run(model)

    engine = FakeEngine()
    with StopSignals() as signals:
        evaluators = [Long([1.0], 0), Evaluator([], 0)]
        run = trainer(tmp_path, engine, Sink(), RunState(), evaluators=evaluators, signals=signals)
        summary = run.fit()
    assert (summary.step, summary.finished) == (6, False)
    assert json.loads((tmp_path / "status.json").read_text()) == {"status": "stopped", "step": 6}
    state = Checkpoints(tmp_path / "checkpoints", engine, keep=2).load_newest()
    sink = Sink()
    done = type("Long", (Evaluator,), {"name": "long"})([], 0)
    run = trainer(tmp_path, engine, sink, state, evaluators=[done, Evaluator([2.0], 0)])
    assert run.fit().finished
    assert sink.scalars == {("val/top1", 6): 2.0}
