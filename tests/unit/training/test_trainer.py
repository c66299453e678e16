"""The loop: the right data at the right step, and what it measures and tells meanwhile."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from routedvit.training.checkpoints.run_state import RunState
from routedvit.training.distributed.patience import Patience
from routedvit.training.trainer import seed_step
from tests.unit.training.fake_engine import FakeEngine
from tests.unit.training.trainers import Evaluator, Sink, trainer

pytestmark = pytest.mark.usefixtures("one_writer")


def test_data_begins_where_the_state_says(tmp_path):
    engine = FakeEngine()
    summary = trainer(tmp_path, engine, Sink(), RunState(step=2, samples_seen=8)).fit()
    assert engine.seen == [8, 12, 16, 20]
    assert summary.finished
    assert summary.checkpoint.is_dir()


def test_the_rate_of_a_step_follows_from_its_number(tmp_path):
    sink = Sink()
    trainer(tmp_path, FakeEngine(), sink, RunState(), log_every=1).fit()
    rates = [sink.scalars["train/learning_rate", step] for step in range(1, 7)]
    assert rates[0] == 0.0
    assert rates[1] == pytest.approx(0.05)
    assert rates[2] == pytest.approx(0.1)
    resumed = Sink()
    state = RunState(step=3, samples_seen=12)
    trainer(tmp_path / "b", FakeEngine(), resumed, state, log_every=1).fit()
    assert [resumed.scalars["train/learning_rate", step] for step in (4, 5, 6)] == rates[3:]


def test_dials_turn_in_the_step_and_their_values_are_logged(tmp_path):
    class Dial:
        value = None

        def turn(self, step: int) -> None:
            self.value = self.latest = step

        def rest(self) -> None:
            self.value = None

        def scalars(self) -> dict[str, float]:
            return {"train/dial": float(self.latest)}

        def setting(self) -> str:
            return ""

    dial, sink, engine = Dial(), Sink(), FakeEngine()
    seen, original = [], engine.train_step

    def train_step(*args: Any, **kwargs: Any) -> Any:
        seen.append(dial.value)
        return original(*args, **kwargs)

    engine.train_step = train_step
    trainer(tmp_path, engine, sink, RunState(step=2, samples_seen=8), dials=[dial]).fit()
    assert seen == [2, 3, 4, 5]
    assert dial.value is None
    assert sink.scalars["train/dial", 6] == 5.0


def draws() -> tuple[float, float, float]:
    return float(torch.rand(())), float(np.random.rand()), random.random()


def test_random_numbers_follow_from_seed_step_and_rank_alone():
    seed_step(1, 2, 3)
    first = draws()
    draws()
    seed_step(1, 2, 3)
    assert draws() == first
    others = set()
    for triple in [(2, 2, 3), (1, 3, 3), (1, 2, 4)]:
        seed_step(*triple)
        others.add(draws())
    assert len(others | {first}) == 4
    seed_step(5, 7, 1)  # these never change: the steps after a resume draw as those before it
    assert (torch.initial_seed(), *draws()[1:]) == (
        11064850987459049982, 0.9435389034227746, 0.8095338778437228,
    )  # fmt: skip


class Norms(FakeEngine):
    """Has a gradient while the step is not made."""

    def train_step(self, batches: Any, *, before_step: Any = None, **flags: bool) -> Any:
        if before_step is not None:
            before_step()
        return super().train_step(batches, **flags)

    def full_gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield "blocks.0.mlp.heavy.weight", torch.full((2,), float(self.value + 1))


def test_gradient_norms_are_taken_and_written_at_their_cadence(tmp_path):
    sink = Sink()
    sink.histogram = lambda name, values, step: sink.scalars.update({(name, step): len(values)})
    trainer(tmp_path, Norms(), sink, RunState(), gradients_every=3).fit()
    norms = {key: v for key, v in sink.scalars.items() if key[0] == "watch_gradients/all/heavy"}
    assert norms == {
        ("watch_gradients/all/heavy", step): pytest.approx(step * 2**0.5) for step in (3, 6)
    }
    assert sink.scalars["speed/step_seconds", 3] == 2  # the first step says nothing
    assert sink.scalars["speed/step_seconds", 6] == 3


def test_the_summary_tells_time_and_waiting(tmp_path):
    summary = trainer(tmp_path, FakeEngine(), Sink(), RunState()).fit()
    assert summary.seconds > 0
    assert 0 <= summary.data_wait_share <= 1


class Watch(Patience):
    """Remembers the steps, and whether long work was marked as such."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []

    def stepped(self, step: int) -> None:
        self.steps.append(step)


def test_patience_hears_of_every_step_and_of_what_takes_longer(tmp_path, monkeypatch):
    watch, busy = Watch(), {}

    def noting(name: str, method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            busy.setdefault(name, set()).add((watch._busy > 0, gc.isenabled()))
            return method(*args, **kwargs)

        return call

    engine = FakeEngine()
    evaluators = [Evaluator([1.0, 2.0], 4)]
    run = trainer(tmp_path, engine, Sink(), RunState(), evaluators=evaluators, patience=watch)
    run.monitor = SimpleNamespace(run=noting("routing", lambda model, step: None))
    for name in ("train_step", "save_state"):
        monkeypatch.setattr(engine, name, noting(name, getattr(engine, name)))
    run.evaluation.evaluators[0].run = noting("evaluator", run.evaluation.evaluators[0].run)
    run.fit()
    assert watch.steps == [1, 2, 3, 4, 5, 6]
    assert busy == {
        "train_step": {(False, False)},
        "save_state": {(True, False)},
        "routing": {(True, False)},
        "evaluator": {(True, True)},
    }
    assert gc.isenabled()
