"""Bad steps and spikes are counted and told, and the run goes back and on past their data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from routedvit.training.checkpoints.checkpoint import Checkpoints
from routedvit.training.checkpoints.retention import Retention
from routedvit.training.checkpoints.run_state import RunState, read_run_state
from routedvit.training.config.run import ConfigError
from tests.unit.training.fake_engine import FakeEngine
from tests.unit.training.trainers import Evaluator, Sink, trainer

pytestmark = pytest.mark.usefixtures("one_writer")


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
