"""What the network was given in training: FLOPs counted once, at the capacity of their step."""

from __future__ import annotations

import mmap

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import routedvit  # noqa: F401  (registers the models)
from routedvit.training.watch.gauges import (
    ForwardCounter,
    forward_flops,
    measured_flops,
    memory,
    peak_of,
    weight_decay,
)

IMAGES = torch.randn(3, 3, 64, 64)


def model(name: str = "colt5_vit_test", **kwargs: int) -> torch.nn.Module:
    return timm.create_model(name, img_size=64, depth=2, num_classes=3, **kwargs)


def test_utilisation_is_three_forwards_per_image_over_the_peak() -> None:
    network = model().train()
    counter = ForwardCounter(network, forward_flops, world_size=2, peak_tflops=1e-4)
    network(IMAGES)
    values = counter.read(images_per_second=10.0)
    expected = 3 * network.flops().total * 10.0 / 2 / 1e12
    assert values["speed/tflops_per_device"] == pytest.approx(expected)
    assert values["speed/flop_utilisation"] == pytest.approx(expected / 1e-4)


def test_a_recomputed_block_counts_once_and_evaluation_not_at_all() -> None:
    network = model().train()
    network.set_grad_checkpointing(True)
    counter = ForwardCounter(network, forward_flops)
    network(IMAGES).sum().backward()
    network.eval()
    network(IMAGES)
    expected = 3 * network.flops().total / 1e12
    assert counter.read(1.0)["speed/tflops_per_device"] == pytest.approx(expected)
    assert "speed/tflops_per_device" not in counter.read(1.0)


def test_each_step_counts_at_its_own_capacity() -> None:
    network = model(dense_blocks=1).train()
    counter = ForwardCounter(network, forward_flops)
    flops = []
    for capacity in (0.25, 1.0):
        network.set_capacity(capacity)
        network(IMAGES)
        flops.append(network.flops().total)
    network.set_capacity(0.5)
    values = counter.read(1.0)
    assert values["speed/tflops_per_device"] == pytest.approx(3 * sum(flops) / 2 / 1e12)
    assert values["train/capacity_ffn"] == 1.0  # of the last step; the dense block is left out


def test_a_model_without_a_count_is_measured() -> None:
    dense = model("vit_tiny_patch16_224")
    with FlopCounterMode(display=False) as plain:
        dense(IMAGES[:1])
    assert measured_flops(dense, (3, 64, 64)) == plain.get_total_flops()


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA H200", 989),
        ("Quadro K2000", None),
    ],
)
def test_known_devices_have_their_bf16_peak(name: str, peak: float | None) -> None:
    assert peak_of(name) == peak


def test_memory_is_that_of_this_process() -> None:
    before = memory(torch.device("cpu"))["speed/host_memory_gib"]
    # Pages of its own: malloc may hand out again what an earlier test freed (`keep_freed_memory`).
    with mmap.mmap(-1, 2**28) as block:
        block.write(bytes(2**28))
        assert memory(torch.device("cpu"))["speed/host_memory_gib"] - before > 0.2


def test_the_decay_is_that_of_the_groups_that_decay() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    other = torch.nn.Parameter(torch.zeros(1))
    groups = [{"params": [other], "weight_decay": 0.0}, {"params": [parameter]}]
    assert weight_decay(torch.optim.AdamW(groups, weight_decay=0.3)) == 0.3
