"""Through the real launcher, two ranks: averages, capacities, image sizes and groups under ZeRO."""

from __future__ import annotations

import json
from typing import Any

import pytest

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
