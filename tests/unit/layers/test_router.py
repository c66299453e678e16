"""Routers select the promised number of tokens, learn, and leave the choice to the image."""

from fractions import Fraction

import pytest
import torch

from routedvit.layers import FixedRouter, Router, as_ratio, build_router
from routedvit.layers.router import decide_together
from routedvit.ops import router_logits


def tokens(batch: int = 3, num: int = 49, dim: int = 64) -> torch.Tensor:
    return torch.randn(batch, num, dim, generator=torch.Generator().manual_seed(9))


def routed(
    router: Router | FixedRouter, x: torch.Tensor, num_prefix: int = 0
) -> tuple[torch.Tensor, ...]:
    """Indices, gates and logits."""
    return router.decide(router(x, num_prefix))


@pytest.mark.parametrize("capacity", [0.25, 0.1, "1/3", Fraction(9, 10), 1.0, 1 / 1000])
@pytest.mark.parametrize("num", [1, 2, 49, 196])
def test_k_is_the_ceiling_of_the_exact_share(capacity, num):
    router = Router(64, capacity, num_routes=2)
    indices, gates, logits = routed(router, tokens(num=num))
    ratio = as_ratio(capacity)
    k = -(-num * ratio.numerator // ratio.denominator)
    assert indices.shape == gates.shape == (3, 2, k)
    assert logits.shape == (3, 2, num)
    assert router.num_selected(num) == k
    assert (indices.diff(dim=-1) > 0).all()  # ascending and distinct


def test_float_capacities_mean_what_they_say():
    assert as_ratio(0.1) == Fraction(1, 10)
    assert as_ratio(1 / 3) == Fraction(1, 3)


@pytest.mark.parametrize("dim", [64, 768])
def test_logits_of_normalised_tokens_start_with_a_spread_of_one(dim):
    torch.manual_seed(0)
    _, gates, logits = routed(Router(dim, 0.125), tokens(num=196, dim=dim))
    assert 0.7 < logits.std() < 1.4
    assert 0.3 < gates.mean() < 0.8


def test_almost_every_selected_token_passes_a_gradient_to_the_router():
    torch.manual_seed(0)
    x = tokens(8, 196, 768).requires_grad_()
    indices, gates, _ = routed(Router(768, 0.125), x)
    gates.sum().backward()
    reached = (x.grad != 0).any(-1).gather(1, indices[:, 0])
    assert reached.float().mean() > 0.85


@pytest.mark.parametrize("cosine", [False, True])
def test_float64_tokens_are_scored_in_float64(cosine):
    router, x = Router(64, 0.25, cosine=cosine, scale=4.0).double(), tokens().double()
    score = torch.cosine_similarity(x, router.weight, dim=-1) if cosine else x @ router.weight[0]
    torch.testing.assert_close(router(x)[:, 0], 4 * score, rtol=1e-12, atol=1e-12)


def test_prefix_tokens_neither_compete_nor_count():
    x = tokens()
    router = Router(64, 0.25)
    prefix = 1e4 * torch.ones(3, 2, 64)  # would win, or ruin the normalisation
    for alone, behind in zip(
        routed(router, x), routed(router, torch.cat([prefix, x], 1), 2), strict=True
    ):
        torch.testing.assert_close(alone, behind)


def test_straight_through_gates_are_one_with_the_soft_gradient():
    soft = Router(64)
    hard = Router(64, straight_through=True)
    hard.load_state_dict(soft.state_dict())
    weight = torch.randn(3, 1, 13)
    for router in (soft, hard):
        (routed(router, tokens())[1] * weight).sum().backward()
    assert (routed(hard, tokens())[1] == 1).all()
    torch.testing.assert_close(soft.weight.grad, hard.weight.grad)


def test_coordinate_descent_agrees_where_it_converges():
    exact, iterated = Router(64), Router(64, solver="coordinate_descent")
    iterated.load_state_dict(exact.state_dict())
    expected, found = routed(exact, tokens()), routed(iterated, tokens())
    assert torch.equal(expected[0], found[0])
    torch.testing.assert_close(expected[1], found[1], rtol=0, atol=1e-3)


def test_scores_stay_fp32_in_low_precision():
    router, x = Router(64), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = routed(router, x)
    for before, after in zip(routed(router, x), under_autocast, strict=True):
        assert torch.equal(before, after)
    _, gates, logits = routed(router.bfloat16(), x.bfloat16())
    assert gates.dtype == logits.dtype == torch.float32


def test_static_router_takes_the_first_token_of_equal_blocks():
    indices, gates, _ = routed(FixedRouter("static", "1/4"), tokens(num=16))
    assert indices.tolist() == [[[0, 4, 8, 12]]] * 3
    assert (gates == 1).all()


def test_random_router_draws_anew_in_training_and_keeps_still_in_eval():
    router, x = FixedRouter("random", 0.25), tokens()
    assert not torch.equal(routed(router, x)[0], routed(router, x)[0])
    router.eval()
    assert torch.equal(routed(router, x)[0], routed(router, torch.randn_like(x))[0])


@pytest.mark.parametrize(("kind", "k"), [("all_heavy", 49), ("all_light", 0)])
def test_all_or_nothing_whatever_the_capacity(kind, k):
    router = build_router(kind, 64, 0.5)
    router.set_capacity(Fraction(1, 3))
    assert routed(router, tokens())[0].shape == (3, 1, k)


@pytest.mark.parametrize("capacity", [1e-4, 1e-12])
def test_the_smallest_capacities_are_one_token(capacity):
    ratio = as_ratio(capacity)
    assert 0 < ratio <= Fraction(1, 4096)
    assert Router(8, capacity).num_selected(196) == 1


@pytest.mark.parametrize("capacity", [0, -0.1, 1.5, float("nan"), "a half", "1/0", None, True])
def test_impossible_capacities_are_named(capacity):
    with pytest.raises((ValueError, TypeError), match="q_capacity="):
        as_ratio(capacity, "q_capacity")


@pytest.mark.parametrize(
    "arguments",
    [
        *({"solver": "magic"}, {"eps": 0.0}, {"fetch_ratio": 0.5}, {"temperature": 1.0}),
        *({"eps": float("nan")}, {"fetch_ratio": float("nan")}, {"fetch_ratio": float("inf")}),
    ],
)
def test_impossible_router_arguments_are_named(arguments):
    with pytest.raises((ValueError, TypeError), match=next(iter(arguments))):
        build_router("learned", 64, 0.5, **arguments)


@pytest.mark.parametrize("solver", ["exact", "coordinate_descent"])
@pytest.mark.parametrize("fixed", [0, 7, 100])
def test_deciding_together_is_deciding_one_by_one(solver, fixed):
    routers = [Router(64, 0.25, solver=solver), Router(64, 0.5, num_routes=2, solver=solver)]
    routers[1].set_number(fixed)
    logits = [router(tokens()) for router in routers]
    together = decide_together(routers, logits)
    for router, own, decision in zip(routers, logits, together, strict=True):
        for a, b in zip(decision, router.decide(own), strict=True):
            torch.testing.assert_close(a, b)


def test_scores_that_decide_nothing_are_computed_only_for_those_who_watch():
    router, x = Router(8, 1), torch.randn(2, 7, 8)
    scores = router_logits(x, router.weight, router.scale, 2)
    logits = router(x, 2)
    assert logits.shape == scores.shape
    assert not logits.any()
    router.decide(logits)[1].sum().backward()
    assert router.weight.grad is not None  # under ZeRO-3 none would be an earlier step's
    assert not router.weight.grad.any()
    router.decision.register_forward_hook(lambda *_: None)
    assert torch.equal(router(x, 2), scores)


def test_print_shows_the_present_capacity():
    router = Router(8, 0.25, num_routes=2)
    assert str(router).startswith("Router(\n  8, routes=2, capacity=1/4")
    router.set_capacity(Fraction(1, 2))
    assert "capacity=1/2" in str(router)
    router.set_number(12)
    assert "capacity=12 tokens" in str(router)
    assert "static, capacity=1/3" in str(build_router("static", 8, "1/3"))
