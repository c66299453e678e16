"""Through the real launcher, two ranks: what changes by step, groups and overflows under ZeRO."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.integration import toy
from tests.integration.launching import HERE, launch

WEIGHT_TOLERANCE = 1e-5  # see test_engine_stages.py
STAGES = pytest.mark.parametrize("stage", [0, 1, 2, 3])


@pytest.fixture(scope="module")
def report(tmp_path_factory: Any) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("recipes")
    launch(HERE / "recipes_script.py", out, timeout=400)
    return json.loads((out / "report.json").read_text())


@STAGES
def test_the_average_is_that_of_a_plain_loop_with_timm(report: dict[str, Any], stage: int) -> None:
    """Capacity and image size change by step on the way, and are the same in both."""
    run = report[f"average{stage}"]
    assert run["weights"] < WEIGHT_TOLERANCE
    assert run["average"] < WEIGHT_TOLERANCE
    assert run["moved"] > 50 * WEIGHT_TOLERANCE, "the average must differ from the weights"


@STAGES
def test_the_averages_take_the_weights_place_and_leave_no_trace(report: Any, stage: int) -> None:
    run = report[f"average{stage}"]
    assert run["swap_is_seen"]
    assert run["logits"] < 1e-6
    assert run["exported"] < 1e-6
    assert run["restored"]


@STAGES
def test_a_skipped_step_leaves_the_average(report: dict[str, Any], stage: int) -> None:
    run = report[f"average{stage}"]
    assert run["skipped"]
    assert run["skipped_left_average"]


@STAGES
def test_a_resume_is_bit_identical_with_average_capacity_and_image_size(
    report: dict[str, Any], stage: int
) -> None:
    assert report[f"average{stage}"]["loaded"]
    assert report[f"average{stage}"]["resumed"]


@pytest.mark.parametrize("stage", [1, 3])
def test_in_bf16_the_average_is_that_of_the_fp32_masters(report: Any, stage: int) -> None:
    run = report[f"bf16_{stage}"]
    assert run["average"] == 0
    assert run["dtype"] == "torch.float32"
    assert run["swap_is_seen"]
    assert run["restored"]


@STAGES
def test_decay_and_layer_rates_act_on_each_parameter(report: dict[str, Any], stage: int) -> None:
    """Gradients are zero: a weight shrinks by its own rate times its decay, a vector stays."""
    groups = report[f"groups{stage}"]
    for name, (left, expected) in groups.items():
        assert left == pytest.approx(expected, abs=1e-7), name
    kept = {name for name, (_, expected) in groups.items() if expected == 1}
    assert {"pos_embed", "blocks.0.mlp.router.weight", "fc_norm.weight"} <= kept
    rates = {1 - expected for _, expected in groups.values() if expected < 1}
    assert len(rates) >= 3, "layer decay makes a rate for each layer"


@STAGES
def test_a_gradient_that_overflows_on_one_rank_is_skipped_on_all(report: Any, stage: int) -> None:
    """The losses are finite; weights stay as they were, and equal bit for bit on both ranks."""
    first, second = report[f"overflow{stage}"]["ranks"]
    for rank in (first, second):
        assert rank["loss_is_finite"] == [True, True]
        assert rank["skipped"] == [True, True]
        assert rank["unchanged"]
        assert rank["acts_again"]
    assert first["weights"] == second["weights"]
    assert first["weights_after"] == second["weights_after"]


@STAGES
def test_steps_that_overflow_are_counted_told_and_in_the_ledger(report: Any, stage: int) -> None:
    seen = report[f"overflow{stage}"]
    for rank in seen["ranks"]:
        assert rank["bad_steps"] == [1, 2]
        for step, line in zip([1, 2], rank["told"], strict=True):
            assert f"step {step} skipped: its loss or gradient is not finite" in line
    lines = [json.loads(line) for line in seen["ledger"]]
    assert [(line["step"], line["applied"]) for line in lines] == [(1, False), (2, False)]
    half = toy.BATCH // 2
    assert [len(keys) for line in lines for keys in line["keys"]] == [half] * 4
