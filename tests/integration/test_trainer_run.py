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
