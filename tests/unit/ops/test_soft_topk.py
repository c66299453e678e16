"""Exact soft top-k keeps its promises at every size, spread, type and mask."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from routedvit.ops import soft_topk

SIZES = st.one_of(st.integers(1, 40), st.sampled_from([196, 256, 577, 1024, 8192]))
SPREADS = st.floats(0.1, 100)
EPS = st.sampled_from([0.1, 1.0, 3.0])
SEEDS = st.integers(0, 2**31)
SHARES = st.floats(0, 1)


def draw(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def a_fraction(share: float, n: int, fetch_ratio: float) -> float:
    """k from 1 to n, times 9/8 or not, at most n."""
    return min(max(1, round(share * n)) * fetch_ratio, n)


def by_bisection(logits: Tensor, k: float, eps: float) -> Tensor:
    """The definition, min(1, exp((s + a) / eps)) with sum k, solved the slow way in float64."""
    n = logits.shape[-1]
    low = -logits.amax(-1, keepdim=True) + eps * math.log(k / n)  # sum <= k
    high = -logits.amin(-1, keepdim=True)  # sum = n
    for _ in range(200):
        middle = (low + high) / 2
        too_much = ((logits + middle) / eps).clamp(max=0).exp().sum(-1, keepdim=True) > k
        low, high = torch.where(too_much, low, middle), torch.where(too_much, middle, high)
    return ((logits + low) / eps).clamp(max=0).exp()


@settings(max_examples=150, deadline=None)
@given(SIZES, SPREADS, EPS, SHARES, st.sampled_from([1.0, 1.125]), SEEDS)
def test_float32_gates_sum_to_k_within_1e_5_and_are_monotone(n, spread, eps, share, ratio, seed):
    k = a_fraction(share, n, ratio)
    logits = (draw(seed, 3, n) * spread * eps).float()
    gates = soft_topk(logits, k, eps=eps)
    assert ((gates.double().sum(-1) - k).abs() <= 1e-5 * k).all()
    assert (gates >= 0).all()
    assert (gates <= 1).all()
    order = logits.argsort(-1)
    assert (gates.gather(-1, order).diff(dim=-1) >= 0).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), SPREADS, EPS, SHARES, st.sampled_from([1.0, 1.125]), SEEDS)
def test_gates_are_those_of_the_definition(n, spread, eps, share, ratio, seed):
    k = a_fraction(share, n, ratio)
    logits = draw(seed, 3, n) * spread * eps
    torch.testing.assert_close(
        soft_topk(logits, k, eps=eps), by_bisection(logits, k, eps), rtol=0, atol=1e-9
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 24), SPREADS, EPS, SHARES, st.sampled_from([1.0, 1.125]), SEEDS)
def test_gradient_is_that_of_finite_differences(n, spread, eps, share, ratio, seed):
    k = a_fraction(share, n, ratio)
    logits = draw(seed, 1, n) * spread * eps
    # finite differences are wrong across the kink at gate 1: nothing may be about to cross it
    assume(k == n or _distance_to_kink(logits, k, eps) > 1e-3)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: soft_topk(s, k, eps=eps), logits, eps=1e-6 * eps, atol=1e-6, rtol=1e-6
    )


def _distance_to_kink(logits: Tensor, k: float, eps: float) -> float:
    """How far the entry nearest to saturation is from it, |s + a| / eps."""
    free = by_bisection(logits, k, eps) < 1 - 1e-12
    if not free.any():
        return 0.0
    shift = (by_bisection(logits, k, eps)[free].log() - logits[free] / eps)[0]  # a / eps
    return float((logits / eps + shift).abs().min())


def test_gradient_of_float32_is_that_of_float64():
    weight = draw(1, 4, 196)
    grads = []
    for dtype in (torch.float64, torch.float32):
        logits = draw(0, 4, 196).to(dtype).requires_grad_()
        (soft_topk(logits, 27) * weight.to(dtype)).sum().backward()
        grads.append(logits.grad.double())
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), SPREADS, SHARES, SEEDS)
def test_masked_entries_get_nothing_and_the_rest_is_solved_without_them(n, spread, share, seed):
    logits = draw(seed, n) * spread
    mask = draw(seed + 1, n) > 0
    assume(mask.any())
    k = a_fraction(share, int(mask.sum()), 1.125)
    gates = soft_topk(logits, k, mask=mask)
    assert (gates[~mask] == 0).all()
    torch.testing.assert_close(gates[mask], soft_topk(logits[mask], k), rtol=0, atol=1e-9)
    same = soft_topk(logits.masked_fill(~mask, -math.inf), k)
    torch.testing.assert_close(gates, same, rtol=0, atol=0)


def test_a_row_with_fewer_entries_than_k_gives_one_to_each():
    mask = torch.tensor([[True, True, False, False], [False] * 4, [True] * 4])
    logits = draw(0, 3, 4).requires_grad_()
    gates = soft_topk(logits, 3, mask=mask)
    assert gates[0].tolist() == [1, 1, 0, 0]
    assert gates[1].tolist() == [0, 0, 0, 0]
    gates.sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("n", [1, 2, 7, 41, 196])  # 41 * (1 / 41) is not 1 in float32
def test_ties_get_equal_gates_and_constant_rows_k_over_n(n):
    for k in {1, max(1, n // 3), n}:
        logits = torch.full((2, n), 5.0, requires_grad=True)
        gates = soft_topk(logits, k)
        torch.testing.assert_close(gates, torch.full((2, n), k / n))
        assert gates.unique().numel() == 1
        (gates.square() * draw(1, 2, n)).sum().backward()
        assert logits.grad.isfinite().all()
        if k == n:  # whatever the logits
            assert (gates == 1).all()
            assert (logits.grad == 0).all()
    some = soft_topk(torch.tensor([3.0, 1.0, 3.0, 3.0, 0.0]), 2)
    assert some[0] == some[2] == some[3]


def test_a_gate_on_the_verge_of_saturation_is_not_rounded_up_above_one():
    logits = draw(2, 1000, 20)
    logits[:, 0] = logits[:, 1:].logsumexp(-1) - math.log(8 - 1)
    assert (soft_topk(logits.float(), 8) <= 1).all()


@pytest.mark.parametrize("scale", [1e-30, 1e4, 1e30])
@pytest.mark.parametrize("k", [1, 9.5, 24, 63, 64])
def test_huge_and_tiny_logits_give_neither_nan_nor_inf(scale, k):
    logits = (draw(3, 5, 64) * scale).float()
    logits[0, ::2] = -math.inf
    logits[1, 0] = torch.finfo(torch.float32).max
    logits[2] = -torch.finfo(torch.float32).max
    logits.requires_grad_()
    gates = soft_topk(logits, k, eps=0.1)
    (gates * draw(4, 5, 64).float()).sum().backward()
    assert gates.isfinite().all()
    assert logits.grad.isfinite().all()
    valid = torch.tensor([32, 64, 64, 64, 64])
    torch.testing.assert_close(gates.sum(-1), valid.clamp(max=k).float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_solved_in_float32(dtype):
    logits = (draw(0, 8, 1024) * 10).to(dtype)
    gates = soft_topk(logits, 100)
    assert gates.dtype == torch.float32
    torch.testing.assert_close(gates, soft_topk(logits.float(), 100), rtol=0, atol=0)
    assert ((gates.double().sum(-1) - 100).abs() <= 1e-3).all()


def test_k_may_differ_from_row_to_row_and_has_a_gradient():
    logits = draw(0, 3, 20) * 2
    k = torch.tensor([1.0, 7.5, 20.0], dtype=torch.float64, requires_grad=True)
    gates = soft_topk(logits, k)
    for row in range(3):
        torch.testing.assert_close(gates[row], soft_topk(logits[row], k[row].item()))
    gates[1].sum().backward()
    assert k.grad[1] == pytest.approx(1)  # the sum is k, so its derivative is 1


def test_order_of_entries_and_other_rows_do_not_matter():
    logits = draw(0, 6, 50).float() * 4
    gates = soft_topk(logits, 10)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(soft_topk(logits[:, order], 10), gates[:, order])
    torch.testing.assert_close(soft_topk(logits[2:3], 10), gates[2:3], rtol=0, atol=0)
    torch.testing.assert_close(soft_topk(logits.t().contiguous().t(), 10), gates, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"k": 0}, "k=0"),
        ({"k": 6}, "k=6"),
        ({"k": 2, "eps": 0}, "eps=0"),
        ({"k": 2, "solver": "magic"}, "solver='magic'"),
    ],
)
def test_impossible_arguments_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        soft_topk(torch.zeros(5), **arguments)
