"""Gradient norms: each parameter in one place, and the squares add up."""

import math

import pytest
import timm
import torch
from torch import nn

import routedvit  # noqa: F401  (registers the models)
from routedvit.training.watch.gradients import gradient_norms, place


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blocks.3.mlp.heavy.fc1.bias", ("block_03", "heavy")),
        ("blocks.11.attn.light.qkv.weight", ("block_11", "light")),
        ("blocks.0.attn.q_router.weight", ("block_00", "router")),
        ("blocks.0.mlp.router.weight", ("block_00", "router")),
        ("blocks.0.attn.norm.weight", ("block_00", "other")),
        ("blocks.2.attn.qkv.weight", ("block_02", "other")),
        ("decoder.blocks.1.mlp.fc1.weight", ("decoder.block_01", "other")),
        ("pos_embed", ("rest", "other")),
        ("head.weight", ("rest", "other")),
    ],
)
def test_a_parameter_is_placed_by_its_name(name: str, expected: tuple[str, str]) -> None:
    assert place(name) == expected


def test_norms_are_those_of_the_parameters_of_a_place() -> None:
    model = timm.create_model("colt5_vit_test", img_size=64, depth=2, num_classes=3)
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    gradients = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    norms = gradient_norms(gradients)

    def norm_of(*parts: str) -> float:
        return math.hypot(*(float(g.norm()) for n, g in gradients if all(p in n for p in parts)))

    assert norms["block_01/heavy"] == pytest.approx(norm_of("blocks.1.", "heavy"), rel=1e-5)
    assert norms["block_00/router"] == pytest.approx(norm_of("blocks.0.", "router"), rel=1e-5)
    assert norms["block_01/all"] == pytest.approx(norm_of("blocks.1."), rel=1e-5)
    assert norms["all/light"] == pytest.approx(norm_of("light"), rel=1e-5)
    whole = float(nn.utils.get_total_norm([g for _, g in gradients]))
    blocks = math.hypot(*(v for k, v in norms.items() if k.endswith("/all")))
    paths = math.hypot(*(v for k, v in norms.items() if k.startswith("all/")))
    assert blocks == pytest.approx(whole, rel=1e-5)
    assert paths == pytest.approx(whole, rel=1e-5)
    assert "rest/other" not in norms
