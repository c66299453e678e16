"""The loop: the right data at the right step, skipped steps counted, speeds measured."""

from __future__ import annotations

import errno
import gc
import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from routedvit.training.checkpoints.checkpoint import Checkpoints
from routedvit.training.checkpoints.commit import SaveError
from routedvit.training.checkpoints.retention import Retention
from routedvit.training.checkpoints.run_state import RunState, read_run_state
from routedvit.training.config.run import ConfigError
from routedvit.training.distributed.patience import Patience
from routedvit.training.distributed.signals import StopSignals
from routedvit.training.guard import Guard
from routedvit.training.recipe.optim import build_schedule
from routedvit.training.recipe.schedules import Schedules
from routedvit.training.trainer import Trainer, seed_step
from routedvit.training.trainer_settings import TrainerSettings
from tests.unit.training.fake_engine import FakeEngine


class Loader:
    samples_per_epoch, num_classes = 40, 2

    def batches(self, start: int) -> Iterator[dict[str, Any]]:
        while True:
            keys = [f"key{position}" for position in range(start, start + 4)]
            yield {"position": start, "key": keys, "epoch": torch.tensor([start // 40])}
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
    def rewind(self, step: int) -> None:
        self.scalars = {key: value for key, value in self.scalars.items() if key[1] <= step}

    def flush(self) -> None: ...
    def close(self) -> None: ...


class Evaluator:
    """Says its values one by one and crashes when there are no more."""

    name = "val"

    def __init__(self, values: list[float], every_steps: int) -> None:
        self.values, self.every_steps = iter(values), every_steps

    def run(self, model: torch.nn.Module) -> Iterator[tuple[str, float]]:
        value = next(self.values, None)
        if value is None:
            raise RuntimeError("out of memory")
        yield "top1", value


def trainer(folder: Path, engine: FakeEngine, sink: Sink, state: RunState, **changes: Any):
    settings = {
        "total_steps": 6, "batch_size": 4, "seed": 0,
        "log_every": 2, "checkpoint_every": 4, "routing_every": 4,
    }  # fmt: skip
    keep = changes.pop("keep", 2)
    signals = changes.pop("signals", None) or StopSignals()
    dials = changes.pop("dials", [])
    patience = changes.pop("patience", None)
    guard = {"max_bad_steps": 3, "max_rollbacks": 2} | changes.pop("guard", {})
    return Trainer(
        engine,
        Loader(),
        evaluators=changes.pop("evaluators", []),
        writer=sink,
        monitor=None,
        progress=sink,
        checkpoints=Checkpoints(folder / "checkpoints", engine, keep=keep),
        guard=Guard(engine, folder / "bad_steps.jsonl", **guard, tell=sink.message),
        schedules=Schedules(
            build_schedule(
                engine.optimizer,
                name="cosine",
                total_steps=6,
                warmup_steps=2,
                warmup_lr=0,
                min_lr=0,
            ),
            dials,
        ),
        settings=TrainerSettings(**(settings | changes)),
        state=state,
        signals=signals,
        patience=patience,
    )


@pytest.fixture(autouse=True)
def _one_writer(monkeypatch):
    monkeypatch.setattr("routedvit.training.checkpoints.commit.writer_of", lambda path: 0)


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


def test_curves_are_on_disk_up_to_every_checkpoint(tmp_path):
    """A run that is killed and resumed must not have a hole in them."""
    sink, checkpoints = Sink(), tmp_path / "checkpoints"
    written: list[set[int]] = []

    def flush() -> None:
        if not (checkpoints / "step_00000004").exists():
            written.append({step for name, step in sink.scalars if name == "train/loss"})

    sink.flush = flush
    trainer(tmp_path, FakeEngine(), sink, RunState(), log_every=1).fit()
    assert written[-1] == {1, 2, 3, 4}


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
    assert "step 5 skipped" in sink.messages[0]
    assert sink.scalars["train/skipped_steps", 6] == 2


def test_the_loss_scale_is_logged_and_told_with_a_skipped_step(tmp_path):
    engine, sink = FakeEngine(), Sink()
    engine.skip_from, engine.loss_scale, engine.scales_loss = 6, 1024.0, True
    trainer(tmp_path, engine, sink, RunState()).fit()
    assert sink.scalars["train/loss_scale", 2] == 1024
    assert "loss scale 1024" in sink.messages[0]


def ledger(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "bad_steps.jsonl").read_text().splitlines()]


def test_the_run_goes_back_and_on_past_the_bad_data(tmp_path):
    engine, sink = FakeEngine(), Sink()
    engine.losses = dict.fromkeys((20, 24, 28), float("nan"))  # steps 6, 7 and 8
    run = trainer(tmp_path, engine, sink, RunState(), total_steps=9)
    summary = run.fit()
    assert summary.finished
    assert summary.skipped_steps == 3
    # Steps 1 to 8, then from the checkpoint of step 4 on steps 5 to 9 on the data after the bad.
    assert engine.seen == [*range(0, 32, 4), *range(32, 52, 4)]
    assert run.state.samples_seen == 52
    lines = ledger(tmp_path)
    assert [line.get("step") for line in lines] == [6, 7, 8, None]
    assert lines[0]["keys"] == [["key20", "key21", "key22", "key23"]]
    assert lines[-1] == {"back_to_step": 4, "never_trained_on": [16, 32]}
    assert any("back to step 4" in message for message in sink.messages)


def test_a_resume_right_after_going_back_does_not_meet_the_bad_data_again(tmp_path):
    engine = FakeEngine()
    engine.losses = dict.fromkeys((20, 24, 28), float("nan"))
    run = trainer(tmp_path, engine, Sink(), RunState(), total_steps=9)
    batches = run.loader.batches(0)
    while not run.guard.alarm:
        run.train_step(batches)
        if run.state.step == 4:
            run.save(must=True)
    run.go_back()  # and the machine dies
    state = Checkpoints(tmp_path / "checkpoints", engine, keep=2).load_newest()
    assert (state.step, state.samples_seen) == (4, 32)
    engine.seen.clear()
    assert trainer(tmp_path, engine, Sink(), state, total_steps=9).fit().finished
    assert engine.seen == [*range(32, 52, 4)]


def test_a_run_that_goes_back_too_often_ends_in_words(tmp_path):
    engine = FakeEngine()
    engine.losses = dict.fromkeys(range(20, 400), float("nan"))
    run = trainer(tmp_path, engine, Sink(), RunState(), total_steps=99)
    with pytest.raises(ConfigError, match=r"steps 5 to 7 .* gone back 2 times.*optim\.lr"):
        run.fit()


def test_a_run_goes_back_again_once_earlier_returns_are_forgiven(tmp_path):
    engine = FakeEngine()
    engine.losses = {position: float("nan") for start in (20, 80, 140) for position in
                     range(start, start + 12, 4)}  # fmt: skip
    forgiving = {"forgive_after": 10, "max_rollbacks": 1}
    run = trainer(tmp_path, engine, Sink(), RunState(), total_steps=40, guard=forgiving)
    assert run.fit().finished
    assert len(run.checkpoints.rollbacks()) == 3


def test_a_run_that_dies_after_each_return_still_goes_back_no_oftener(tmp_path):
    engine = FakeEngine()
    engine.losses = dict.fromkeys(range(20, 400, 4), float("nan"))
    state = RunState()
    for _ in range(2):  # max_rollbacks
        run = trainer(tmp_path, engine, Sink(), state, total_steps=99)
        batches = run.loader.batches(run.state.samples_seen)
        while not run.guard.alarm:
            run.train_step(batches)
            if run.state.step == 4:
                run.save(must=True)
        run.go_back()
        state = run.checkpoints.load_newest()
    with pytest.raises(ConfigError, match="gone back 2 times"):
        trainer(tmp_path, engine, Sink(), state, total_steps=99).fit()


def test_a_resumed_run_knows_a_spike_as_an_uninterrupted_one(tmp_path):
    watch = {"spike_sigmas": 6.0, "spike_window": 16, "max_bad_steps": 2}
    seen = []
    for stops in (False, True):
        engine, sink, folder = FakeEngine(), Sink(), tmp_path / str(stops)
        engine.losses = dict.fromkeys((92, 96), 9.0)  # steps 24 and 25
        state = RunState()
        for total in (20, 30) if stops else (30,):
            run = trainer(folder, engine, sink, state, total_steps=total, guard=watch)
            run.fit()
            state = run.checkpoints.load_newest()
        assert sum("back to step" in message for message in sink.messages) == 1
        seen.append(engine.seen)
    assert seen[0] == seen[1]


def test_going_back_keeps_the_config_of_this_start(tmp_path):
    engine = FakeEngine()
    engine.losses = dict.fromkeys((20, 24, 28), float("nan"))
    run = trainer(tmp_path, engine, Sink(), RunState(config={"name": "old"}), total_steps=4)
    run.fit()
    state = run.checkpoints.load_newest()
    state.config, state.versions = {"name": "new"}, {"torch": "3"}
    run = trainer(tmp_path, engine, Sink(), state, total_steps=9)
    run.fit()
    saved = read_run_state(run.checkpoints.path_of(9))
    assert (saved.config, saved.versions) == ({"name": "new"}, {"torch": "3"})


def test_a_run_that_was_killed_does_not_look_stopped(tmp_path):
    class Killed(BaseException):
        pass

    engine, status = FakeEngine(), tmp_path / "status.json"
    trainer(tmp_path, engine, Sink(), RunState(), total_steps=4).fit()
    assert json.loads(status.read_text()) == {"status": "finished", "step": 4}
    run = trainer(tmp_path, engine, Sink(), RunState(step=4, samples_seen=16))

    def die(*args: Any, **kwargs: Any) -> Any:
        raise Killed

    engine.train_step = die
    with pytest.raises(Killed):
        run.fit()
    assert json.loads(status.read_text()) == {"status": "running", "step": 4}


def test_without_a_checkpoint_to_go_back_to_the_run_ends_in_words(tmp_path):
    engine = FakeEngine()
    engine.skip_from = 1
    run = trainer(tmp_path, engine, Sink(), RunState(), total_steps=99)
    with pytest.raises(ConfigError, match="no checkpoint from before"):
        run.fit()
    assert run.state.step == 3


def test_a_checkpoint_is_not_taken_amid_bad_steps_but_after_them(tmp_path):
    engine = FakeEngine()
    engine.losses = dict.fromkeys((12, 16), float("nan"))  # step 4, which would save, and 5
    trainer(tmp_path, engine, Sink(), RunState(), total_steps=9, keep=9).fit()
    assert sorted(path.name[-1] for path in tmp_path.glob("checkpoints/step_*")) == ["6", "8", "9"]


def test_curves_go_back_with_the_run(tmp_path):
    """Else they would have the steps after it twice."""
    engine, sink = FakeEngine(), Sink()
    engine.losses = dict.fromkeys((20, 24, 28), float("nan"))  # steps 6, 7 and 8
    run = trainer(tmp_path, engine, sink, RunState(), total_steps=9)
    back = []
    run.writer.rewind = back.append
    run.fit()
    assert back == [4]


def test_a_larger_image_is_no_spike(tmp_path):
    """Losses of another image size or capacity are another matter."""
    watch = {"spike_sigmas": 6.0, "spike_window": 16, "max_bad_steps": 2}

    class Dial:
        def turn(self, step):
            self.large = step >= 30

        def rest(self): ...

        def scalars(self):
            return {}

        def setting(self):
            return str(self.large)

    for dials, returns in ([Dial()], 0), ([], 1):
        engine, sink = FakeEngine(), Sink()
        engine.losses = dict.fromkeys(range(120, 200, 4), 1.5)  # from step 30 on
        run = trainer(
            tmp_path / str(returns), engine, sink, RunState(), total_steps=40, guard=watch
        )
        run.schedules.dials = tuple(dials)
        if returns:
            with pytest.raises(ConfigError, match="gone back"):
                run.fit()
        else:
            assert run.fit().finished
        assert any("back to step" in message for message in sink.messages) == bool(returns)


def test_a_best_amid_bad_steps_is_not_kept_as_one(tmp_path):
    engine = FakeEngine()
    engine.losses = {12: float("nan")}  # step 4, which evaluates
    keep = Retention(keep=9, keep_best=1)
    evaluators = [Evaluator([50.0, 10.0, 10.0], every_steps=4)]
    run = {"total_steps": 9, "evaluators": evaluators, "keep": keep, "checkpoint_every": 99}
    trainer(tmp_path, engine, Sink(), RunState(), **run).fit()
    assert sorted(path.name[-1] for path in tmp_path.glob("checkpoints/step_*")) == ["8", "9"]


def test_a_stop_amid_bad_steps_leaves_a_checkpoint_to_go_back_to(tmp_path):
    engine = FakeEngine()
    engine.losses = dict.fromkeys((20, 24, 28, 32), float("nan"))  # steps 6 to 9
    run = trainer(tmp_path, engine, Sink(), RunState(), total_steps=20, keep=1)
    train_step = run.train_step

    def stopped_in_step_7(batches: Any) -> Any:
        return train_step(batches)._replace(stop=run.state.step == 7)

    run.train_step = stopped_in_step_7
    assert run.fit().step == 7
    assert sorted(path.name[-1] for path in tmp_path.glob("checkpoints/step_*")) == ["4", "7"]


def test_a_wish_to_stop_before_the_first_step_takes_none(tmp_path):
    engine = FakeEngine()
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)  # while a checkpoint is loaded, say
        state = RunState(step=2, samples_seen=8)
        summary = trainer(tmp_path, engine, Sink(), state, signals=signals).fit()
    assert not summary.finished
    assert engine.seen == []
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "stopped"


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


def test_a_full_disk_does_not_stop_the_run_but_the_last_save_must_succeed(tmp_path):
    engine, sink = FakeEngine(), Sink()
    engine.full_disks = 1
    summary = trainer(tmp_path, engine, sink, RunState(), total_steps=9).fit()
    assert summary.finished
    assert any("No space left" in text and "goes on" in text for text in sink.messages)
    assert sorted(path.name[-1] for path in tmp_path.glob("checkpoints/step_*")) == ["8", "9"]
    engine.full_disks = 9
    with pytest.raises(SaveError, match=r"No space left.*goes on from the beginning"):
        trainer(tmp_path / "other", engine, sink, RunState(), total_steps=2).fit()
    state = RunState(step=9, samples_seen=36)
    with pytest.raises(SaveError, match=r"No space left.*goes on from step_00000009"):
        trainer(tmp_path, engine, sink, state, total_steps=10).fit()


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


class Norms(FakeEngine):
    """Has a gradient while the step is not made."""

    def train_step(self, batches: Any, *, stop: bool = False, before_step: Any = None) -> Any:
        if before_step is not None:
            before_step()
        return super().train_step(batches, stop=stop)

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


def test_a_disk_too_full_for_a_word_does_not_end_a_run_that_saved(tmp_path, monkeypatch):
    sink = Sink()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("routedvit.training.trainer.write_status", full)
    assert trainer(tmp_path, FakeEngine(), sink, RunState()).fit().finished
    assert any("status.json does not say 'finished'" in message for message in sink.messages)
