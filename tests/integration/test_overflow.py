"""Through the real launcher, two ranks: one rank's gradient overflows and no loss shows it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.integration.launching import HERE, launch

BAD_STEPS = [1, 2]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("overflow")
    launch(HERE / "overflow_script.py", out)
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


@pytest.fixture(params=["0", "1", "2", "3"], ids=lambda stage: f"zero{stage}")
def seen(request: pytest.FixtureRequest, report: dict[str, Any]) -> dict[str, Any]:
    stage: dict[str, Any] = report[request.param]
    return stage


def test_every_rank_skips_what_overflows_on_one(seen: dict[str, Any]) -> None:
    for rank in seen["ranks"]:
        assert rank["loss_is_finite"] == [True, True]
        assert rank["skipped"] == [True, True]


def test_the_weights_are_left_alone_and_equal_on_all_ranks(seen: dict[str, Any]) -> None:
    first, second = seen["ranks"]
    assert first["unchanged"]
    assert second["unchanged"]
    assert first["digest"] == second["digest"]


def test_skipped_steps_are_counted_told_and_in_the_ledger(seen: dict[str, Any]) -> None:
    for rank in seen["ranks"]:
        assert rank["bad_steps"] == BAD_STEPS
        for step, line in zip(BAD_STEPS, rank["told"], strict=True):
            assert f"step {step} skipped: its loss or gradient is not finite" in line
    lines = [json.loads(line) for line in seen["ledger"]]
    assert [line["step"] for line in lines] == BAD_STEPS
    assert not any(line["applied"] for line in lines)
    assert [len(keys) for line in lines for keys in line["keys"]] == [4] * 4


def test_the_next_good_step_acts_alike_on_all_ranks(seen: dict[str, Any]) -> None:
    first, second = seen["ranks"]
    assert first["acts_again"]
    assert second["acts_again"]
    assert first["digest_after"] == second["digest_after"]
