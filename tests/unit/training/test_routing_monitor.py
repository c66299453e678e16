"""The statistics are what their names say, and watching a model leaves it as it was."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from routedvit.training.routing_monitor import RoutingMonitor, overlap, selection, statistics


class Routing(NamedTuple):
    indices: Tensor
    gates: Tensor
    logits: Tensor
    grid: tuple[int, int]


def route(logits: Tensor, k: int, grid: tuple[int, int]) -> Routing:
    indices = logits.topk(k).indices.sort(1).values
    return Routing(indices, logits.gather(1, indices).sigmoid(), logits, grid)


class Model(nn.Module):
    """Two blocks with two routers each; the logits are `weight` times the mean of a patch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.dropout = nn.Dropout()
        self.calls: list[tuple[bool, bool]] = []

    def routing(self, images: Tensor) -> dict[str, Routing]:
        self.calls.append((self.training, torch.is_grad_enabled()))
        scores = nn.functional.adaptive_avg_pool2d(images.mean(1), (4, 4)).flatten(1) * self.weight
        named = {}
        for block in range(2):
            named[f"blocks.{block}.q"] = route(scores * (-1) ** block, 4, (4, 4))
            named[f"blocks.{block}.ffn"] = route(scores, 6, (4, 4))
        return named


class Recorder:
    def __init__(self) -> None:
        self.scalars: dict[tuple[str, int], float] = {}
        self.images: dict[tuple[str, int], Tensor] = {}

    def scalar(self, name: str, value: float, step: int) -> None:
        self.scalars[name, step] = value

    def image(self, name: str, image: Tensor, step: int) -> None:
        self.images[name, step] = image

    def text(self, name: str, text: str, step: int) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


def probe() -> Tensor:
    return torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def monitor(writer: Recorder, rank: int = 0) -> RoutingMonitor:
    return RoutingMonitor(probe(), writer, mean=[0.0], std=[1.0], rank=rank)


def test_statistics_by_hand() -> None:
    logits = torch.tensor([[4.0, 0.0, 2.0, 2.0], [0.0, 6.0, 1.0, 5.0]])
    routing = Routing(
        torch.tensor([[0, 2], [1, 3]]), torch.tensor([[1.0, 0.5], [1.0, 0.25]]), logits, (2, 2)
    )
    values = statistics(routing, eps=2.0)
    assert values["std_over_eps"] == pytest.approx((math.sqrt(2) + math.sqrt(6.5)) / 2 / 2)
    assert values["mean_gate"] == pytest.approx(2.75 / 4)
    assert values["saturated"] == 0.5
    assert values["margin"] == pytest.approx((0 + 4) / 2 / 2)
    assert values["never_routed"] == 0.0
    p = (logits / 2).softmax(1)
    assert values["entropy"] == pytest.approx((-(p * p.log()).sum(1) / math.log(4)).mean().item())


def test_entropy_is_one_for_equal_logits_and_zero_for_a_single_winner() -> None:
    assert statistics(route(torch.zeros(2, 9), 3, (3, 3)))["entropy"] == pytest.approx(1.0)
    peaked = torch.tensor([[0.0, -math.inf, -math.inf, -math.inf]])
    assert statistics(route(peaked, 1, (2, 2)))["entropy"] == 0.0


def test_positions_no_image_selects_are_counted() -> None:
    always_the_same = torch.arange(16.0).expand(5, 16)
    assert statistics(route(always_the_same, 4, (4, 4)))["never_routed"] == 12 / 16


def test_there_is_no_margin_when_everything_is_selected() -> None:
    assert "margin" not in statistics(route(torch.randn(2, 16), 16, (4, 4)))


def test_a_router_that_selects_nothing_has_no_gates_to_report() -> None:
    values = statistics(route(torch.randn(2, 16), 0, (4, 4)))
    assert set(values) == {"std_over_eps", "entropy", "never_routed"}
    assert values["never_routed"] == 1.0


def test_overlap_is_intersection_over_union() -> None:
    a = selection(Routing(torch.tensor([[0, 1]]), torch.ones(1, 2), torch.zeros(1, 4), (2, 2)))
    b = selection(Routing(torch.tensor([[1, 2]]), torch.ones(1, 2), torch.zeros(1, 4), (2, 2)))
    assert overlap(a, a) == 1.0
    assert overlap(a, b) == pytest.approx(1 / 3)


def test_overlaps_compare_with_the_previous_call_and_the_previous_block() -> None:
    writer, model = Recorder(), Model()
    watch = monitor(writer)
    watch.run(model, 10)
    assert ("routing/block_00/ffn/overlap_steps", 10) not in writer.scalars
    assert ("routing/block_00/ffn/overlap_blocks", 10) not in writer.scalars
    assert writer.scalars["routing/block_01/ffn/overlap_blocks", 10] == 1.0
    assert writer.scalars["routing/block_01/q/overlap_blocks", 10] == 0.0
    watch.run(model, 20)
    assert writer.scalars["routing/block_00/ffn/overlap_steps", 20] == 1.0
    with torch.no_grad():
        model.weight.neg_()  # now the patches that were last come first
    watch.run(model, 30)
    assert writer.scalars["routing/block_00/q/overlap_steps", 30] == 0.0


def test_there_is_one_picture_per_router() -> None:
    writer = Recorder()
    monitor(writer).run(Model(), 10)
    assert set(writer.images) == {("routed_patches/q", 10), ("routed_patches/ffn", 10)}
    for image in writer.images.values():
        assert (image.dtype, image.shape[0]) == (torch.uint8, 3)


def test_every_rank_runs_the_model_and_only_rank_0_writes() -> None:
    writer, model = Recorder(), Model()
    monitor(writer, rank=1).run(model, 10)
    assert len(model.calls) == 1
    assert not writer.scalars
    assert not writer.images


def test_the_model_is_watched_in_eval_mode_and_left_as_it_was() -> None:
    model = Model().train()
    monitor(Recorder()).run(model, 10)
    assert model.calls == [(False, False)]
    assert model.training
    assert model.dropout.training
    assert torch.is_grad_enabled()
