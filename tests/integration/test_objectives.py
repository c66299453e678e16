"""Through the real launcher, two ranks: under ZeRO-3 each objective computes what PyTorch does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from tests.integration import toy
from tests.integration.launching import HERE, launch
from tests.integration.objectives_script import OBJECTIVES, STEPS, held_out, optimizer


@pytest.fixture(scope="module")
def launched(tmp_path_factory: Any) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("objectives")
    launch(HERE / "objectives_script.py", out)
    return out, json.loads((out / "report.json").read_text())


def plain(name: str) -> tuple[list[float], list[float], Any]:
    """Losses, gradient norms and objective of an ordinary loop in one process."""
    objective = OBJECTIVES[name]()
    adamw = optimizer(objective)
    losses, norms = [], []
    for step in range(STEPS):
        rows = toy.batch(range(step * toy.BATCH, (step + 1) * toy.BATCH))
        loss, _ = objective(rows["image"], rows["target"], rows["position"])
        adamw.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(objective.parameters(), toy.GRAD_CLIP)))
        adamw.step()
        losses.append(loss.item())
    return losses, norms, objective


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_norms_and_weights_equal_plain_pytorch(name: str, launched: Any) -> None:
    """Masks too: two ranks with accumulation hide what one process hides."""
    out, report = launched
    losses, norms, objective = plain(name)
    assert report[name]["losses"] == pytest.approx(losses, abs=1e-5)
    assert report[name]["norms"] == pytest.approx(norms, rel=1e-3)
    weights = load_file(out / f"{name}.safetensors")
    expected = dict(objective.model.named_parameters())
    assert weights.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(weights[key], value.detach(), rtol=0, atol=2e-5)


def test_the_held_out_loss_is_that_of_one_process(launched: Any) -> None:
    value = launched[1]["mae"]["held_out"]
    objective = plain("mae")[2]
    assert value == pytest.approx(held_out(objective.eval()), abs=1e-4)


def test_bf16_stays_near(launched: Any) -> None:
    report = launched[1]
    assert report["bf16"]["losses"] == pytest.approx(report["mae"]["losses"], rel=0.02)


def test_pictures_are_drawn_by_rank_zero_under_zero_3(launched: Any) -> None:
    assert launched[1]["pictures"] == ["reconstruction"] * 4  # two steps in two runs


def test_an_encoder_is_exported_for_timm_without_its_decoder(launched: Any) -> None:
    folder = launched[0] / "weights"
    assert not any("decoder" in name for name in load_file(folder / "model.safetensors"))
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=toy.CLASSES)
    weights = load_file(launched[0] / "mae.safetensors")
    assert torch.equal(model.blocks[1].attn.heavy.q.weight, weights["blocks.1.attn.heavy.q.weight"])
    assert model(toy.batch(range(2))["image"]).shape == (2, toy.CLASSES)


def test_checkpoints_hold_the_decoder_and_no_teacher(launched: Any) -> None:
    out = launched[0]
    names = {}
    for folder in ("state_mae_3", "state_distill_3"):
        tables = [json.loads(file.read_text()) for file in (out / folder).rglob("rank_*.json")]
        names[folder] = {piece[0] for table in tables for piece in table["pieces"]}
    assert any(name.startswith("decoder.") for name in names["state_mae_3"])
    assert all(name.startswith("model.") for name in names["state_distill_3"])
    assert {tuple(metrics) for metrics in launched[1]["distill"]["metrics"]} == {
        ("top1", "agreement")
    }
