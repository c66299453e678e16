"""Accuracy against capacity, and speed: what they say, and that they leave no trace."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from torch import nn

import routedvit  # noqa: F401  (registers the models)
from routedvit.training.config.run import ConfigError
from routedvit.training.config.watch import EvalConfig
from routedvit.training.evaluators import Classification, build_evaluators
from routedvit.training.evaluators.capacity_sweep import CapacitySweep
from routedvit.training.evaluators.throughput import WARMUP, Throughput
from routedvit.training.interfaces import EvalLoaders, Table


class Loader:
    num_samples = 6

    def __iter__(self) -> Iterator[dict[str, Any]]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(2):
            yield {
                "image": torch.randn(3, 3, 64, 64, generator=generator),
                "target": torch.randint(0, 5, (3,), generator=generator),
                "valid": torch.ones(3, dtype=torch.bool),
            }


def model(**kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("colt5_vit_test", img_size=64, depth=2, num_classes=5, **kwargs)


def numbers(evaluator: Any, network: nn.Module) -> dict[str, float]:
    return {name: value for name, value in evaluator.run(network) if isinstance(value, float)}


def test_each_share_gives_what_a_model_built_with_it_gives() -> None:
    values = numbers(CapacitySweep(Loader(), [0.25, 1.0], every_steps=0), model())
    for share in (0.25, 1.0):
        built = model(q_capacity=share, kv_capacity=share, ffn_capacity=share)
        expected = numbers(Classification(Loader(), every_steps=0), built)
        for metric in ("top1", "top5", "loss"):
            assert values[f"capacity_{share:g}/{metric}"] == pytest.approx(expected[metric])
        assert values[f"capacity_{share:g}/images_per_second"] > 0
    assert values["capacity_0.25/loss"] != values["capacity_1/loss"]


def test_the_table_has_a_row_per_share() -> None:
    findings = dict(CapacitySweep(Loader(), [0.5, 1.0], every_steps=0).run(model()))
    table = findings["capacities"]
    assert isinstance(table, Table)
    assert [row[0] for row in table.rows] == [0.5, 1.0]
    assert table.rows[1][1] == findings["capacity_1/top1"]


@pytest.mark.parametrize("breaks", [False, True])
def test_the_model_keeps_its_own_capacities(breaks: bool) -> None:
    network = model(q_capacity=[0.25, 0.75], dense_blocks=1)
    image = torch.randn(1, 3, 64, 64)
    before, arguments = network.eval()(image), json.dumps(network._model_args, default=str)
    sweep = CapacitySweep(Loader(), [0.5], every_steps=0).run(network)
    if breaks:
        next(sweep)
        sweep.close()
    else:
        list(sweep)
    assert torch.equal(network(image), before)
    assert json.dumps(network._model_args, default=str) == arguments


def test_throughput_counts_images_of_the_median_forward() -> None:
    network = model()
    calls: list[int] = []
    network.register_forward_hook(lambda _, args, __: calls.append(len(args[0])))
    values = numbers(Throughput(Loader(), every_steps=0, forwards=4), network)
    assert values["inference_images_per_second"] > 0
    assert calls == [3] * (4 + WARMUP)


def build(config: dict[str, Any], network: nn.Module, **changes: Any) -> list[Any]:
    section = EvalConfig.model_validate(config)
    return build_evaluators(
        section, network, EvalLoaders(Loader(), Loader()), steps=lambda e: round(10 * e), **changes
    )


def test_each_evaluator_has_its_own_cadence() -> None:
    config = {
        "every_epochs": 2.0,
        "knn": {"every_epochs": 4.0},
        "linear_probe": {},
        "capacities": {"every_epochs": 8.0},
        "throughput": {},
    }
    found = {type(one).__name__: one.every_steps for one in build(config, model())}
    assert found == {
        "Classification": 20, "NearestNeighbours": 40, "LinearProbe": 0,
        "CapacitySweep": 80, "Throughput": 0,
    }  # fmt: skip


def test_without_classes_there_is_no_top1() -> None:
    found = build({"knn": {}}, model(), classifies=False)
    assert [type(one).__name__ for one in found] == ["NearestNeighbours"]


def test_a_sweep_of_a_model_that_does_not_route_is_refused() -> None:
    dense = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32)
    with pytest.raises(ConfigError, match=r"eval\.capacities needs a routed model"):
        build({"capacities": {}}, dense)
