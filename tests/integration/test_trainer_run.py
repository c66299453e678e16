"""Through the real launcher, two ranks: a run that is stopped and started again loses nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.integration.launching import HERE, launch


@pytest.fixture(scope="module")
def report(tmp_path_factory: Any) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("trainer")
    launch(HERE / "trainer_script.py", out)
    return json.loads((out / "report.json").read_text())


def test_a_run_goes_to_the_end(report: dict[str, Any]) -> None:
    summary = report["straight"]["summary"]
    assert summary["step"] == 10
    assert summary["finished"]
    assert summary["checkpoint"] == "step_00000010"
    assert summary["images_per_second"] > 0
    assert report["straight"]["status"] == {"status": "finished", "step": 10}


def test_everything_has_its_cadence(report: dict[str, Any]) -> None:
    run = report["straight"]
    assert run["updates"] == [0, 1, 3, 6, 9, 10]
    assert run["watched"] == [1, 4, 8, 10]
    assert [step for name, step in run["scalars"] if name == "val/top1"] == [4, 8, 10]
    names = {name for name, step in run["scalars"] if step == 1}
    assert names >= {
        "train/loss", "train/top1", "train/learning_rate", "train/gradient_norm",
        "speed/images_per_second", "speed/data_wait_share",
    }  # fmt: skip


def test_the_rank_that_waits_for_data_is_named_though_the_writer_is_another(report: Any) -> None:
    run = report["late"]
    said = [message for message in run["messages"] if "waits for data" in message]
    assert len(said) == 1
    assert said[0].startswith("warning: rank 1 on ")
    compared = {name for name, step in run["scalars"] if step == 10}
    assert compared >= {"speed/slowest_forward_over_median", "speed/data_wait_share_most"}


def test_sigterm_on_one_rank_saves_on_all_within_the_step(report: dict[str, Any]) -> None:
    run = report["stopped"]
    assert run["summary"]["step"] == 5
    assert not run["summary"]["finished"]
    assert run["summary"]["checkpoint"] == "step_00000005"
    assert run["status"] == {"status": "stopped", "step": 5}


def test_the_run_goes_on_where_it_stopped(report: dict[str, Any]) -> None:
    run = report["resumed"]
    assert run["updates"][0] == 5
    assert run["summary"]["step"] == 10
    assert run["summary"]["best"] == report["straight"]["summary"]["best"]


def test_the_weights_are_those_of_the_uninterrupted_run(report: dict[str, Any]) -> None:
    assert report["resume_is_bit_identical"]


def test_a_finished_run_does_nothing_more(report: dict[str, Any]) -> None:
    run = report["again"]
    assert run["summary"]["finished"]
    assert run["summary"]["best"] == report["straight"]["summary"]["best"]
    assert run["updates"] == [10]
    assert run["scalars"] == []


def test_a_run_that_was_killed_in_its_last_evaluation_only_evaluates(
    report: dict[str, Any],
) -> None:
    run = report["unevaluated"]
    assert run["summary"]["finished"]
    assert run["summary"]["best"] == report["straight"]["summary"]["best"]
    assert run["updates"] == [10]
    assert run["given"] == []
    assert {tuple(scalar) for scalar in run["scalars"]} >= {("val/top1", 10)}


def test_bad_steps_in_a_row_lead_back_to_a_checkpoint_and_past_their_data(report: Any) -> None:
    run = report["damaged"]
    assert run["summary"]["finished"]
    assert run["summary"]["skipped_steps"] == 3
    given = [int(key.removeprefix("key")) // 8 for key in run["given"]]
    batches = [given[index] for index in range(0, len(given), 4)]  # 4 of 8 images are rank 0's
    assert batches[:14] == [*range(8), *range(8, 14)]  # steps 1 to 8, then 5 to 10
    *bad_steps, back = report["ledger"]
    assert [line["step"] for line in bad_steps] == [6, 7, 8]
    assert bad_steps[0]["keys"] == [
        ["key40", "key41", "key42", "key43"], ["key44", "key45", "key46", "key47"],
    ]  # fmt: skip
    assert [loss != loss for loss in bad_steps[0]["loss"]] == [True, False]  # rank 0 had the NaN
    assert back == {"back_to_step": 4, "never_trained_on": [4 * 8, 8 * 8]}


def test_sigusr1_on_one_rank_saves_on_all_within_the_step(report: dict[str, Any]) -> None:
    run = report["damaged_and_stopped"]
    assert run["summary"]["step"] == 6
    assert run["status"] == {"status": "stopped", "step": 6}


def test_a_resume_agrees_on_what_was_passed_over(report: dict[str, Any]) -> None:
    first, then = report["damaged_and_stopped"]["given"], report["damaged_and_resumed"]["given"]
    assert then[0] == f"key{10 * 8}"
    assert not set(then) & set(first[: 10 * 4])
    assert report["resume_after_going_back_is_bit_identical"]


def test_all_ranks_of_a_start_end_in_words_once_a_newer_one_began(report: dict[str, Any]) -> None:
    first, second = report["overtaken"]["ends"]
    assert "another start of this run" in first
    assert second == first
    assert report["overtaken"]["checkpoints"] == ["latest", "run_id", "step_00000004"]


def test_a_checkpoint_that_was_being_written_when_all_crashed_is_gone_on_from(report: Any) -> None:
    run = report["crashed"]
    assert run["seen"] == []
    assert run["published"] == ["step_00000004"]
    assert run["first"] == "key32"  # of rank 0, the data of step 5
    assert run["kept"] == ["step_00000008", "step_00000010"]  # in the background, and the last
    assert run["is_bit_identical"]
