"""The routing operators: selection, gates, the closed-form backward, registration."""

import math

import pytest
import torch
from torch import Tensor

from routedvit.ops import SAVED_OPS, route, route_all, select
from routedvit.ops.routing import route_reference

CASES = [(1, 1), (7, 1), (7, 3), (49, 12), (49, 48), (49, 49), (1000, 250)]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(("n", "k"), CASES)
def test_route_is_a_loop_over_rows(n, k):
    logits = draw(3, 2, n)
    indices, gates = route(logits, k)
    for image in range(3):
        for r in range(2):
            row = logits[image, r].tolist()
            expected = sorted(sorted(range(n), key=lambda i: -row[i])[:k])
            assert indices[image, r].tolist() == expected
    assert gates.shape == indices.shape
    assert (gates > 0).all()
    assert (gates <= 1).all()


@pytest.mark.parametrize("spread", [0.3, 1.0, 5.0])
@pytest.mark.parametrize(("n", "k"), CASES)
def test_operator_equals_the_differentiable_reference(n, k, spread):
    results = []
    for function in (route, route_reference):
        logits = (draw(4, n) * spread).requires_grad_()
        indices, gates = function(logits, k, 1.125, 1.0)
        (gates * draw(4, k)).sum().backward()
        results.append((indices, gates.detach(), logits.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_tokens_that_just_missed_the_selection_get_a_gradient():
    logits = draw(1, 49).requires_grad_()
    indices, gates = route(logits, 12)
    gates.square().sum().backward()
    missed = torch.ones(49, dtype=torch.bool)
    missed[indices[0]] = False
    assert (logits.grad[0, missed] != 0).all()


def test_duplicates_get_equal_gates_and_exactly_k_distinct_indices():
    indices, gates = route(torch.zeros(2, 16), 5)
    assert all(len(set(row)) == 5 for row in indices.tolist())
    assert gates.unique().numel() == 1


@pytest.mark.parametrize("function", [route, route_reference])
@pytest.mark.parametrize("count", [1, 5, 16])
def test_nan_is_not_hidden_and_stays_in_its_row(function, count):
    logits = draw(3, 16)
    spoilt = logits.clone()
    spoilt[1, :count] = math.nan
    spoilt.requires_grad_()
    indices, gates = function(spoilt, 4, 1.125, 1.0)
    assert gates[1].isnan().any()
    gates.square().sum().backward()
    assert spoilt.grad[[0, 2]].isfinite().all()
    expected = function(logits[[0, 2]], 4, 1.125, 1.0)
    torch.testing.assert_close((indices[[0, 2]], gates[[0, 2]]), expected)


@pytest.mark.parametrize("present", [2, 4, 5])
def test_minus_infinity_takes_no_part_however_many_are_left(present):
    results = []
    for function in (route, route_reference):
        logits = draw(2, 16)
        logits[0, present:] = -math.inf
        logits.requires_grad_()
        _, gates = function(logits, 4, 1.125, 1.0)
        gates.square().sum().backward()
        results.append((gates.detach(), logits.grad))
    assert results[0][0][0, : min(present, 4)].isfinite().all()
    torch.testing.assert_close(results[0], results[1])


def test_gradient_is_zero_when_everything_is_selected():
    logits = draw(2, 9).requires_grad_()
    _, gates = route(logits, 9)
    (gates * draw(2, 9)).sum().backward()
    assert (gates == 1).all()
    assert (logits.grad == 0).all()


def test_select_takes_the_largest_in_ascending_order():
    assert select(torch.tensor([[3.0, 9.0, 1.0, 7.0]]), 2).tolist() == [[1, 3]]
    assert select(torch.zeros(2, 4), 0).shape == (2, 0)


def test_routers_together_route_as_they_do_alone():
    counts, weights = [12, 1, 49], draw(2, 62)
    logits = draw(2, 3, 49).requires_grad_()
    together = route_all(logits, counts)
    (torch.cat([gates for _, gates in together], -1) * weights).sum().backward()
    for r, (indices, gates) in enumerate(together):
        row = logits.detach()[:, r].requires_grad_()
        alone = route(row, counts[r])
        (alone[1] * weights.split(counts, -1)[r]).sum().backward()
        assert torch.equal(indices, alone[0])
        torch.testing.assert_close(gates, alone[1])
        torch.testing.assert_close(logits.grad[:, r], row.grad)


def test_operators_are_registered_soundly():
    route_op, select_op = SAVED_OPS
    torch.library.opcheck(route_op, (draw(2, 2, 10).requires_grad_(), [3, 5], 1.125, 1.0))
    torch.library.opcheck(select_op, (draw(2, 10), 3))
    # routers hand in transposed logits: what comes out must have the strides that were announced
    strided = draw(2, 12, 2)[:, 2:].transpose(1, 2)
    torch.library.opcheck(route_op, (strided.detach().requires_grad_(), [3, 5], 1.125, 1.0))
    torch.library.opcheck(route_op, (strided.unsqueeze(-2), [3], 1.125, 1.0))
    torch.library.opcheck(select_op, (strided, 3))
