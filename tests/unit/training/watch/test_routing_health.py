"""A collapsed router is named once per change, and a healthy or deliberate one never."""

import pytest
import torch

from routedvit.training.watch.routing_health import RoutingHealth, condition
from routedvit.training.watch.routing_monitor import statistics
from tests.unit.training.watch.test_routing_monitor import route

IMAGES, PATCHES, K = 8, 64, 16


def scores(spread: float, *, shared: float = 0.0) -> torch.Tensor:
    """Logits [B, N] of a given spread, of which `shared` is the same in every image."""
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(IMAGES, PATCHES, generator=generator)
    same = torch.randn(PATCHES, generator=generator)
    return spread * ((1 - shared) * own + shared * same)


def soft(logits: torch.Tensor, k: int = K) -> dict[str, float]:
    """Statistics of a router with exact soft gates."""
    routing = route(logits, k, (8, 8))
    # straight-through, so that it computes the soft gates by itself
    return statistics(routing, straight_through=True, fetch_ratio=1.125)


def test_a_fresh_router_is_healthy() -> None:
    assert condition(soft(scores(1.0))) == "healthy"
    assert condition(soft(scores(2.0, shared=0.5))) == "healthy"


def test_scores_without_a_spread_are_dead() -> None:
    assert condition(soft(scores(0.01))) == "dead"


def test_gates_that_are_all_one_are_saturated() -> None:
    assert condition(soft(scores(27.0))) == "saturated"


def test_the_same_patches_on_every_image_are_static() -> None:
    assert condition(soft(scores(1.0, shared=1.0))) == "static"


@pytest.mark.parametrize("k", [0, PATCHES])
def test_a_router_without_a_choice_is_not_judged(k: int) -> None:
    assert condition(statistics(route(scores(0.0), k, (8, 8)))) == "healthy"


def test_a_change_is_told_once_and_names_the_routers() -> None:
    health = RoutingHealth()
    assert health.changes({"blocks.0.q": "healthy", "blocks.0.ffn": "healthy"}) == []
    (line,) = health.changes({"blocks.0.q": "dead", "blocks.0.ffn": "dead"})
    assert line.startswith("warning: dead routers")
    assert line.endswith("blocks.0.q, blocks.0.ffn")
    assert health.collapsed == 2
    assert health.changes({"blocks.0.q": "dead", "blocks.0.ffn": "dead"}) == []
    other, recovered = health.changes({"blocks.0.q": "static", "blocks.0.ffn": "healthy"})
    assert "static" in other
    assert other.endswith(": blocks.0.q")
    assert recovered == "routers healthy again: blocks.0.ffn"
    assert health.collapsed == 1
