"""A checkpoint goes on under any number of ranks and any ZeRO stage as if nothing had changed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.integration.launching import HERE, run_script

# fp32 sums in another order. bf16 rounds to 2**-8 of a value, in other places where micro-batches
# are others; where a gradient is hardly more than that, Adam makes a step of up to the rate of it.
LOSS_TOLERANCE = {"fp32": 1e-6, "bf16": 1e-3}
WEIGHT_TOLERANCE = {"fp32": 1e-5, "bf16": 2 * 2e-3}  # two steps at 2e-3


@pytest.fixture(scope="module", params=["some", pytest.param("all", marks=pytest.mark.slow)])
def entries(request: pytest.FixtureRequest, tmp_path_factory: Any) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("reshard")
    run_script(HERE / "reshard_script.py", request.param, out)
    return json.loads((out / "report.json").read_text())


def test_weights_and_optimiser_state_are_bit_for_bit_those_that_were_saved(entries: Any) -> None:
    """fp32 master weights too where the model computes in bf16."""
    assert {entry["case"]: entry["not_equal"] for entry in entries if entry["not_equal"]} == {}
    assert all(entry["consistent"] for entry in entries)


def test_losses_go_on_as_in_the_uninterrupted_run(entries: Any) -> None:
    for entry in entries:
        expected = pytest.approx(entry["expected_losses"], abs=LOSS_TOLERANCE[entry["dtype"]])
        assert entry["losses"] == expected, entry["case"]


def test_weights_end_as_in_the_uninterrupted_run(entries: Any) -> None:
    for entry in entries:
        assert entry["largest_difference"] < WEIGHT_TOLERANCE[entry["dtype"]], entry["case"]


def test_on_the_same_ranks_and_stage_the_run_is_bit_identical(entries: Any) -> None:
    same = [entry for entry in entries if entry["same_layout"]]
    assert same
    for entry in same:
        assert entry["losses"] == entry["expected_losses"], entry["case"]
        assert entry["largest_difference"] == 0, entry["case"]
