"""Bad steps are told apart, named and counted; good ones cost nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from routedvit.training.engine import StepResult
from routedvit.training.guard import Guard
from tests.unit.training.fake_engine import FakeEngine


class TwoRanks(FakeEngine):
    """A second rank that saw other samples; counts how often it is asked."""

    gathered = 0

    def gather(self, value: Any) -> list[Any]:
        self.gathered += 1
        loss, epoch, keys = value
        return [value, (loss + 1, epoch - 1, [f"other/{key}" for key in keys])]


def batch(*keys: str, epoch: int = 3) -> dict[str, Any]:
    return {"key": list(keys), "epoch": torch.tensor([epoch, epoch + 1])}


def good(loss: float = 1.0) -> StepResult:
    return StepResult(loss, {}, 1.0, False, False, own_loss=loss)


def bad(loss: float = math.nan) -> StepResult:
    return StepResult(loss, {}, math.inf, True, False, own_loss=torch.tensor(2.5))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "logs" / "bad.jsonl").read_text().splitlines()]


@pytest.fixture
def told() -> list[str]:
    return []


def guard(folder: Path, told: list[str], engine: Any = None, **settings: Any) -> Guard:
    path = folder / "logs" / "bad.jsonl"
    return Guard(engine or TwoRanks(), path, tell=told.append, **settings)


def test_the_ledger_names_the_samples_and_losses_of_every_rank(tmp_path, told):
    guard(tmp_path, told).watch(bad(), [batch("a", "b", epoch=5), batch("c", "d")], 7)
    (line,) = lines(tmp_path)
    assert (line["step"], line["epoch"], line["applied"]) == (7, 2, False)
    assert line["keys"] == [["a", "b", "c", "d"], ["other/a", "other/b", "other/c", "other/d"]]
    assert line["loss"] == [2.5, 3.5]
    assert "not finite" in line["reason"]
    assert "step 7 skipped" in told[0]
    other = TwoRanks()
    other.rank = 1
    guard(tmp_path, told, other).watch(bad(), [batch("a")], 8)
    assert len(lines(tmp_path)) == 1  # rank 0 alone writes


def test_good_steps_ask_nobody(tmp_path, told):
    engine = TwoRanks()
    watch = guard(tmp_path, told, engine, spike_sigmas=6.0)
    for step in range(300):
        watch.watch(good(), [batch("a")], step)
    assert engine.gathered == 0
    assert told == []
    assert not (tmp_path / "logs").exists()


def test_only_bad_steps_in_a_row_are_an_alarm(tmp_path, told):
    watch = guard(tmp_path, told, max_bad_steps=2)
    # the loss may be finite where the gradient is not
    for step, result in enumerate([bad(), good(), bad(loss=2.0), bad()]):
        assert not watch.alarm
        watch.watch(result, [batch("a")], step)
    assert watch.alarm
    assert watch.bad_steps == [2, 3]


def test_the_search_for_the_loss_scale_of_fp16_is_no_bad_step(tmp_path, told):
    engine = TwoRanks()
    engine.scales_loss = True
    watch = guard(tmp_path, told, engine, max_bad_steps=2)
    for step in range(20):
        watch.watch(bad(loss=3.0)._replace(loss_scale=2.0**step), [batch("a")], step)
    assert not watch.bad_steps
    assert "loss scale" in told[0]
    watch.watch(bad(loss=math.nan), [batch("a")], 21)
    assert watch.bad_steps == [21]


def noisy(step: int) -> float:
    """A loss that falls from 6 with noise of deviation 0.1."""
    noise = torch.randn((), generator=torch.Generator().manual_seed(step))
    return 6.0 / (1 + step / 500) + 0.1 * float(noise)


def test_a_spike_is_found_and_noise_is_not(tmp_path, told):
    watch = guard(tmp_path, told, spike_sigmas=6.0, spike_window=64)
    for step in range(1000):
        watch.watch(good(noisy(step)), [batch("a")], step)
    assert told == []
    watch.watch(good(noisy(1000) + 2.0), [batch("spiky")], 1000)
    (line,) = lines(tmp_path)
    assert line["keys"][0] == ["spiky"]
    assert line["applied"]
    assert watch.bad_steps == [1000]


def test_a_spike_that_stays_remains_a_spike(tmp_path, told):
    """What is bad does not move the median that it is measured by."""
    watch = guard(tmp_path, told, spike_sigmas=6.0, spike_window=16, max_bad_steps=40)
    for step in range(16):
        watch.watch(good(noisy(step)), [batch("a")], step)
    for step in range(16, 56):
        assert not watch.alarm
        watch.watch(good(20.0), [batch("a")], step)
    assert watch.alarm


@pytest.mark.parametrize(
    ("before", "bound"),
    [
        ([0.9, 1.1] * 8, 1 + 6 * 1.48 * 0.1),  # of a normal distribution 1.48 of it is a sigma
        ([2.0] * 16, 2 + 6 * 0.02),  # a loss that hardly moves: a hundredth of it
    ],
)
def test_a_spike_lies_so_many_deviations_above_the_median_of_a_whole_window(
    tmp_path, told, before, bound
):
    watch = guard(tmp_path, told, spike_sigmas=6.0, spike_window=16)
    for step, loss in enumerate([*before[:-1], 50.0, *before]):  # the first before it is whole
        watch.watch(good(loss), [batch("a")], step)
    assert told == []
    watch.watch(good(bound + 1e-3), [batch("a")], 32)
    assert watch.bad_steps == [32]
    watch.watch(good(bound - 1e-3), [batch("a")], 33)
    assert not watch.bad_steps


def test_spikes_have_a_limit_of_their_own(tmp_path, told):
    watch = guard(tmp_path, told, spike_sigmas=6.0, spike_window=16, max_spikes=2)
    for step in range(16):
        watch.watch(good(noisy(step)), [batch("a")], step)
    for step, result in enumerate([bad(), good(20.0), bad(), good(), good(20.0), good(20.0)]):
        assert not watch.alarm
        watch.watch(result, [batch("a")], 16 + step)
    assert watch.alarm
    assert watch.bad_steps == [20, 21]


def test_a_guard_that_goes_on_from_a_saved_state_judges_alike(tmp_path, told):
    """Through JSON, as in a checkpoint: with the same median, amid bad steps, to the last bit."""
    settings = {"spike_sigmas": 6.0, "spike_window": 16, "max_bad_steps": 3}
    watch = guard(tmp_path, told, **settings)
    for step in range(30):
        watch.watch(good(noisy(step)), [batch("a")], step)
    watch.watch(good(20.0), [batch("a")], 30)
    then = guard(tmp_path, told, **settings)
    then.restore(json.loads(json.dumps(watch.state())))
    told.clear()
    for step in (31, 32):
        for one in (watch, then):
            one.watch(good(noisy(step) + 2.0), [batch("a")], step)
    assert watch.alarm
    assert then.alarm
    assert then.state() == watch.state()
    assert told[0] == told[1]
    assert told[2] == told[3]


def test_earlier_returns_are_forgiven_after_enough_good_steps(tmp_path, told):
    watch = guard(tmp_path, told, forgive_after=3)
    watch.restore({"returns": 2, "good_steps": 0})
    for step, result in enumerate([good(), bad(), good()]):
        watch.watch(result, [batch("a")], step)
    assert watch.returns == 2
    watch.watch(good(), [batch("a")], 3)
    assert watch.returns == 0


def test_spikes_are_ignored_unless_asked_for(tmp_path, told):
    watch = guard(tmp_path, told)
    for step in range(200):
        watch.watch(good(1.0), [batch("a")], step)
    watch.watch(good(1e6), [batch("a")], 200)
    assert not watch.bad_steps


def test_a_ledger_that_cannot_be_written_does_not_end_the_run(tmp_path, told):
    (tmp_path / "logs").write_text("in the way")
    guard(tmp_path, told).watch(bad(), [batch("a")], 1)
    assert any("cannot be written" in text for text in told)


def test_each_setting_has_a_window_of_its_own(tmp_path, told):
    """Sampled capacities: the small one is always worse than the large one, and no spike."""
    watch = guard(tmp_path, told, spike_sigmas=6.0, spike_window=16)
    level = {"x 1": 1.0, "x 1/4": 3.0}
    for step in range(64):
        setting = ("x 1", "x 1/4")[step % 2]
        watch.watch(good(noisy(step) + level[setting]), [batch("a")], step, setting)
    assert not told
    resumed = guard(tmp_path, told, spike_sigmas=6.0, spike_window=16)
    resumed.restore(json.loads(json.dumps(watch.state())))
    resumed.watch(good(noisy(64) + 3.0), [batch("spiky")], 64, "x 1")
    assert "step 64 suspicious" in told[0]


def test_a_window_of_an_older_checkpoint_is_taken_over(tmp_path, told):
    watch = guard(tmp_path, told, spike_sigmas=6.0, spike_window=16)
    watch.restore({"losses": [noisy(step) for step in range(16)]})
    watch.watch(good(20.0), [batch("a")], 30)
    assert "step 30 suspicious" in told[0]
