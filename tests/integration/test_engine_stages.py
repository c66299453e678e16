"""Through the real launcher, two ranks: every ZeRO stage computes what plain PyTorch computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from routedvit.training.checkpoints.full_weights import full_weights
from routedvit.training.checkpoints.stored_weights import NETWORK
from tests.integration import toy
from tests.integration.launching import HERE, launch

# fp32 sums in another order: a few units in the last place, amplified by AdamW's division.
LOSS_TOLERANCE = 1e-6
WEIGHT_TOLERANCE = 1e-5
PATHS = ("light", "heavy", "router")


@pytest.fixture(scope="module")
def plain() -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    return toy.plain_run()


@pytest.fixture(scope="module", params=[0, 1, 2, 3], ids=lambda stage: f"zero{stage}")
def launched(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[int, Path, dict]:
    out = tmp_path_factory.mktemp(f"zero{request.param}")
    launch(HERE / "engine_script.py", request.param, out)
    return request.param, out, json.loads((out / "report.json").read_text())


def test_losses_and_norms_equal_plain_pytorch(launched: Any, plain: Any) -> None:
    _, _, report = launched
    losses, norms, _ = plain
    assert [step["loss"] for step in report["steps"]] == pytest.approx(losses, abs=LOSS_TOLERANCE)
    assert [step["grad_norm"] for step in report["steps"]] == pytest.approx(norms, rel=1e-3)


def test_gradient_norms_per_place_add_up_to_the_global_norm(launched: Any) -> None:
    _, _, report = launched
    for step, norms in zip(report["steps"], report["norms"], strict=True):
        for places in ("all/", "/all"):
            squares = [norm**2 for place, norm in norms.items() if places in f"{place}"]
            assert sum(squares) ** 0.5 == pytest.approx(step["grad_norm"], rel=1e-4)
        assert min(norms[f"block_0{block}/{path}"] for block in (0, 1) for path in PATHS) > 0


def test_every_weight_equals_plain_pytorch(launched: Any, plain: Any) -> None:
    """Weights after steps with layer decay, no-decay groups, clipping and accumulation."""
    _, out, _ = launched
    weights, expected = load_file(out / "final.safetensors"), plain[2]
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            weights[name], value, rtol=0, atol=WEIGHT_TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(launched: Any) -> None:
    _, _, report = launched
    assert report["skipped"]
    assert report["skipped_left_weights"]
    assert not any(step["skipped"] for step in report["steps"])


def test_a_wish_to_stop_on_one_rank_reaches_all(launched: Any) -> None:
    assert [step["stop"] for step in launched[2]["steps"]] == [False, False, True, False]


def test_that_one_rank_is_still_writing_reaches_all(launched: Any) -> None:
    assert [step["writing"] for step in launched[2]["steps"]] == [False, True, False, False]


def test_resume_is_bit_identical(launched: Any) -> None:
    _, _, report = launched
    assert report["resume_is_bit_identical"]
    assert report["state"]["samples_seen"] == 2 * toy.BATCH
    assert report["state"]["best"] == {"val/top1": 12.5}


def test_a_checkpoint_in_the_background_is_not_seen_before_it_is_whole(launched: Any) -> None:
    assert launched[2]["seen_too_early"] is False


def test_only_the_newest_checkpoints_are_kept(launched: Any) -> None:
    _, out, report = launched
    assert report["kept"] == ["step_00000002", "step_00000004"]
    assert not list(out.glob("**/*.tmp"))


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(launched: Any) -> None:
    _, out, report = launched
    step, told = report["fallback"]
    assert step == 2
    assert len(told) == 1
    assert "step_00000004" in told[0]
    assert "SHA-256" in told[0]
    assert (out / "resumed" / "latest").read_text() == "step_00000002\n"


def test_exported_weights_give_equal_logits(launched: Any) -> None:
    _, out, _ = launched
    path = out / "weights" / "model.safetensors"
    images = toy.batch(range(8))["image"]
    expected = load_file(out / "logits.safetensors")["logits"]
    model = timm.create_model(toy.MODEL, checkpoint_path=str(path), **toy.KWARGS).eval()
    torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-6)
    by_config = timm.create_model(f"local-dir:{out / 'weights'}", pretrained=True).eval()
    assert torch.equal(by_config(images), model(images))


def test_whole_weights_are_read_without_an_engine(launched: Any) -> None:
    _, out, _ = launched
    found = full_weights(out / "straight" / f"step_{toy.STEPS:08d}")
    expected = load_file(out / "final.safetensors")
    assert all(torch.equal(found[NETWORK + name], value) for name, value in expected.items())


def test_frozen_features_are_those_of_the_exported_model(launched: Any) -> None:
    _, out, _ = launched
    model = timm.create_model(f"local-dir:{out / 'weights'}", pretrained=True).eval()
    with torch.no_grad():
        tokens = model.forward_features(toy.batch(range(8))["image"])
        expected = model.forward_head(tokens, pre_logits=True)
    found = load_file(out / "logits.safetensors")["features"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_flops_are_those_of_the_whole_model(launched: Any) -> None:
    assert launched[2]["flops"] == toy.model().flops().total  # type: ignore[operator]


def test_routing_can_be_read_under_any_stage(launched: Any) -> None:
    assert any(name.startswith("blocks.0.") for name in launched[2]["routers"])
