"""The loop: the right data at the right step, skipped steps counted, speeds measured."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from routedvit.training.checkpoint import Checkpoints, RunState
from routedvit.training.config import ConfigError
from routedvit.training.optim import build_schedule
from routedvit.training.trainer import (
    MAX_SKIPPED_IN_A_ROW,
    Trainer,
    TrainerSettings,
    seed_step,
)
from tests.unit.training.fake_engine import FakeEngine


class Loader:
    samples_per_epoch, num_classes = 40, 2

    def batches(self, start: int) -> Iterator[dict[str, Any]]:
        while True:
            yield {"position": start}
            start += 4


class Sink:
    """Writer and progress that remember."""

    def __init__(self) -> None:
        self.scalars: dict[tuple[str, int], float] = {}
        self.messages: list[str] = []

    def scalar(self, name: str, value: float, step: int) -> None:
        self.scalars[name, step] = value

    def message(self, text: str) -> None:
        self.messages.append(text)

    def start(self, step: int, total: int) -> None: ...
    def update(self, step: int, loss: float, lr: float, images_per_second: float) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


class Evaluator:
    name = "val"

    def __init__(self, values: list[float], every_steps: int) -> None:
        self.values, self.every_steps = iter(values), every_steps

    def run(self, model: torch.nn.Module) -> Iterator[tuple[str, float]]:
        yield "top1", next(self.values)


def trainer(folder: Path, engine: FakeEngine, sink: Sink, state: RunState, **changes: Any):
    settings = {
        "total_steps": 6, "batch_size": 4, "seed": 0,
        "log_every": 2, "checkpoint_every": 4, "routing_every": 4,
    }  # fmt: skip
    return Trainer(
        engine,
        Loader(),
        evaluators=changes.pop("evaluators", []),
        writer=sink,
        monitor=None,
        progress=sink,
        checkpoints=Checkpoints(folder / "checkpoints", engine, keep=2),
        schedule=build_schedule(
            engine.optimizer, name="cosine", total_steps=6, warmup_steps=2, warmup_lr=0, min_lr=0
        ),
        settings=TrainerSettings(**(settings | changes)),
        state=state,
    )


@pytest.fixture(autouse=True)
def _one_writer(monkeypatch):
    monkeypatch.setattr("routedvit.training.checkpoint._writer_of", lambda path: 0)


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


def test_the_best_metric_is_the_highest_one(tmp_path):
    evaluators = [Evaluator([10.0, 30.0, 20.0], every_steps=2)]
    summary = trainer(tmp_path, FakeEngine(), Sink(), RunState(), evaluators=evaluators).fit()
    assert summary.best == {"val/top1": 30.0}


def test_an_evaluator_without_a_cadence_runs_at_the_end(tmp_path):
    sink = Sink()
    trainer(tmp_path, FakeEngine(), sink, RunState(), evaluators=[Evaluator([1.0], 0)]).fit()
    assert ("val/top1", 6) in sink.scalars


def test_a_skipped_step_is_counted_and_told(tmp_path):
    engine, sink = FakeEngine(), Sink()
    engine.skip_from = 5
    summary = trainer(tmp_path, engine, sink, RunState()).fit()
    assert summary.skipped_steps == 2
    assert len(sink.messages) == 2
    assert "step 5" in sink.messages[0]
    assert sink.scalars["train/skipped_steps", 6] == 2


def test_the_loss_scale_is_logged_and_told_with_a_skipped_step(tmp_path):
    engine, sink = FakeEngine(), Sink()
    engine.skip_from, engine.loss_scale = 6, 1024.0
    trainer(tmp_path, engine, sink, RunState()).fit()
    assert sink.scalars["train/loss_scale", 2] == 1024
    assert "loss scale 1024" in sink.messages[0]


def test_too_many_skipped_steps_in_a_row_end_the_run_in_words(tmp_path):
    engine = FakeEngine()
    engine.skip_from = 10
    run = trainer(tmp_path, engine, Sink(), RunState(), total_steps=100, checkpoint_every=200)
    with pytest.raises(ConfigError, match=r"optim\.lr"):
        run.fit()
    assert run.state.step == 9 + MAX_SKIPPED_IN_A_ROW


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
