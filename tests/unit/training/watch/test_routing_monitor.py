"""The statistics are what their names say, and watching a model leaves it as it was."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from routedvit.training.watch.routing_monitor import (
    RoutingMonitor,
    overlap,
    selection,
    soft_gates,
    statistics,
)


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
        self.texts: dict[tuple[str, int], str] = {}

    def scalar(self, name: str, value: float, step: int) -> None:
        self.scalars[name, step] = value

    def image(self, name: str, image: Tensor, step: int) -> None:
        self.images[name, step] = image

    def text(self, name: str, text: str, step: int) -> None:
        self.texts[name, step] = text

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
    assert "overlap_images" not in values
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
    assert ("watch_routing/block_00/ffn/overlap_steps", 10) not in writer.scalars
    assert ("watch_routing/block_00/ffn/overlap_blocks", 10) not in writer.scalars
    assert writer.scalars["watch_routing/block_01/ffn/overlap_blocks", 10] == 1.0
    assert writer.scalars["watch_routing/block_01/q/overlap_blocks", 10] == 0.0
    watch.run(model, 20)
    assert writer.scalars["watch_routing/block_00/ffn/overlap_steps", 20] == 1.0
    with torch.no_grad():
        model.weight.neg_()  # now the patches that were last come first
    watch.run(model, 30)
    assert writer.scalars["watch_routing/block_00/q/overlap_steps", 30] == 0.0


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


def test_overlap_of_images_is_that_of_neighbours() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 3.0, 2.0, 1.0], [0.0, 3.0, 2.0, 1.0]])
    values = statistics(route(logits, 2, (2, 2)))
    assert values["overlap_images"] == pytest.approx((1 / 3 + 1) / 2)


def test_soft_gates_are_the_exact_soft_top_k() -> None:
    """Against bisection on the shift: gates min(1, exp(z + a)) that sum to the total."""
    scores = 3 * torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    low, high = torch.full((5, 1), -50.0).double(), torch.full((5, 1), 50.0).double()
    for _ in range(200):
        middle = (low + high) / 2
        too_much = (scores + middle).clamp_max(0).exp().sum(1, keepdim=True) > 11.25
        low, high = torch.where(too_much, low, middle), torch.where(too_much, middle, high)
    expected = (scores + low).clamp_max(0).exp().float()
    torch.testing.assert_close(soft_gates(scores, 11.25), expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(soft_gates(scores, 45.0), torch.ones_like(scores))


def test_straight_through_gates_do_not_hide_how_soft_they_are() -> None:
    logits = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    hard = route(logits, 16, (8, 8))._replace(gates=torch.ones(4, 16))
    assert statistics(hard)["saturated"] == 1.0
    assert statistics(hard, straight_through=True, fetch_ratio=1.125)["saturated"] < 0.5


class Collapsing(Model):
    """Its routers have a temperature; weight 0 makes every score equal."""

    def routers(self) -> dict[str, nn.Module]:
        router = nn.Module()
        router.eps = 2.0
        return {f"blocks.{block}.{kind}": router for block in range(2) for kind in ("q", "ffn")}


def test_a_collapse_is_told_once_on_the_console_and_in_the_logs() -> None:
    writer, told, model = Recorder(), [], Collapsing()
    watch = RoutingMonitor(probe(), writer, mean=[0.0], std=[1.0], tell=told.append)
    watch.run(model, 10)
    healthy = writer.scalars["watch_routing/block_00/q/std_over_eps", 10]
    with torch.no_grad():
        model.weight.zero_()
    for step in (20, 30):
        watch.run(model, step)
    assert len(told) == 1
    assert told[0].startswith("step 20: warning: dead routers")
    assert "blocks.0.q, blocks.0.ffn, blocks.1.q, blocks.1.ffn" in told[0]
    assert told[0].endswith(writer.texts["warnings/routing", 20])
    assert writer.scalars["watch_routing/collapsed_routers", 10] == 0
    assert writer.scalars["watch_routing/collapsed_routers", 30] == 4
    monitor(writer).run(Model(), 40)  # without routers to ask, eps is 1
    assert healthy == pytest.approx(writer.scalars["watch_routing/block_00/q/std_over_eps", 40] / 2)


def test_the_controls_are_meant_to_be_as_they_are() -> None:
    class Control(Model):
        def routers(self) -> dict[str, nn.Module]:
            return {f"blocks.{b}.{kind}": nn.Module() for b in range(2) for kind in ("q", "ffn")}

    told: list[str] = []
    model = Control()
    with torch.no_grad():
        model.weight.zero_()
    RoutingMonitor(probe(), Recorder(), mean=[0.0], std=[1.0], tell=told.append).run(model, 10)
    assert told == []


def test_a_border_that_fills_no_patch_is_not_drawn() -> None:
    images = probe()[:1]
    bordered = nn.functional.pad(images, (0, 3, 0, 3), value=9.0)
    drawn = []
    for probed in (images, bordered):
        recorder = Recorder()
        watch = RoutingMonitor(probed, recorder, mean=[0.0], std=[1.0], patch=(4, 4))
        routing = Model().routing(images)
        watch._write_pictures(routing, 1)
        drawn.append(recorder.images["routed_patches/ffn", 1])
    assert torch.equal(*drawn)
